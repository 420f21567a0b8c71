"""Modules that cannot be nested whatever their sizes, and what to do about each."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from matta.errors import NestingError
from matta.nesting.closures import OF_MODULES
from matta.nesting.copying import contents, deep_copy, graph_tensors
from matta.nesting.plan import Placement
from matta.nesting.slicing import is_live
from matta.nesting.sparse_tables import is_sparse_table

_RECOMPUTING = (WeightNorm, SpectralNorm, BasePruningMethod)


def require_nestable(module: Any, role: str) -> None:
    """Refuse what has no parameters of its own that slices could replace.

    Raises:
        NestingError: `module` is no module, is compiled or scripted, is live, or is lazy and has
            not been run yet.
    """
    if not isinstance(module, nn.Module):
        raise NestingError(f"the {role} is {type(module).__name__}; expected a torch.nn.Module")
    for reason in _reasons(module):
        raise NestingError(f"the {role} cannot be nested: {reason}")


def _reasons(module: nn.Module) -> Iterator[str]:
    registered = set(module.modules())
    for path, part in module.named_modules():
        where = f"its {path}" if path else "it"
        if isinstance(part, torch.jit.ScriptModule):
            yield f"{where} is a ScriptModule; expected plain modules: nest first, and script what is extracted"
        if type(part).__name__ == "OptimizedModule":
            yield f"{where} is compiled; expected plain modules: nest first, then torch.compile the CoTraining"
        if is_live(part):
            yield (
                f"{where} is live, its weights are slices of another module's; expected a module of its own: "
                f"matta.extract it first, or nest several Students in one TA with matta.nest([...], ta)"
            )
        yield from _hidden_weights(path or type(part).__name__, part, registered)
    for path, name, tensor in graph_tensors(module):
        if not _is_recomputed(module.get_submodule(path), name):
            yield (
                f"{path or type(module).__name__} keeps a tensor with a graph in {name!r}, {tuple(tensor.shape)}, "
                f"which copies cannot follow; expected parameters: compute it in forward, or detach it and nest again"
            )
    for name, tensor in chain(module.named_parameters(), module.named_buffers()):
        if is_lazy(tensor):
            yield f"{name} has no shape yet; expected sizes: run the lazy module on a batch once, then nest"


def _hidden_weights(path: str, part: nn.Module, registered: Collection[nn.Module]) -> Iterator[str]:
    """Weights that are no parameters of a module: packed integers, or layers that torch does not see."""
    for name, value in [*vars(part).items(), *part._buffers.items()]:
        packed = isinstance(value, torch.ScriptObject)
        integers = isinstance(value, Tensor) and "weight" in name and not value.is_floating_point()
        if packed or (integers and not value.is_complex()):
            yield (
                f"{path} ({type(part).__name__}) is quantised, its weights are in {name!r} and do not train; expected "
                f"parameters of a floating type: nest first, and quantise what is extracted"
            )
        inside = () if name in OF_MODULES or isinstance(value, nn.Module) else contents(value)
        if any(_is_layer(each) and each not in registered for each in inside):
            yield (
                f"{path} keeps layers in {name!r}, a {type(value).__name__}, where torch does not see their parameters"
                f"; expected modules that train: keep them in an nn.ModuleList or nn.ModuleDict"
            )


def _is_layer(value: Any) -> bool:
    """Whether it has weights; on the meta device it is a pattern that torch.func.functional_call fills."""
    return isinstance(value, nn.Module) and any(not each.is_meta for each in value.parameters())


def _is_recomputed(part: nn.Module, name: str) -> bool:
    """Whether a hook computes the attribute in each forward: pruning, weight and spectral norm of the older kind."""
    hooks = part._forward_pre_hooks.values()
    return any(isinstance(each, _RECOMPUTING) and _name_of(each) == name for each in hooks)


def _name_of(hook: Any) -> str:
    return str(getattr(hook, "name", None) or getattr(hook, "_tensor_name", ""))


def require_copies(module: nn.Module, role: str) -> None:
    """Refuse a module of which sub-models and extracted models cannot be copied; no weight is copied to find out.

    Raises:
        NestingError: with what copy.deepcopy says.
    """
    kept = {id(tensor): tensor for tensor in chain(module.parameters(), module.buffers())}
    try:
        deep_copy(module, dict(kept))
    except NestingError as error:
        raise NestingError(f"the {role} cannot be nested: {error}") from error.__cause__


def require_real_buffers(student: nn.Module, ta: nn.Module) -> None:
    """Refuse a Student on the meta device whose buffers nobody has values for.

    Raises:
        NestingError: with the first such buffer, unless the TA is on the meta device as well.
    """
    if all(parameter.is_meta for parameter in ta.parameters()):
        return
    for name, buffer in student.named_buffers():
        if buffer.is_meta:
            raise NestingError(
                f"the Student's buffer {name} is on the meta device and has no values; expected real buffers, which "
                f"each model keeps for itself; build the Student on a real device"
            )


def refuse_renormalised_tables(student: nn.Module, placement: Placement) -> None:
    """Refuse a table with sparse gradients whose rows are scaled in place as they are looked up.

    Raises:
        NestingError: with the embedding, and the arguments to change.
    """
    owner = student.get_submodule(placement.student.rpartition(".")[0])
    if placement.grows and is_sparse_table(owner) and owner.max_norm is not None:
        raise NestingError(
            f"{placement.student} has sparse gradients and max_norm={owner.max_norm}, which scales in place what is a "
            f"slice of the TA; expected one of the two: build the Student with sparse=False or max_norm=None, or keep "
            f"it apart with private=[{placement.student!r}]"
        )
