"""Functions that hold modules: copy.deepcopy leaves functions as they are, so that a copy would call the original."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from types import CellType, FunctionType, MethodType, ModuleType
from typing import Any, Final

from torch import Tensor, nn, optim

OF_MODULES: Final = frozenset({"_parameters", "_buffers", "_modules"})
"""The attributes in which torch keeps what is registered."""
_PLAIN: Final = frozenset((bool, int, float, str, bytes, type(None)))
_CLOSED: Final = (nn.Module, Tensor, type, ModuleType, optim.Optimizer)


def rebind_functions(module: nn.Module, memo: dict[int, Any]) -> None:
    """Let functions among the attributes and hooks of a copy hold the copy's modules and tensors.

    `self.run = lambda x: block.last(block.first(x))` holds `block` in its closure. `memo` is that of the
    copy.deepcopy that made the copy of `module`; parts that were not copied keep their functions.
    """
    held: dict[int, Any] = {id(part): part for part in module.modules()}
    held |= {id(each): each for each in (*module.parameters(), *module.buffers())}
    held = {key: each for key, each in held.items() if memo.get(key, each) is not each}
    made: dict[int, FunctionType] = {}
    for part in [each for each in held.values() if isinstance(each, nn.Module)]:
        for name, value in vars(part).items():
            if name in OF_MODULES:
                continue
            copied = vars(memo[id(part)]).get(name)
            if isinstance(value, FunctionType) and copied is value:
                vars(memo[id(part)])[name] = _rebound(value, held, memo, made)
            elif isinstance(value, dict) and isinstance(copied, dict):
                _rebind_entries(value, copied, lambda each: _rebound(each, held, memo, made))


def holders(module: nn.Module, parts: Iterable[nn.Module]) -> list[str]:
    """The attributes of `module` and its parts that hold any of `parts` in a function or a container, by name."""
    held = {id(part): part for part in parts}
    return [
        ".".join(filter(None, (path, name)))
        for path, part in module.named_modules()
        for name, value in vars(part).items()
        if name not in OF_MODULES and _reaches(value, held, set())
    ]


def keepers(module: nn.Module, tensors: Iterable[Tensor]) -> list[tuple[str, Tensor]]:
    """The attributes that keep one of `tensors` in an object, a container or a function, with that tensor."""
    held = {id(tensor): tensor for tensor in tensors}
    found = []
    for path, part in module.named_modules():
        for name, value in vars(part).items():
            kept = None if name in OF_MODULES else _first_of(value, held)
            if kept is not None:
                found.append((".".join(filter(None, (path, name))), kept))
    return found


def _first_of(value: Any, held: Mapping[int, Tensor]) -> Tensor | None:
    waiting, seen = [value], set[int]()
    while waiting:
        each = waiting.pop()
        if id(each) in held:
            return held[id(each)]
        if type(each) not in _PLAIN and id(each) not in seen and not isinstance(each, _CLOSED):
            seen.add(id(each))
            waiting += iter(_inside(each))  # some classes of sequences have no length
    return None


def _inside(value: Any) -> Iterable[Any]:
    """What a container, a function, a method or an object consists of."""
    if isinstance(value, Mapping):
        return value.values()
    if isinstance(value, (list, tuple, set)):
        return value
    if isinstance(value, FunctionType):
        return [*map(_content, value.__closure__ or ()), value.__defaults__, value.__kwdefaults__]
    if isinstance(value, partial):
        return value.func, value.args, value.keywords
    return (value.__self__,) if isinstance(value, MethodType) else getattr(value, "__dict__", {}).values()


def _reaches(value: Any, held: Mapping[int, Any], seen: set[int]) -> bool:
    if not isinstance(value, FunctionType):
        inside = value.values() if isinstance(value, Mapping) else ()
        return _holds(value, held) or any(_reaches(each, held, seen) for each in inside)
    if id(value) in seen:
        return False
    seen.add(id(value))
    contents = [_content(cell) for cell in value.__closure__ or ()]
    contents += [*(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values()]
    return any(_reaches(each, held, seen) for each in contents)


def _rebind_entries(original: Mapping[Any, Any], copied: dict[Any, Any], rebound: Callable[[Any], Any]) -> None:
    for key, value in original.items():
        if isinstance(value, FunctionType) and copied.get(key) is value:
            copied[key] = rebound(value)


def _rebound(
    function: FunctionType, held: Mapping[int, Any], memo: dict[int, Any], made: dict[int, FunctionType]
) -> FunctionType:
    """The function with the copies of what it holds in its closure and its defaults; itself where it holds none."""
    if id(function) in made:
        return made[id(function)]
    made[id(function)] = function  # it may hold itself
    cells, defaults = function.__closure__ or (), function.__defaults__ or ()
    keywords = function.__kwdefaults__ or {}

    def changed(value: Any) -> Any:
        if isinstance(value, FunctionType):
            return _rebound(value, held, memo, made)
        return copy.deepcopy(value, memo) if _holds(value, held) else value

    contents = [_content(cell) for cell in cells]
    new_contents = [changed(each) for each in contents]
    new_defaults = [changed(each) for each in defaults]
    new_keywords = {key: changed(each) for key, each in keywords.items()}
    before = [*contents, *defaults, *keywords.values()]
    after = [*new_contents, *new_defaults, *new_keywords.values()]
    if all(old is new for old, new in zip(before, after, strict=True)):
        return function
    new_cells = tuple(
        cell if old is new else CellType(new) for cell, old, new in zip(cells, contents, new_contents, strict=True)
    )
    result = FunctionType(function.__code__, function.__globals__, function.__name__, tuple(new_defaults), new_cells)
    result.__kwdefaults__ = new_keywords or None
    result.__qualname__ = function.__qualname__
    result.__dict__.update(function.__dict__)
    made[id(function)] = result
    return result


def _content(cell: CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # a name that has no value yet
        return None


def _holds(value: Any, held: Mapping[int, Any]) -> bool:
    """Whether the value is a part of the module that was copied, or a container or bound method with one."""
    if isinstance(value, (nn.Module, Tensor)):
        return id(value) in held
    inside: Iterable[Any] = ()
    if isinstance(value, Mapping):
        inside = value.values()
    elif isinstance(value, (list, tuple)):
        inside = value
    elif isinstance(value, MethodType):
        inside = (value.__self__,)
    return any(_holds(each, held) for each in inside)
