"""How a study is told: tables, notes and paragraphs, in the terminal and in markdown; and its pictures."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, final

from rich.console import Console

from matta.training.reporting import markdown_table, rich_table
from matta_studies.intervals import change_of
from matta_studies.trials import BASELINE

COLORS: Final = {"Student": "#1f77b4", "TA": "#ff7f0e", "shampoo": "#2ca02c", "baseline": "#d62728", "plain": "#7f7f7f"}
SMOOTHED: Final = 4  # periods


@final
@dataclass(frozen=True, kw_only=True)
class Table:
    """A table; without a title it is left out in the terminal."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    title: str = ""


@final
@dataclass(frozen=True)
class Notes:
    """What a table says in words."""

    lines: Sequence[str]


Part = Table | Notes | str
"""A part of a report; a paragraph of markdown is left out in the terminal."""


def arm_table(
    title: str,
    results: Mapping[str, Any],
    compared: Mapping[str, tuple[str, str, str]],
    paper: Mapping[str, float],
    *,
    digits: int,
    more: Mapping[str, str] | None = None,
) -> Table:
    """A row for each model of each arm: its AucLoss, and the change against the baseline, ours and the paper's.

    Args:
        title: See `Table`.
        results: See `Found.summary`.
        compared: By a figure's name: (arm, model), and the arm whose Student it is compared with.
        paper: By a figure's name: the paper's change in percent.
        digits: Of AucLoss.
        more: Further columns, and which of the results they show.
    """
    name_of = {(arm, model): name for name, (arm, model, reference) in compared.items() if reference == BASELINE}
    rows = []
    for arm, models in results["aucloss"].items():
        for model, losses in models.items():
            figure = name_of.get((arm, model))
            change = str(change_of(results, figure)) if figure else "–"
            row = [
                results["titles"][arm],
                model,
                f"{losses['mean']:.{digits}f}",
                change,
                paper_figure(paper.get(figure or "")),
            ]
            rows.append([*row, *(f"{results[each][arm][model]['mean']:.4f}" for each in (more or {}).values())])
    return Table(title=title, columns=("arm", "model", "AucLoss", "change [95%]", "paper", *(more or {})), rows=rows)


def chosen_table(results: Mapping[str, Any], told: str) -> Table:
    """The trial of each arm; `told` says how it was chosen."""
    return Table(
        columns=("arm", told), rows=[(results["titles"][arm], each["told"]) for arm, each in results["chosen"].items()]
    )


def paper_figure(percent: float | None) -> str:
    """A change that the paper gives, or a dash."""
    return "–" if percent is None else f"{percent:+.2f}%"


def told_machine(found: Mapping[str, str | int]) -> str:
    """What `machine` gives, in words."""
    return f"Python {found['python']}, torch {found['torch']}, {found['cores']} cores ({found['processor']})"


def markdown(parts: Sequence[Part]) -> str:
    """A section of the documentation."""
    return "\n\n".join(_markdown(part) for part in parts) + "\n"


def _markdown(part: Part) -> str:
    if isinstance(part, Table):
        return markdown_table(part.columns, part.rows)
    return part if isinstance(part, str) else "\n".join(f"- {line}" for line in part.lines)


def show(parts: Sequence[Part], console: Console) -> None:
    """Print a section to the terminal."""
    for part in parts:
        if isinstance(part, Notes):
            for line in part.lines:
                console.print(line, highlight=False)
        elif isinstance(part, Table) and part.title:
            rows = [[cell.strip("*") for cell in row] for row in part.rows]
            console.print(rich_table(part.title, part.columns, rows))


def report(results: Mapping[str, Any], parts: Sequence[Part], folder: Path, console: Console) -> None:
    """Write the figures of a study for machines and for people, and show them."""
    (folder / "results.json").write_text(json.dumps(results, indent=1, allow_nan=False), encoding="utf-8")
    (folder / "results.md").write_text(markdown(parts), encoding="utf-8")
    show(parts, console)


