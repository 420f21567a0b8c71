"""The picture of a run's Shampoo factors, as in the paper's Fig. 4."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matta.training.factors import Factor, load_factor
from matta_studies.study_settings import PreconditionerSettings


def run(settings: PreconditionerSettings) -> dict[str, Any]:
    """Draw a layer's factor as in Fig. 4, and give the mean correlations of its three kinds of pairs.

    Raises:
        RunError: the run holds no such factor.
    """
    factor = load_factor(settings.run, settings.layer, settings.side)
    out = settings.out or settings.run / f"preconditioner-{factor.layer}-{factor.side}.png"
    draw(factor, out)
    means = factor.means()
    print(f"{factor.layer}, {factor.side} channels: {factor.num_student} of the Student, {len(factor.moments)} in all")
    for name, value in means.items():
        print(f"  mean |L_ij| / sqrt(L_ii L_jj) {name.replace('_', ' '):15} {value:.4f}")
    print(f"drawn in {out}")
    finite = {name: value if value == value else None for name, value in means.items()}
    return {"layer": factor.layer, "side": factor.side, "picture": str(out), **finite}


def draw(factor: Factor, out: Path) -> None:
    """The heat map, with the Student's edge marked."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.2, 4.4), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(factor.correlations().numpy(), vmin=0, vmax=1, cmap="magma")
    edge = factor.num_student - 0.5
    axes.axhline(edge, color="white", linewidth=0.8)
    axes.axvline(edge, color="white", linewidth=0.8)
    axes.set_title(f"{factor.layer}: {factor.side} channels, the Student's {factor.num_student} first", fontsize=9)
    figure.colorbar(image, label="|L_ij| / sqrt(L_ii L_jj)")
    figure.savefig(out, dpi=150)
