"""What a resumed run of `matta train` may do differently, and a longer one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from matta.choosing.family import FILE
from matta.errors import RunError
from matta.lm.recipe import Recipe
from matta.lm.recipe_files import NESTED, recipe_to_values
from matta.lm.run_report import REPORT
from matta.lm.trained_runs import MODELS, RESULTS

MAY_CHANGE: Final = (
    "train.checkpoint_every",
    "train.evaluate_every",
    "train.sharding",
    "train.activation_checkpointing",
    "data.evaluate",
    "data.evaluate_bytes",
    "data.cache",
    "family.k",
)
"""What a resumed run may do differently."""

_LENGTH: Final = ("train.steps", "train.tokens")


def require_same(recipe: Recipe, begun: Recipe, path: Path) -> None:
    """Refuse to resume a run with another recipe; it may be longer where its steps so far would have been the same.

    Raises:
        RunError: a value differs that makes another run.
    """
    now, before = (dict(_flat(recipe_to_values(each), "")) for each in (recipe, begun))
    for key in sorted((now.keys() | before.keys()) - {"name", *_LENGTH}):
        if now.get(key) != before.get(key) and not key.startswith(MAY_CHANGE):
            raise RunError(
                f"the run in {path} was begun with {key} = {before.get(key)!r}, and now it is {now.get(key)!r}; "
                f"expected the same: leave the change out, or begin a new run with another --out"
            )
    _require_length(recipe, begun, path)


def _require_length(recipe: Recipe, begun: Recipe, path: Path) -> None:
    steps, before = _num_steps(recipe), _num_steps(begun)
    if steps < before:
        raise RunError(
            f"the run in {path} was begun with {before:,} steps, and now it is to have {steps:,}; expected as many or "
            f"more: leave the change out, or begin a new run with another --out"
        )
    if steps > before and not can_be_prolonged(recipe):
        what = f"a {recipe.train.schedule} schedule" if recipe.train.schedule != "constant" else "turns"
        raise RunError(
            f"the run in {path} was begun with {before:,} steps and {what} made for them, so that one of {steps:,} "
            f"would have gone otherwise; expected as many (train.schedule=constant can be prolonged): begin a new run "
            f"with another --out, or one from its models with model.pretrained={path / MODELS / 'student'}"
        )


def can_be_prolonged(recipe: Recipe) -> bool:
    """Whether no step of a run hangs on how many there are to be."""
    turns = recipe.train.turns
    return recipe.train.schedule == "constant" and (turns is None or turns.alone == 0)


def put_end_aside(recipe: Recipe, begun: Recipe, path: Path) -> None:
    """Before a run that has ended is made longer: what it had come to, in a folder `ended-<steps>` of its own."""
    before = _num_steps(begun)
    there = [path / name for name in (MODELS, RESULTS, FILE, REPORT, NESTED) if (path / name).exists()]
    if _num_steps(recipe) == before or not (path / NESTED).exists():
        return
    aside = path / f"ended-{before}"
    aside.mkdir(exist_ok=True)
    for each in there:
        each.rename(aside / each.name)


def _num_steps(recipe: Recipe) -> int:
    return recipe.train.num_steps(recipe.data.context)


def _flat(values: dict[str, Any], path: str) -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{path}{key}.")
        else:
            yield f"{path}{key}", value