@contextmanager
def canvas(path: Path, size: tuple[float, float], rows: int = 1, columns: int = 1) -> Iterator[Sequence[Any]]:
    """The axes of a picture, which is written to `path` in the end."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(rows, columns, sharex=rows > 1, squeeze=False).flatten().tolist()
    yield axes
    for each in axes:
        each.grid(alpha=0.3)
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=150)


@final
@dataclass(frozen=True, kw_only=True)
class Point:
    """A model in the picture of a family; `reach` is how far its interval reaches down and up."""

    name: str
    parameters: int
    loss: float
    reach: tuple[float, float] = (0.0, 0.0)


def draw_family(path: Path, title: str, unit: str, points: Sequence[Point], baseline: Point) -> None:
    """Quality against size: every sub-model, the baseline marked."""
    with canvas(path, (7.5, 4.5)) as (axes,):
        sizes, losses = [each.parameters for each in points], [each.loss for each in points]
        reaches = list(zip(*(each.reach for each in points), strict=True))
        axes.errorbar(sizes, losses, yerr=reaches, fmt="o", capsize=3, color=COLORS["Student"])
        axes.scatter([baseline.parameters], [baseline.loss], marker="*", s=170, color=COLORS["baseline"], zorder=3)
        for index, each in enumerate([*points, baseline]):  # in turn above and below, since neighbours differ little
            offset = (6, 6) if index % 2 else (6, -12)
            axes.annotate(
                each.name, (each.parameters, each.loss), xytext=offset, textcoords="offset points", fontsize=8
            )
        axes.set(xlabel="parameters", ylabel=f"{unit} (less is better)", title=title)
        axes.margins(x=0.18, y=0.15)


@final
@dataclass(frozen=True, kw_only=True)
class Line:
    """A model in the picture over time: its loss by period."""

    label: str
    color: str
    losses: Sequence[float]
    only_change: bool = False


def draw_periods(path: Path, title: str, period: str, baseline: Line, lines: Sequence[Line]) -> None:
    """AucLoss over time: the baseline's, and how far the others lie from it."""
    with canvas(path, (8, 6), rows=2) as (upper, lower):
        periods = range(1, len(baseline.losses) + 1)
        for each in (baseline, *lines):
            if not each.only_change:
                upper.plot(periods, each.losses, linewidth=1, label=each.label, color=each.color)
        for each in lines:
            changes = [100 * (value / other - 1) for value, other in zip(each.losses, baseline.losses, strict=True)]
            lower.plot(periods, smoothed(changes, SMOOTHED), label=each.label, color=each.color)
        lower.axhline(0.0, color=COLORS["plain"], linewidth=1)
        upper.set(ylabel=f"AucLoss of {period}", title=title)
        change = f"change against the baseline, %\n(mean of {SMOOTHED} steps)"
        lower.set(xlabel=f"stream, in steps of {period}", ylabel=change)
        for axes in (upper, lower):
            axes.axvline(len(baseline.losses) / 4, color="#bbbbbb", linestyle=":")
            axes.legend(fontsize=8)


def smoothed(values: Sequence[float], width: int) -> list[float]:
    """The mean of each value and the `width` - 1 before it.

    Example:
        >>> smoothed([1.0, 3.0, 5.0], width=2)
        [1.0, 2.0, 4.0]
    """
    windows = [values[max(0, end - width) : end] for end in range(1, len(values) + 1)]
    return [sum(window) / len(window) for window in windows]


def draw_changes(axes: Any, title: str, rows: Sequence[tuple[str, Mapping[str, Any] | None]]) -> None:
    """Changes of Student and TA with their intervals, a row for each name; a name without changes is a heading."""
    for model, shift, marker in (("Student", -0.15, "o"), ("TA", 0.15, "s")):
        found = [(place, each[model]) for place, (_, each) in enumerate(rows) if each and model in each]
        percents = [change["percent"] for _, change in found]
        low, high = ([change["interval"][end] for _, change in found] for end in (0, 1))
        reaches = [
            [percent - end for percent, end in zip(percents, low, strict=True)],
            [end - percent for percent, end in zip(percents, high, strict=True)],
        ]
        places = [place + shift for place, _ in found]
        axes.errorbar(percents, places, xerr=reaches, fmt=marker, color=COLORS[model], markersize=4, label=model)
    axes.axvline(0.0, color=COLORS["plain"], linewidth=1)
    axes.set_yticks(range(len(rows)), [name for name, _ in rows], fontsize=8)
    for tick, (_, changes) in zip(axes.get_yticklabels(), rows, strict=True):
        tick.set_fontweight("normal" if changes is not None else "bold")
    axes.set_ylim(len(rows) - 0.5, -0.7)
    axes.set(xlabel="change of AucLoss against a Student trained alone, % (95%)", title=title)
    axes.legend(fontsize=8)
