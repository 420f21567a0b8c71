"""`matta report`: a page to choose a size on, of a run of `matta train`, or of a folder with a table of sizes.

What a folder does not hold (losses, plan, factors, a recipe) is left out of its page.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from matta.choosing.report_page import HeatMap, Points
from matta.lm.choosing_sizes import family_of_run
from matta.lm.command_settings import ReportSettings
from matta.lm.recipe_files import NESTED, is_run, recipe_to_values
from matta.lm.trained_runs import read_run_recipe
from matta.nesting.plan import Plan
from matta.sizes.saving import DESCRIPTION, saved_plans
from matta.training.factors import Factor, load_factors
from matta.training.reporting import recorded
from matta.training.run_evaluation import BEST

REPORT: Final = "report.html"
PICTURES: Final = {"loss/": "loss, nats", "evaluation/": "evaluation"}
"""Which of the values of a run are drawn, by the beginning of their names, and the title of their picture."""

MOST_MAPS: Final = 12


def run(settings: ReportSettings) -> dict[str, Any]:
    """Write the page and name it.

    Raises:
        ChoiceError: the page cannot be written there.
        RunError: the folder has neither a table nor a run's held-out text.
        CheckpointError: the nesting in it is damaged.
    """
    family, table = family_of_run(settings.run, settings.evaluations)
    folder = settings.run if settings.run.is_dir() else table.parent
    recipe = read_run_recipe(folder) if is_run(folder) else None
    curves = _curves(recorded(folder))
    maps = [_heat_map(each) for each in load_factors(folder)[:MOST_MAPS]]
    path = family.report(
        settings.out or folder / REPORT,
        title=f"Family of sizes: {recipe.name if recipe else folder.resolve().name}",
        metric="bits per byte" if recipe else "quality",
        plan=_plan(folder),
        curves=curves,
        heat_maps=maps,
        settings=recipe_to_values(recipe) if recipe else {},
        run=os.fspath(folder) if recipe else "",
    )
    print(f"{path} ({len(family.sizes)} sizes): open it in a browser")
    return {
        "report": str(path),
        "family": str(table),
        "sizes": len(family.sizes),
        "front": [each.name for each in family.pareto()],
        "curves": list(curves),
        "heat_maps": len(maps),
        "bytes": path.stat().st_size,
    }


def _curves(values: Mapping[str, Points]) -> dict[str, dict[str, Points]]:
    found = {
        title: {name.removeprefix(start): points for name, points in values.items() if name.startswith(start)}
        for start, title in PICTURES.items()
    }
    return {title: lines for title, lines in found.items() if lines}


def _plan(folder: Path) -> Plan | None:
    """The nesting of the first Student, where the folder holds one."""
    for each in (folder, folder / BEST, folder / NESTED):
        if (each / DESCRIPTION).is_file():
            return saved_plans(each)[0]
    return None


def _heat_map(factor: Factor) -> HeatMap:
    means = {name.replace("_", " "): value for name, value in factor.means().items()}
    return HeatMap(
        title=f"{factor.layer}, {factor.side} channels",
        values=factor.correlations(),
        num_student=factor.num_student,
        means={f"mean {name}": value for name, value in means.items()},
    )
