"""A/B testing: two or more sizes or versions side by side on live requests, compared while the answers come in.

A `Split` gives each request id its arm, and an `AnswerLog` keeps what was answered and what came of it. `matta ab LOG`
joins the two and gives the difference of a metric with an interval that stays valid however often one looks.

Read in this order:

- `traffic`: the split, and the log of answers and outcomes.
- `joining`: logs as arrays, answers and outcomes joined by id.
- `unit_metrics`: the metric of each request, and AUROC with the influence of each request on it.
- `confidence_sequences`: intervals that hold at all looks together.
- `split_checks`: whether the requests came in the shares declared.
- `comparison`: the report. `ab_command`: `matta ab`. `ab_settings`: its options.

This file loads the standard library alone, so that a server that only splits and logs stays light.

Example:
    >>> from matta.ab_testing import Split
    >>> Split(shares={"Student": 9, "TA": 1}, salt="experiment 1").arm("request 7")
    'Student'
"""

from matta.ab_testing.traffic import AnswerLog, Split

__all__ = ["AnswerLog", "Split"]
