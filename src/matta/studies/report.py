"""What the relevance study shows: a table for people, markdown, and the picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matta.studies.statistics import Change

# Change of AucLoss in percent, Student and TA (section 4; Tables 1 and 3).
PAPER: Mapping[str, tuple[float, float | None]] = {
    "matta": (-4.63, -5.92),
    "unshared": (-8.27, -9.16),
    "shampoo_baseline": (-3.89, None),
    "shampoo_matta": (-8.05, -9.47),
}
COLUMNS = ("arm", "model", "AucLoss", "change [95%]", "paper", "real")


def paper_figure(arm: str, model: str) -> str:
    """The paper's change for an arm's Student or TA, or a dash."""
    value = dict(zip(("Student", "TA"), PAPER.get(arm, (None, None)), strict=True))[model]
    return "–" if value is None else f"{value:+.2f}%"


def table_rows(rows: Sequence[Mapping[str, Any]]) -> list[tuple[str, ...]]:
    """The cells of the table of arms."""
    found: list[tuple[str, ...]] = []
    for row in rows:
        change: Change | None = row["change"]
        cells = (
            str(row["title"]),
            str(row["model"]),
            f"{row['aucloss']:.5f}",
            "–" if change is None else str(change),
            paper_figure(row["arm"], row["model"]),
            f"{row['real_aucloss']:.4f}",
        )
        found.append(cells)
    return found


FAMILY_COLUMNS = ("sub-model", "parameters", "ms", "AucLoss", "real")


def family_rows(family: Sequence[Mapping[str, Any]]) -> list[tuple[str, ...]]:
    """The cells of the table of extracted sub-models."""
    return [
        (
            each["name"],
            f"{each['parameters']:,}",
            f"{each['latency_ms']:.3f}",
            f"{each['aucloss']:.5f}",
            f"{each['real_aucloss']:.4f}",
        )
        for each in family
    ]


def draw_family(family: Sequence[Mapping[str, Any]], baseline: Mapping[str, float], path: Path) -> None:
    """Quality against size: every extracted sub-model, the baseline marked."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 4.5), layout="constrained")
    axes = figure.subplots()
    axes.scatter([each["parameters"] for each in family], [each["aucloss"] for each in family], color="#1f77b4", s=36)
    for index, each in enumerate(family):  # in turn above and below, since neighbours differ little
        place, offset = (each["parameters"], each["aucloss"]), (4, 6) if index % 2 else (4, -12)
        axes.annotate(each["name"], place, xytext=offset, textcoords="offset points", fontsize=8)
    axes.scatter([baseline["parameters"]], [baseline["aucloss"]], marker="*", s=170, color="#d62728", zorder=3)
    place = (baseline["parameters"], baseline["aucloss"])
    axes.annotate("baseline", place, xytext=(8, -12), textcoords="offset points", fontsize=9, color="#d62728")
    axes.set(
        xlabel="parameters",
        ylabel="AucLoss (less is better)",
        title="One co-training run: a family of rankers",
    )
    axes.grid(alpha=0.3)
    axes.margins(x=0.18)
    figure.savefig(path, dpi=150)
