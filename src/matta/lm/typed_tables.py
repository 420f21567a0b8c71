"""Dataclasses from tables of TOML or JSON, with every key and type checked. Standard library alone."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from types import NoneType, UnionType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from matta.errors import RunError

Value = Any  # of TOML: a string, number, truth value, list or table


def part_of(kind: type[Any], values: Value, path: str) -> Any:
    """A dataclass from a table. One with `short_for` may be a string, which stands for that field.

    Raises:
        RunError: a key that there is not, one that is missing, a value of another type; or what the dataclass raises.
    """
    if isinstance(values, str) and hasattr(kind, "short_for"):
        values = {kind.short_for: values}
    if not isinstance(values, Mapping):
        raise RunError(f"{path} = {values!r}: expected a table")
    hints = get_type_hints(kind)
    for key in values:
        if key not in hints:
            raise RunError(f"there is no {_join(path, key)}; {_nearest(key, list(hints), path)}")
    found = {key: _typed(hints[key], value, _join(path, key)) for key, value in values.items()}
    missing = [each.name for each in dataclasses.fields(kind) if each.name not in found and _is_required(each)]
    if missing:
        raise RunError(f"{_join(path, missing[0])} is missing; {_expected(hints[missing[0]])}")
    try:
        return kind(**found)
    except RunError as error:
        raise RunError(f"{path}: {error}") from None


def _is_required(each: dataclasses.Field[Any]) -> bool:
    return each.default is dataclasses.MISSING and each.default_factory is dataclasses.MISSING


def _join(path: str, key: str) -> str:
    return f"{path}.{key}" if path else key


def _nearest(key: str, known: list[str], path: str) -> str:
    near = get_close_matches(key, known, n=1, cutoff=0.5)
    if near:
        return f"did you mean {_join(path, near[0])}?"
    return f"{path or 'a recipe'} has: {', '.join(known)}"


def _typed(hint: Any, value: Value, path: str) -> Any:
    """A value of the type that a field has."""
    kinds = list(_kinds(hint))
    for kind in kinds:
        if dataclasses.is_dataclass(kind):
            return part_of(kind, value, path)  # type: ignore[arg-type]
        found = _fitted(kind, value)
        if found is not None:
            return found
    raise RunError(f"{path} = {value!r}: {_expected(hint)}")


def _kinds(hint: Any) -> Iterator[Any]:
    yield from (each for each in get_args(hint) if each is not NoneType) if isinstance(hint, UnionType) else (hint,)


def _fitted(kind: Any, value: Value) -> Any:
    """The value as that type, or None where it is none of it."""
    origin = get_origin(kind)
    if origin is Literal:
        return value if value in get_args(kind) else None
    if origin is tuple:
        return _tuple(get_args(kind), value)
    if origin is Mapping:
        return dict(value) if isinstance(value, Mapping) else None
    if kind is Any:
        return value
    if kind is float and type(value) in (int, float) and math.isfinite(value):
        return float(value)
    if kind is int and type(value) is float and value.is_integer():
        return int(value)  # 1e11
    return value if type(value) is kind and kind is not float else None


def _tuple(kinds: tuple[Any, ...], value: Value) -> tuple[Any, ...] | None:
    if not isinstance(value, list | tuple) or (kinds[-1] is not Ellipsis and len(value) != len(kinds)):
        return None
    fitted = tuple(_fitted(kinds[0], each) for each in value)
    return None if None in fitted else fitted


def _expected(hint: Any) -> str:
    return f"expected {' or '.join(_name(kind) for kind in _kinds(hint))}"


def _name(kind: Any) -> str:
    """A type in words."""
    if get_origin(kind) is Literal:
        return " or ".join(map(repr, get_args(kind)))
    if get_origin(kind) is tuple:
        kinds = get_args(kind)
        count = "" if kinds[-1] is Ellipsis else f" of {len(kinds)}"
        return f"a list{count}, each {_name(kinds[0])}"
    if hasattr(kind, "short_for"):
        return f"a string ({kind.short_for}) or a table"
    names = {str: "a string", int: "a whole number", float: "a number", bool: "true or false"}
    return names.get(kind, "a table")
