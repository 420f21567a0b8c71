"""The zoo: models as people have them, each nested, trained for two steps, extracted and started from its Student.

The models are those of `zoo_models.py`, what is asked of each is in `zoo_cases.py`. A refusal counts as right where
what it says to do, done as it stands, nests. `wrong_in_silence` counts models that nested and compute something else
than the plain class, `foreign_errors` those that ended in an error that is not matta's.

    python benchmarks/zoo.py [--quick] [--json] [--write docs/models.md]
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from zoo_cases import Outcome, examine
from zoo_models import MODELS


def main() -> None:
    """Examine every model and print."""
    parser = argparse.ArgumentParser(description="Models as people have them: which nest, and how.")
    parser.add_argument("--quick", action="store_true", help="every fourth model")
    parser.add_argument("--json", action="store_true", help="print one JSON object, nothing else")
    parser.add_argument("--write", type=Path, help="write the table to this Markdown file")
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    outcomes = []
    for model in MODELS[:: 4 if options.quick else 1]:
        outcomes.append(examine(model))
        if not options.json:
            print(line(outcomes[-1]), flush=True)
    figures = summary(outcomes)
    if options.write:
        options.write.write_text(page(outcomes, figures), encoding="utf-8")
    if options.json:
        print(json.dumps(figures))
        return
    print()
    for name, value in figures.items():
        print(f"{name:22} {value:>10,.3f}")


def summary(outcomes: Sequence[Outcome]) -> dict[str, float]:
    """The figures."""
    refused = [each for each in outcomes if each.refusal]
    times = [each.nest_s for each in outcomes if each.nested]
    return {
        "tried": len(outcomes),
        "nested": sum(each.nested for each in outcomes) / len(outcomes),
        "nested_at_once": sum(each.how == "at once" for each in outcomes) / len(outcomes),
        "wrong_in_silence": sum(bool(each.wrong) for each in outcomes),
        "foreign_errors": sum(bool(each.foreign) for each in outcomes),
        "median_nest_s": statistics.median(times),
        "remedies_that_work": sum(each.remedy_works for each in refused) / max(len(refused), 1) if refused else 1.0,
        "warm_starts_kept": sum(each.warm == "kept" for each in outcomes) / len(outcomes),
    }


def line(found: Outcome) -> str:
    """One model, for the terminal."""
    faults = "; ".join([*found.wrong, *found.foreign])
    name = f"{found.model.name} ({found.model.grows})"
    return f"{name:66.66} {found.how:16} {found.nest_s:6.2f} s  warm: {found.warm.split(':')[0]:8} {faults}".rstrip()


def page(outcomes: Sequence[Outcome], figures: dict[str, float]) -> str:
    """The page of the documentation."""
    return "\n".join(_page(outcomes, figures)) + "\n"


def _page(outcomes: Sequence[Outcome], figures: dict[str, float]) -> Iterator[str]:
    yield "# Models"
    yield ""
    yield (
        f"{figures['tried']:.0f} models at tiny sizes, each nested with `matta.nest(student, ta, example=batch)`, "
        f"trained for two steps and extracted. {figures['nested']:.0%} nest, {figures['nested_at_once']:.0%} without "
        f"any declaration; {figures['wrong_in_silence']:.0f} nest wrongly in silence. The extracted Student equals the "
        f"live one to the bit, and the plain class with those weights. `python benchmarks/zoo.py --write "
        f"docs/models.md` writes this page."
    )
    yield ""
    yield (
        "*Size between*: a mixture of wide and narrow layers was extracted exactly, or one width runs through the "
        "whole model, so that there is none. *Warm start*: `warm_start=True` keeps the function of a trained Student "
        "in the TA, or is refused (norms over a wider hidden state, for example)."
    )
    for source in dict.fromkeys(each.model.source for each in outcomes):
        yield from _section(source, [each for each in outcomes if each.model.source == source])


def _section(source: str, outcomes: Sequence[Outcome]) -> Iterator[str]:
    yield ""
    yield f"## {source.replace('transformers', 'Transformers').capitalize()}"
    yield ""
    yield "| model | what grows | nests | size between | warm start |"
    yield "|---|---|---|---|---|"
    for each in sorted(outcomes, key=lambda found: (found.model.name.lower(), found.model.grows)):
        between = {"e": "exact", "n": "none", "r": "refused"}.get(each.between[:1], "")
        how = f"{each.how}: {each.model.advice or '`' + each.remedy + '`'}" if each.refusal else each.how
        yield f"| {each.model.name} | {each.model.grows} | {how} | {between} | {each.warm.split(':')[0]} |"


if __name__ == "__main__":
    sys.exit(main())
