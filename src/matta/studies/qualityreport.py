"""What the quality study shows: a table for people, markdown, and the picture over time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from rich.console import Console

from matta.studies.report import markdown_table, rich_table
from matta.studies.statistics import Change

# Change of AucLoss in percent, by the figure's name here (section 4; Table 3).
PAPER: Final[Mapping[str, float]] = {
    "matta_student_vs_baseline": -0.25,
    "matta_ta_vs_baseline": -0.32,
    "shampoo_vs_baseline": -0.28,
    "student_vs_baseline": -0.60,
    "ta_vs_baseline": -0.81,
}
FIGURES: Final[Mapping[tuple[str, str], str]] = {
    ("matta", "Student"): "matta_student_vs_baseline",
    ("matta", "TA"): "matta_ta_vs_baseline",
    ("shampoo", "Student"): "shampoo_vs_baseline",
    ("matta_shampoo", "Student"): "student_vs_baseline",
    ("matta_shampoo", "TA"): "ta_vs_baseline",
}
COLUMNS: Final = ("arm", "model", "AucLoss", "change against the baseline", "paper")
DRAWN: Final[Mapping[tuple[str, str], str]] = {
    ("shampoo", "Student"): "Shampoo alone",
    ("matta_shampoo", "Student"): "Student, MatTA with Shampoo",
    ("matta_shampoo", "TA"): "its TA",
}
SMOOTHED_WEEKS = 4


def change_of(results: Mapping[str, Any], figure: str) -> Change:
    """A figure of the results with its interval."""
    low, high = results[f"{figure}_interval"]
    return Change(percent=results[f"{figure}_percent"], low=low, high=high)


def rows(results: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """The cells of the table of arms."""
    found: list[tuple[str, ...]] = []
    for arm, models in results["aucloss"].items():
        for model, losses in models.items():
            figure = FIGURES.get((arm, model))
            change = "–" if figure is None else str(change_of(results, figure))
            paper = "–" if figure is None else f"{PAPER[figure]:+.2f}%"
            found.append((results["titles"][arm], model, f"{losses['mean']:.4f}", change, paper))
    return found


def notes(results: Mapping[str, Any]) -> list[str]:
    """What the table says in words."""
    together = results["student_vs_baseline_percent"]
    added = results["shampoo_vs_baseline_percent"] + results["matta_student_vs_baseline_percent"]
    verdict = "more than the sum" if together < added else "no more than the sum"
    found = [
        f"MatTA with Shampoo against Shampoo alone: Student {change_of(results, 'student_vs_shampoo')}, "
        f"TA {change_of(results, 'ta_vs_shampoo')}.",
        f"Shampoo alone and MatTA alone add up to {added:+.2f}% for the Student; together they give {together:+.2f}%: "
        f"{verdict} (the paper: −0.53 and −0.60).",
    ]
    first_order = change_of(results, "matta_student_vs_baseline")
    if not first_order.high < 0:
        found.append(f"Without Shampoo the Student's change of {first_order} is no gain; the paper has −0.25%.")
    warm_up = results["setting"]["warm_up"]
    rates = f"after a warm-up of {warm_up} steps" if warm_up else "from the first step on"
    found.append(f"Rates are constant {rates}. Intervals: 95%, paired over {results['num_seeds']} fresh seeds.")
    return found


def markdown(results: Mapping[str, Any]) -> str:
    """The tables as they stand in the documentation."""
    chosen = [(title, results["chosen"][arm]["told"]) for arm, title in results["titles"].items()]
    parts = [
        markdown_table(COLUMNS, rows(results)),
        "\n".join(f"- {note}" for note in notes(results)),
        markdown_table(("arm", "settings, chosen on the first quarter"), chosen),
    ]
    return "\n\n".join(parts) + "\n"


def print_report(results: Mapping[str, Any], console: Console) -> None:
    """The same for the terminal."""
    console.print(rich_table("Progressive AucLoss of the last three quarters", COLUMNS, rows(results)))
    for note in notes(results):
        console.print(note, highlight=False)


def smoothed(values: Sequence[float], width: int) -> list[float]:
    """The mean of each value and the `width` - 1 before it.

    Example:
        >>> smoothed([1.0, 3.0, 5.0], width=2)
        [1.0, 2.0, 4.0]
    """
    windows = [values[max(0, end - width) : end] for end in range(1, len(values) + 1)]
    return [sum(window) / len(window) for window in windows]


def draw_weeks(by_week: Mapping[str, Mapping[str, Sequence[float]]], path: Path) -> None:
    """AucLoss over time: the baseline's, and how far the others lie from it."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    baseline = by_week["baseline"]["Student"]
    figure, (upper, lower) = pyplot.subplots(2, 1, figsize=(8, 6), sharex=True, layout="constrained")
    weeks = range(1, len(baseline) + 1)
    upper.plot(weeks, baseline, color="#7f7f7f", label="baseline")
    for arm, model in (("matta_shampoo", "Student"), ("matta_shampoo", "TA")):
        upper.plot(weeks, by_week[arm][model], linewidth=1, label=DRAWN[arm, model])
    for (arm, model), label in DRAWN.items():
        changes = [100 * (value / other - 1) for value, other in zip(by_week[arm][model], baseline, strict=True)]
        lower.plot(weeks, smoothed(changes, SMOOTHED_WEEKS), label=label)
    lower.axhline(0.0, color="#7f7f7f", linewidth=1)
    upper.set(ylabel="AucLoss of the week", title="Each flight is predicted before it is learned from")
    lower.set(xlabel="week of the stream", ylabel=f"change against the baseline, %\n(mean of {SMOOTHED_WEEKS} weeks)")
    for axes in (upper, lower):
        axes.axvline(len(baseline) / 4, color="#bbbbbb", linestyle=":")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
