"""What the language study shows: tables for people, markdown, and the picture of the family (the paper's Fig. 5)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from rich.console import Console

from matta.studies.languagemodel import GptSize
from matta.texttables import markdown_table, rich_table

COLUMNS: Final = ("arm", "model", "parameters", "bits per byte", "change against the baseline, same optimizer", "%")
FAMILY_COLUMNS: Final = ("sub-model", "parameters", "bits per byte", "change against the baseline", "%")
PLACE_COLUMNS: Final = ("Student's blocks", "Student", "change", "TA", "change")
FIGURE_OF: Final[Mapping[tuple[str, str], str]] = {
    ("matta", "Student"): "student_vs_baseline",
    ("matta", "TA"): "ta_vs_baseline",
    ("shampoo_matta", "Student"): "shampoo_student_vs_shampoo_baseline",
    ("shampoo_matta", "TA"): "shampoo_ta_vs_shampoo_baseline",
}


def told(change: Mapping[str, Any]) -> str:
    """A difference in bits per byte with its interval."""
    low, high = change["interval"]
    return f"{change['bpb']:+.4f} [{low:+.4f}, {high:+.4f}]"


def change_of(results: Mapping[str, Any], figure: str) -> dict[str, Any]:
    """A comparison of the results."""
    return {key: results[f"{figure}_{key}"] for key in ("bpb", "interval", "percent", "percent_interval")}


def rows(results: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """The cells of the table of arms."""
    found: list[tuple[str, ...]] = []
    for arm, each in results["arms"].items():
        for model, bits in each["models"].items():
            figure = FIGURE_OF.get((arm, model))
            change = None if figure is None else change_of(results, figure)
            cells = ("–", "–") if change is None else (told(change), f"{change['percent']:+.2f}%")
            found.append((each["title"], model, f"{bits['parameters']:,}", f"{bits['mean']:.4f}", *cells))
    return found


def family_rows(results: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """The cells of the table of sub-models, after the baseline and the Student."""
    student, baseline = results["arms"]["shampoo_baseline"]["models"]["Student"], results["family_baseline"]
    size = f"{student['parameters']:,}"
    found: list[tuple[str, ...]] = [("baseline alone", size, f"{baseline:.4f}", "–", "–")]
    named = [("Student", size, results["family_student"])]
    last = len(results["family"]) - 1
    for each in results["family"]:
        name = f"K = {each['k']}" + (" (TA)" if each["k"] == last else "")
        named.append((name, f"{each['parameters']:,}", each))
    found += [(name, size, f"{each['mean']:.4f}", told(each), f"{each['percent']:+.2f}%") for name, size, each in named]
    return found


def place_rows(results: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """The cells of the table of places in depth."""
    return [
        (
            place,
            f"{each['Student']['mean']:.4f}",
            told(each["Student"]),
            f"{each['TA']['mean']:.4f}",
            told(each["TA"]),
        )
        for place, each in results["places"].items()
    ]


def notes(results: Mapping[str, Any]) -> list[str]:
    """What the table says in words."""
    found = [
        f"Intervals: 95%, paired over {results['num_seeds']} fresh seeds (the same windows of bytes for all arms).",
        f"{_verdict(results, 'student_vs_baseline', 'AdamW')} "
        f"{_verdict(results, 'shampoo_student_vs_shampoo_baseline', 'Shampoo')}",
        f"Shampoo alone against AdamW alone: {told(change_of(results, 'shampoo_baseline_vs_baseline'))}; MatTA with "
        f"Shampoo against AdamW alone: {told(change_of(results, 'shampoo_student_vs_baseline'))}.",
    ]
    for name, label in (("baseline", "AdamW"), ("shampoo_baseline", "Shampoo")):
        room = results["room"][name]
        found.append(
            f"Room: the same Student alone, {room['times_longer']} times as many steps with {label}, has "
            f"{room['mean']:.4f}: {told(room)}."
        )
    return found


def _verdict(results: Mapping[str, Any], figure: str, label: str) -> str:
    change = change_of(results, figure)
    low, high = change["interval"]
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


def markdown(results: Mapping[str, Any]) -> str:
    """The tables as they stand in the documentation."""
    chosen = [(each["title"], each["chosen"]["told"]) for each in results["arms"].values()]
    parts = [
        "## Language models: bits per byte",
        _setting(results),
        markdown_table(COLUMNS, rows(results)),
        "\n".join(f"- {note}" for note in notes(results)),
        markdown_table(("arm", "settings, chosen on the validation part"), chosen),
        "### Where the Student sits in depth",
        f"MatTA with Shampoo, against the baseline with Shampoo; {results['places_num_seeds']} fresh seeds.",
        markdown_table(PLACE_COLUMNS, place_rows(results)),
        "### The family (Fig. 5)",
        "MatTA with Shampoo once more, with one of the sub-models K = 0 … N−1 trained along at each step "
        "(`CoTraining(sample=...)`); the baseline is the one with Shampoo. K = 0 has all the TA's blocks, each of the "
        "Student's width.",
        markdown_table(FAMILY_COLUMNS, family_rows(results)),
        "\n".join(f"- {note}" for note in family_notes(results)),
        "![Bits per byte against parameters of the Student and every sub-model, the baseline marked](language.png)",
    ]
    return "\n\n".join(parts) + "\n"


def _setting(results: Mapping[str, Any]) -> str:
    """The command, and what it ran."""
    setting = results["setting"]
    student, ta = (GptSize(**setting[name]) for name in ("student", "ta"))
    tried = [each["validation_bpb"] for each in results["tried"]["baseline"]]
    num_seeds = [len(each) for each in tried]
    best = f", the best {sum(each > 1 for each in num_seeds)} with {max(num_seeds)} seeds" if max(num_seeds) > 1 else ""
    return (
        f"`matta study language --seeds {results['num_seeds']}`: GPT-2 of Transformers on the bytes of CPython's "
        f"`pydoc_data.topics` ({setting['source']}). Student: {student}; TA: {ta}. {setting['steps']:,} steps of "
        f"{setting['batch']} × {setting['context']} bytes, rates falling to zero; {len(tried)} trials for each arm"
        f"{best}, judged by the Student's bits per byte of a validation part; figures are of a test part."
    )


def print_report(results: Mapping[str, Any], console: Console) -> None:
    """The same for the terminal."""
    console.print(rich_table("Bits per byte of held-out text (less is better)", COLUMNS, rows(results)))
    for note in notes(results):
        console.print(note, highlight=False)
    console.print(rich_table("Where the Student sits in depth (Shampoo)", PLACE_COLUMNS, place_rows(results)))
    console.print(rich_table("One run, every size (Shampoo)", FAMILY_COLUMNS, family_rows(results)))
    for note in family_notes(results):
        console.print(note, highlight=False)


def draw_family(results: Mapping[str, Any], path: Path) -> None:
    """Quality against size: the Student and every sub-model with their intervals, the baseline marked."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 4.5), layout="constrained")
    axes = figure.subplots()
    baseline = results["arms"]["shampoo_baseline"]["models"]["Student"]
    family: Sequence[Mapping[str, Any]] = results["family"]
    sizes = [each["parameters"] for each in family]
    axes.errorbar(
        sizes, [each["mean"] for each in family], yerr=_reaches(family), marker="o", capsize=3, color="#1f77b4"
    )
    for each in family:
        place = (each["parameters"], each["mean"])
        axes.annotate(f"K = {each['k']}", place, xytext=(6, 6), textcoords="offset points", fontsize=8)
    student = results["family_student"]
    place = (baseline["parameters"], student["mean"])
    axes.errorbar(*place, yerr=_reaches([student]), marker="s", capsize=3, color="#2ca02c")
    axes.annotate("Student", place, xytext=(7, -3), textcoords="offset points", fontsize=8, color="#2ca02c")
    place = (baseline["parameters"], results["family_baseline"])
    axes.scatter([place[0]], [place[1]], marker="*", s=170, color="#d62728", zorder=3)
    axes.annotate("baseline alone", place, xytext=(10, -3), textcoords="offset points", fontsize=9, color="#d62728")
    axes.set(
        xlabel="parameters",
        ylabel="bits per byte (less is better)",
        title="One co-training run: a family of GPT-2s",
    )
    axes.grid(alpha=0.3)
    axes.margins(x=0.1, y=0.15)
    figure.savefig(path, dpi=150)


def _reaches(family: Sequence[Mapping[str, Any]]) -> list[list[float]]:
    """How far the interval of each change reaches down and up."""
    return [
        [each["bpb"] - each["interval"][0] for each in family],
        [each["interval"][1] - each["bpb"] for each in family],
    ]
