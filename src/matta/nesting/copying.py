"""Copies of modules: with other parameters, without FSDP2, and without what a forward left behind."""

from __future__ import annotations

import copy
import pickle
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Final, TypeVar

import torch
from torch import Tensor, nn

from matta.errors import NestingError
from matta.nesting.closures import OF_MODULES, rebind_functions

_Module = TypeVar("_Module", bound=nn.Module)
FOLLOWS: Final = "_follows_fsdp"  # marks what gathers sharded parameters before it reads them; see `sharded_slices`
_PLAIN: Final = frozenset((bool, int, float, str, type(None)))
_COMPRESSED: Final = (torch.sparse_csr, torch.sparse_csc, torch.sparse_bsr, torch.sparse_bsc)  # copy.deepcopy fails
_OF_FSDP: Final = ("_is_fsdp_managed_module", "_fsdp_use_orig_params", FOLLOWS)  # attributes under FSDP2 alone


def copy_module(module: nn.Module, parameters: Mapping[str, nn.Parameter]) -> nn.Module:
    """A copy of `module` with buffers of its own and the given parameters, tied as in `module`.

    Parameters that are not named stay the very same objects; no weight is copied, so a module of
    any size, also on the meta device, is copied at once.
    """
    named = dict(module.named_parameters(remove_duplicate=False))
    memo: dict[int, Any] = {id(parameter): parameter for parameter in named.values()}
    memo |= {id(named[name]): parameter for name, parameter in parameters.items()}
    return deep_copy(module, memo)


def deep_copy(module: _Module, memo: dict[int, Any] | None = None) -> _Module:
    """What copy.deepcopy gives, with tensors that a forward left among the attributes cut off from their graph.

    Functions among the attributes that hold modules, in closures or defaults, hold those of the copy.
    A module that FSDP2 has sharded is copied without FSDP, with whole parameters: all processes must call this.

    Raises:
        NestingError: the module holds something that cannot be copied.
    """
    memo = dict(memo or {})
    try:
        with _without_fsdp(module, memo):
            cut = {id(tensor): tensor.detach().clone() for _, _, tensor in graph_tensors(module)}
            cut |= {id(each): each.detach().clone() for each in module.buffers() if each.layout in _COMPRESSED}
            memo = {**cut, **memo}
            made = copy.deepcopy(module, memo)
            rebind_functions(module, memo)
            return made
    except (RuntimeError, TypeError, NotImplementedError, pickle.PicklingError) as error:
        raise NestingError(
            f"{type(module).__name__} cannot be copied by copy.deepcopy: {error}; expected attributes that can be "
            f"copied: keep locks, generators, files and tensors with a graph out of the module, or give the class that "
            f"holds them a __deepcopy__"
        ) from error


@contextmanager
def _without_fsdp(module: nn.Module, memo: dict[int, Any]) -> Iterator[None]:
    """Within it FSDP2's modules are as before it: of the user's class, without its hooks, with whole parameters."""
    held: list[Any] = [each for part in module.modules() for each in part._parameters.values()]
    for parameter in held:
        if hasattr(parameter, "full_tensor") and id(parameter) not in memo:
            whole = parameter.detach().full_tensor()
            memo[id(parameter)] = nn.Parameter(whole, requires_grad=parameter.requires_grad)
    kept = [(part, part.__class__, dict(part.__dict__)) for part in module.modules()]
    try:
        for part, kind, attributes in kept:
            part.__class__ = kind.__mro__[2] if is_unit(part) else kind
            for name, value in attributes.items():
                if name in _OF_FSDP or (name == "forward" and hasattr(value, FOLLOWS)):
                    del part.__dict__[name]
                elif isinstance(value, OrderedDict) and any(map(_is_of_fsdp, value.values())):
                    part.__dict__[name] = OrderedDict((k, v) for k, v in value.items() if not _is_of_fsdp(v))
        yield
    finally:
        for part, kind, attributes in kept:
            part.__class__ = kind
            part.__dict__.update(attributes)


def is_unit(module: nn.Module) -> bool:
    """Whether FSDP2 gathers what is in the module together: `fully_shard(module)` was called."""
    return hasattr(module, "set_requires_gradient_sync")  # an FSDPModule, whose import takes half a second


def _is_of_fsdp(hook: Any) -> bool:
    return str(getattr(getattr(hook, "hook", hook), "__module__", "")).startswith("torch.distributed.fsdp")


def graph_tensors(module: nn.Module) -> Iterator[tuple[str, str, Tensor]]:
    """Tensors with a graph among the attributes of modules, also inside containers: path, attribute, tensor."""
    seen: set[int] = set()
    for path, part in module.named_modules():
        for name, value in vars(part).items():
            if name != "_modules":
                yield from ((path, name, tensor) for tensor in _tensors_in(value, seen) if tensor.grad_fn is not None)


def attribute_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Tensors of numbers that modules keep as plain attributes or in lists, with names as buffers have them.

    Copies made with copy.deepcopy have them under the same names.
    """
    for path, part in module.named_modules():
        for name, value in vars(part).items():
            if name in OF_MODULES:
                continue
            several = isinstance(value, tuple | list)
            for i, each in enumerate(value if several else [value]):
                is_number = isinstance(each, Tensor) and (each.is_floating_point() or each.is_complex())
                if is_number and not isinstance(each, nn.Parameter):
                    yield ".".join([*filter(None, [path]), name, *([str(i)] if several else [])]), each


def contents(value: Any, seen: set[int] | None = None) -> Iterator[Any]:
    """What lists, tuples and mappings hold, at any depth.

    Example:
        >>> list(contents([[1], {"a": (2, 3)}]))
        [1, 2, 3]
    """
    seen = set() if seen is None else seen
    inside = value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else ()
    if id(value) not in seen:
        seen.add(id(value))
        for each in inside:
            if isinstance(each, list | tuple | Mapping) and not isinstance(each, nn.Module):
                yield from contents(each, seen)
            else:
                yield each


def holds_same(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors of one shape hold the same values; sparse ones, which torch.equal does not take, as well."""
    if torch.strided in (one.layout, other.layout):
        return one.layout == other.layout and torch.equal(one, other)
    entries = [each.to_sparse_coo().coalesce() for each in (one, other)]
    pairs = zip(*((each.indices(), each.values()) for each in entries), strict=True)
    return all(first.shape == second.shape and torch.equal(first, second) for first, second in pairs)


def _tensors_in(value: Any, seen: set[int]) -> Iterator[Tensor]:
    if type(value) in _PLAIN or id(value) in seen or isinstance(value, (nn.Module, type)):
        return
    seen.add(id(value))
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for each in value.values():
            yield from _tensors_in(each, seen)
    elif isinstance(value, (list, tuple, set)):
        for each in value:
            yield from _tensors_in(each, seen)
    elif hasattr(value, "__dict__") and not callable(value):
        yield from _tensors_in(vars(value), seen)
