"""The study of the family at equal compute, as it stands in the documentation: tables, and what they say in words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from matta_studies.compute_plan import COMPUTE, WAYS, alone, family
from matta_studies.compute_tasks import SIZES
from matta_studies.compute_training import ALONE, FAMILY, TOGETHER
from matta_studies.intervals import Change
from matta_studies.presentation import Notes, Part, Table, told_machine

TITLES: Final[Mapping[str, str]] = {"films": "film ranker", "flights": "late flights", "text": "GPT-2 on bytes"}
METRICS: Final[Mapping[str, tuple[str, float]]] = {
    "films": ("AucLoss x 1000", 1000.0),
    "flights": ("AucLoss x 1000", 1000.0),
    "text": ("bits per byte", 1.0),
}


def told(results: Mapping[str, Any]) -> list[Part]:
    """The tables as they stand in the documentation."""
    is_compute, counts = results["short"] == COMPUTE, [*map(int, results["family_vs_alone_percent"])]
    arms = [family(len(SIZES)), *WAYS, *(alone(count, "") for count in counts)]
    regime = (
        "Compute is short: every arm has the same processor time; sizes alone share it among as many as are wanted."
        if is_compute
        else f"Data are short: the first {results['examples']:,} examples, and every arm has the passes and the weight "
        f"decay that are best for it."
    )
    metric, _ = METRICS[results["data"]]
    examples = "" if is_compute else f" --examples {results['examples']}"
    command = f"matta study compute --data {results['data']} --short {results['short']}{examples}"
    short = "compute short" if is_compute else f"{results['examples']:,} examples"
    return [
        f"## The family against its sizes alone: {TITLES[results['data']]}, {short}",
        f"`{command} --seeds {results['num_seeds']}`; {told_machine(results['machine'])}. {regime}",
        Table(
            title=f"{metric} by size (less is better)",
            columns=("size", "parameters", *(_short(arm, _family_told(results)) for arm in arms)),
            rows=[_row(results, size, arms) for size in SIZES],
        ),
        Table(
            title="The family against each size alone",
            columns=("size", *(f"{count} wanted" for count in counts)),
            rows=[_change_row(results, size) for size in SIZES],
        ),
        Notes(notes(results)),
        _chosen(results),
    ]


def _chosen(results: Mapping[str, Any]) -> Table:
    """How each arm was trained, and what it cost."""
    rows = [
        (
            results["titles"][arm],
            each["told"],
            f"{results['seconds'][arm]:.1f}",
            *([f"{results['flops'][arm] / 1e12:.2f}"] if results["flops"] else []),
        )
        for arm, each in results["chosen"].items()
    ]
    counted = ("TFLOPs",) if results["flops"] else ()
    return Table(columns=("arm", "chosen on the validation part", "processor seconds", *counted), rows=rows)


def _family_told(results: Mapping[str, Any]) -> str:
    return "in turns" if results["short"] == COMPUTE else "downwards"


def _short(arm: str, of_family: str) -> str:
    if arm.startswith(ALONE):
        return f"alone, {arm.split()[1]} wanted"
    return WAYS.get(arm, f"MatTA {of_family}")


def _row(results: Mapping[str, Any], size: str, arms: Sequence[str]) -> tuple[str, ...]:
    scale = METRICS[results["data"]][1]
    losses = [results["losses"].get(f"{arm}{size}" if arm.startswith(ALONE) else arm, {}).get(size) for arm in arms]
    cells = ["–" if each is None else f"{scale * each['mean']:.{2 if scale > 1 else 4}f}" for each in losses]
    return (results["sizes"][size], f"{results['parameters'][size]:,}", *cells)


def _hypervolume_told(results: Mapping[str, Any]) -> str:
    peer, changes = WAYS.get(results["best_peer"], "each alone"), results["hypervolume_change"]
    if not changes:
        return f"Hypervolume: with some seed nothing of any peer's, of {peer} either, is better than the Student alone."
    told = [Change.told(changes[arm]) for arm in (family(len(SIZES)), TOGETHER)]
    return (
        f"Hypervolume of loss and log size against the best peer's ({peer}): {_family_told(results)} {told[0]}, all in "
        f"every step {told[1]} (more is better)."
    )


def _change_row(results: Mapping[str, Any], size: str) -> tuple[str, ...]:
    changes = [each.get(size) for each in results["family_vs_alone_percent"].values()]
    return (results["sizes"][size], *("–" if each is None else str(Change.told(each)) for each in changes))


def notes(results: Mapping[str, Any]) -> list[str]:
    """What the tables say in words."""
    in_turns, together = (
        {count: Change.told(each) for count, each in results[f"{name}_vs_alone_mean_percent"].items()}
        for name in (FAMILY, TOGETHER)
    )
    shares = [each / results["seconds"][TOGETHER] for arm, each in results["seconds"].items() if ALONE not in arm]
    worse = [
        "; ".join(results["sizes"][size] for size in sizes) or "none"
        for sizes in results["worse_than_smaller"].values()
    ]
    lines = [
        *(
            f"{count} sizes wanted, their mean against each alone: {_family_told(results)} {each}, all in every step "
            f"{together[count]}."
            for count, each in in_turns.items()
        ),
        _hypervolume_told(results),
        f"Sizes that are worse than a smaller one beyond the interval: {_family_told(results)} {worse[0]}; all in "
        f"every step {worse[1]}.",
        f"Intervals: 95%, paired over {results['num_seeds']} fresh seeds.",
    ]
    if results["short"] == COMPUTE:
        lines.append(
            f"Processor seconds of the shared runs: {min(shares):.2f} to {max(shares):.2f} of those of MatTA with all "
            f"in every step."
        )
    return lines
