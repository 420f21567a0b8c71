"""`matta ab`: the arms of an experiment side by side, and whether to stop."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from matta.ab_testing.ab_settings import AbSettings
from matta.ab_testing.comparison import AbReport, compare


def run(settings: AbSettings) -> dict[str, Any]:
    """Print the report, and give it as an object for JSON.

    Raises:
        AbError: a log that cannot be read, or fewer than two arms.
    """
    report = compare(
        settings.logs,
        outcomes=settings.outcomes,
        metric=settings.metric,
        control=settings.control,
        shares=settings.told_shares(),
        alpha=settings.alpha,
        margin=settings.margin,
        predictions=settings.predictions,
        tuned_for=settings.tuned_for,
    )
    _show(report)
    return asdict(report)


def _show(report: AbReport) -> None:
    from matta.training.reporting import output_console, rich_table

    console = output_console()
    arms = [
        (
            *(arm.name, f"{arm.share:.1%}", f"{arm.answers:,}", f"{arm.joined:,}"),
            *(_told(arm.metric, ".5g"), _told(arm.latency_ms, ".2f")),
        )
        for arm in report.arms
    ]
    columns = ("arm", "share", "answers", "with outcome", report.metric, "latency (ms)")
    console.print(rich_table("Arms", columns, arms))
    pairs = [
        (f"{pair.arm} − {pair.control}", _told(pair.difference), _interval(pair.low, pair.high), pair.decision)
        for pair in report.pairs
    ]
    title = f"Differences in {report.metric}, valid at all looks together ({1 - report.alpha:.4g})"
    headings = ("arms", "difference", "interval", "decision")
    console.print(rich_table(title, headings, pairs, left=("arms", "decision")))
    for told in (*(f"warning: {each}" for each in report.warnings), *report.notes):
        console.print(told, highlight=False, markup=False)


def _interval(low: float | None, high: float | None) -> str:
    return "–" if low is None or high is None else f"{low:+.4g} to {high:+.4g}"


def _told(value: float | None, form: str = "+.4g") -> str:
    return "–" if value is None else f"{value:{form}}"
