"""What the study of language models says: its tables, notes and picture."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from matta_studies.language_plan import BOTH, MATTA, SHAMPOO, GptSize
from matta_studies.presentation import Notes, Part, Point, Table, draw_family
from matta_studies.trials import BASELINE, STUDENT, TA

# figure: (arm, model), and the arm whose Student it is compared with, seed by seed
CHANGES: Final[Mapping[str, tuple[str, str, str]]] = {
    "student_vs_baseline": (MATTA, STUDENT, BASELINE),
    "ta_vs_baseline": (MATTA, TA, BASELINE),
    "shampoo_student_vs_shampoo_baseline": (BOTH, STUDENT, SHAMPOO),
    "shampoo_ta_vs_shampoo_baseline": (BOTH, TA, SHAMPOO),
    "shampoo_baseline_vs_baseline": (SHAMPOO, STUDENT, BASELINE),
    "shampoo_student_vs_baseline": (BOTH, STUDENT, BASELINE),
}
SAME_OPTIMIZER: Final = tuple(CHANGES)[:4]


def told_change(change: Mapping[str, Any]) -> str:
    """A difference in bits per byte with its interval."""
    low, high = change["interval"]
    return f"{change['bpb']:+.4f} [{low:+.4f}, {high:+.4f}]"


def change_of(results: Mapping[str, Any], figure: str) -> dict[str, Any]:
    """A comparison of the results."""
    return {key: results[f"{figure}_{key}"] for key in ("bpb", "interval", "percent", "percent_interval")}


def told(results: Mapping[str, Any]) -> list[Part]:
    """The tables as they stand in the documentation."""
    places = [
        (place, *(cell for model in (STUDENT, TA) for cell in (f"{each[model]['mean']:.4f}", told_change(each[model]))))
        for place, each in results["places"].items()
    ]
    return [
        "## Language models: bits per byte",
        _what_was_run(results),
        Table(
            title="Bits per byte of held-out text (less is better)",
            columns=("arm", "model", "parameters", "bits per byte", "change against the baseline, same optimizer", "%"),
            rows=_rows(results),
        ),
        Notes(notes(results)),
        Table(
            columns=("arm", "settings, chosen on the validation part"),
            rows=[(each["title"], each["chosen"]["told"]) for each in results["arms"].values()],
        ),
        "### Where the Student sits in depth",
        f"MatTA with Shampoo, against the baseline with Shampoo; {results['places_num_seeds']} fresh seeds.",
        Table(
            title="Where the Student sits in depth (Shampoo)",
            columns=("Student's blocks", "Student", "change", "TA", "change"),
            rows=places,
        ),
        "### The family (Fig. 5)",
        "MatTA with Shampoo once more, with one of the sub-models K = 0 … N−1 trained along at each step "
        "(`CoTraining(sample=...)`); the baseline is the one with Shampoo. K = 0 has all the TA's blocks, each of the "
        "Student's width.",
        Table(
            title="One run, every size (Shampoo)",
            columns=("sub-model", "parameters", "bits per byte", "change against the baseline", "%"),
            rows=_family_rows(results),
        ),
        Notes(family_notes(results)),
        "![Bits per byte against parameters of the Student and every sub-model, the baseline marked](language.png)",
    ]


def _rows(results: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """The cells of the table of arms."""
    figure_of = {CHANGES[name][:2]: name for name in SAME_OPTIMIZER}
    found: list[tuple[str, ...]] = []
    for arm, each in results["arms"].items():
        for model, bits in each["models"].items():
            change = change_of(results, figure_of[arm, model]) if (arm, model) in figure_of else None
            cells = (told_change(change), f"{change['percent']:+.2f}%") if change else ("–", "–")
            found.append((each["title"], model, f"{bits['parameters']:,}", f"{bits['mean']:.4f}", *cells))
    return found


def _family_rows(results: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """The cells of the table of sub-models, after the baseline and the Student."""
    size = results["arms"][SHAMPOO]["models"][STUDENT]["parameters"]
    named = [(STUDENT, results["family_student"] | {"parameters": size})]
    last = len(results["family"]) - 1
    named += [(f"K = {each['k']}{' (TA)' * (each['k'] == last)}", each) for each in results["family"]]
    return [
        ("baseline alone", f"{size:,}", f"{results['family_baseline']:.4f}", "–", "–"),
        *(
            (name, f"{each['parameters']:,}", f"{each['mean']:.4f}", told_change(each), f"{each['percent']:+.2f}%")
            for name, each in named
        ),
    ]


def notes(results: Mapping[str, Any]) -> list[str]:
    """What the table says in words."""
    found = [
        f"Intervals: 95%, paired over {results['num_seeds']} fresh seeds (the same windows of bytes for all arms).",
        f"{_verdict(results, 'student_vs_baseline', 'AdamW')} "
        f"{_verdict(results, 'shampoo_student_vs_shampoo_baseline', 'Shampoo')}",
        f"Shampoo alone against AdamW alone: {told_change(change_of(results, 'shampoo_baseline_vs_baseline'))}; MatTA "
        f"with Shampoo against AdamW alone: {told_change(change_of(results, 'shampoo_student_vs_baseline'))}.",
    ]
    for name, label in ((BASELINE, "AdamW"), (SHAMPOO, "Shampoo")):
        room = results["room"][name]
        found.append(
            f"Room: the same Student alone, {room['times_longer']} times as many steps with {label}, has "
            f"{room['mean']:.4f}: {told_change(room)}."
        )
    return found


def _verdict(results: Mapping[str, Any], figure: str, label: str) -> str:
    low, high = change_of(results, figure)["interval"]
    if high < 0:
        return f"With {label} the Student's gain is beyond its interval."
    if low > 0:
        return f"With {label} the Student is worse than the baseline."
    return f"With {label} these seeds cannot tell the Student's change from nothing."


def family_notes(results: Mapping[str, Any]) -> list[str]:
    """Whether the family is in order."""
    rank, by_seed = results["family_rank_correlation"], results["family_rank_correlation_by_seed"]
    ahead = "Every" if results["family_ahead_of_baseline"] else "Not every"
    return [
        f"{ahead} sub-model is ahead of the baseline by more than its interval ({results['family_num_seeds']} seeds).",
        f"Rank correlation of K with fewer bits: {rank:.2f} (by seed: {', '.join(f'{each:.2f}' for each in by_seed)}).",
    ]


def _what_was_run(results: Mapping[str, Any]) -> str:
    """The command, and what it ran."""
    setting = results["setting"]
    student, ta = (GptSize(**setting[name]) for name in ("student", "ta"))
    num_seeds = [len(each["validation_bpb"]) for each in results["tried"][BASELINE]]
    best = f", the best {sum(each > 1 for each in num_seeds)} with {max(num_seeds)} seeds" if max(num_seeds) > 1 else ""
    return (
        f"`matta study language --seeds {results['num_seeds']}`: GPT-2 of Transformers on the bytes of CPython's "
        f"`pydoc_data.topics` ({setting['source']}). Student: {student}; TA: {ta}. {setting['steps']:,} steps of "
        f"{setting['batch']} × {setting['context']} bytes, rates falling to zero; {len(num_seeds)} trials for each arm"
        f"{best}, judged by the Student's bits per byte of a validation part; figures are of a test part."
    )


def draw(results: Mapping[str, Any], path: Path) -> None:
    """Quality against size (the paper's Fig. 5): the Student and every sub-model with their intervals."""
    size = results["arms"][SHAMPOO]["models"][STUDENT]["parameters"]
    points = [
        Point(
            name=name,
            parameters=each.get("parameters", size),
            loss=each["mean"],
            reach=(each["bpb"] - each["interval"][0], each["interval"][1] - each["bpb"]),
        )
        for name, each in [
            (STUDENT, results["family_student"]),
            *((f"K = {each['k']}", each) for each in results["family"]),
        ]
    ]
    baseline = Point(name="baseline alone", parameters=size, loss=results["family_baseline"])
    draw_family(path, "One co-training run: a family of GPT-2s", "bits per byte", points, baseline)
