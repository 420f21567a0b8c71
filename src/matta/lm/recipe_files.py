"""Recipes on disk: a TOML file whose values the command line may replace, and the copy that a run's folder keeps."""

from __future__ import annotations

import dataclasses
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from matta.errors import DAMAGE, RunError, first_line
from matta.lm.recipe import Recipe
from matta.lm.typed_tables import Value, part_of

RECIPE: Final = "recipe.json"  # in the folder of a run
NESTED: Final = "nested"  # the folder of the trained pair in it

EXCLUSIVE: Final = (
    ("train.steps", "train.tokens"),
    ("model.architecture", "model.pretrained"),
    ("data.train.path", "data.train.hub"),
    ("data.evaluate.path", "data.evaluate.hub"),
)
"""Keys of one table, of which one is given: replacing the one drops the other."""


def read_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe in a TOML file (its ending may be left out), with values replaced as in "train.steps=100".

    Values are written as in TOML; a string needs no quotes.

    Raises:
        RunError: no such file, or it is no TOML; a key that there is not, a value of another type or out of range.
    """
    file = _find(path)
    try:
        values = tomllib.loads(file.read_text(encoding="utf-8"))
    except DAMAGE as error:
        raise RunError(f"{file} is not TOML: {first_line(error)}") from None
    for override in overrides:
        _replace(values, override)
    values.setdefault("name", file.stem)
    return recipe_from_values(values, str(file))


def recipe_from_values(values: Mapping[str, Value], source: str) -> Recipe:
    """A recipe from its tables, as TOML or JSON give them; `source` is named in errors.

    Raises:
        RunError: a key that there is not, one that is missing, a value of another type or out of range.
    """
    try:
        recipe = part_of(Recipe, values, "")
    except RunError as error:
        raise RunError(f"{source}: {error}") from None
    assert isinstance(recipe, Recipe)
    return recipe


def recipe_to_values(recipe: Recipe) -> dict[str, Value]:
    """All values of a recipe, defaults included, from which `recipe_from_values` makes it again."""
    return _without_none(dataclasses.asdict(recipe))


def is_run(path: Path) -> bool:
    """Whether a folder is one of `matta train`."""
    return (path / RECIPE).is_file()


def _without_none(values: Mapping[str, Value]) -> dict[str, Value]:
    found: dict[str, Value] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            found[key] = _without_none(value)
        elif value is not None:
            found[key] = list(value) if isinstance(value, tuple) else value
    return found


def _find(path: Path) -> Path:
    for file in (path, Path(f"{path}.toml")):
        if file.is_file():
            return file
    known = sorted(file.stem for file in path.parent.glob("*.toml")) if path.parent.is_dir() else []
    there = f"{path.parent} has: {', '.join(known)}" if known else "expected the path of a TOML file"
    raise RunError(f"there is no recipe {path}; {there}")


def _replace(values: dict[str, Value], override: str) -> None:
    """Put the value of "a.b=value" in its place."""
    key, equals, text = override.partition("=")
    if not equals or not all(key.split(".")):
        raise RunError(f"received {override!r}; expected KEY=VALUE, such as train.steps=100")
    *tables, last = key.split(".")
    node = values
    for name in tables:
        if isinstance(node.get(name), str):
            node[name] = {"path": node[name]}  # a source, written short
        node = node.setdefault(name, {})
        if not isinstance(node, dict):
            raise RunError(f"{override}: {name} is not a table, but {node!r}; replace it as a whole")
    for other in next((group for group in EXCLUSIVE if key in group), ()):
        node.pop(other.rpartition(".")[2], None)
    node[last] = _read_value(text)


def _read_value(text: str) -> Value:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except DAMAGE:
        return text
