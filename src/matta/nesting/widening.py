"""Widen named layers of a module, and everything that they feed.

`matta.nesting.tracing` says which axes belong to the width of a layer: all of them grow. A widened module is never
handed out before it has run on the example and been traced again.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from fnmatch import fnmatchcase
from math import isfinite, prod
from typing import Any, Final

import torch
from torch import Tensor, nn

from matta.errors import GrowthError, TracingError
from matta.nesting.batches import Batch
from matta.nesting.copying import deep_copy
from matta.nesting.dimensions import Part, Trace
from matta.nesting.tracing import trace


def widened(module: nn.Module, widths: Mapping[str, float], example: Batch) -> nn.Module:
    """A copy with other widths, by pattern over the names of layers (factors or numbers of channels).

    Raises:
        GrowthError: as `grow`.
        TracingError: as `grow`.
    """
    before = trace(module, example)
    sizes = _new_sizes(module, before, widths)
    grown = deep_copy(module)
    _resize(grown, {key: _length(parts, sizes) for key, parts in before.axes.items()})
    _mend_plain_norms(grown, {name: _length(parts, sizes) for name, parts in before.outputs.items()})
    after = _prove(grown, example)
    if after.output_shapes != before.output_shapes:
        raise GrowthError(
            f"with widths={dict(widths)} the module returns {_plain(after.output_shapes)} in place of "
            f"{_plain(before.output_shapes)}; leave out the layers that its output comes from"
        )
    for key, parts in before.axes.items():
        expected = [(sizes[part.dimension], part.repeat) for part in parts]
        if [(part.size, part.repeat) for part in after.axes.get(key, ())] != expected:
            raise GrowthError(
                f"with widths={dict(widths)} the channels of axis {key[1]} of {key[0]} meet others than in the "
                f"Student, so a width must be written in the module's code; construct the TA by hand"
            )
    return grown


def _plain(shapes: tuple[torch.Size, ...]) -> str:
    return ", ".join(str(tuple(shape)) for shape in shapes)


def _length(parts: tuple[Part, ...], sizes: list[int]) -> int:
    return sum(sizes[part.dimension] * part.repeat for part in parts)


def _prove(grown: nn.Module, example: Batch) -> Trace:
    try:
        return trace(grown, example)
    except TracingError as error:
        cause = error.__cause__
        raise GrowthError(
            f"the grown module does not run: {type(cause).__name__}: {cause}; where a width is written as a number "
            f"in the module's code, matta cannot change it: construct the TA by hand"
        ) from error


def _new_sizes(module: nn.Module, found: Trace, widths: Mapping[str, float]) -> list[int]:
    """The new size of each dimension."""
    wanted: dict[int, tuple[int, str]] = {}
    layers = dict.fromkeys(name for name, layer in module.named_modules() if name and _is_layer(layer))
    axes = {f"{name}:{axis}": parts for (name, axis), parts in found.axes.items()}
    for pattern, width in widths.items():
        for name in matches("widths", pattern, axes if ":" in pattern else layers, "layer with weights"):
            for dimension, size in _resized(found, pattern, name, width):
                before, who = wanted.setdefault(dimension, (size, name))
                if before != size:
                    raise GrowthError(
                        f"widths= asks for {before} channels through {who!r} and for {size} through {name!r}, "
                        f"which must be as wide as one another: {found.describe(dimension)}; ask for one width"
                    )
    sizes = [wanted.get(i, (dimension.size,))[0] for i, dimension in enumerate(found.dimensions)]
    for i, each in enumerate(found.dimensions):
        if i not in wanted and each.factors:
            sizes[i] = prod(_length(parts, sizes) for parts in each.factors)
    return sizes


def _is_layer(module: nn.Module) -> bool:
    return any(parameter.ndim > 1 for parameter in module.parameters(recurse=False))


def _resized(found: Trace, pattern: str, name: str, width: float) -> Iterator[tuple[int, int]]:
    """The dimensions in the output of a layer, with their new sizes."""
    asked = f"widths={{{pattern!r}: {width!r}}}"
    parameter, _, axis = name.partition(":")
    parts = found.axes.get((parameter, int(axis))) if axis else found.outputs.get(name)
    if not parts:
        raise GrowthError(
            f"{asked}: {name!r} has no output channels to widen; expected a layer that the example passes "
            f"through, with more than one output channel; leave it out, or construct the TA by hand"
        )
    for part in parts:
        _check_free(found, asked, name, part)
    if len(parts) > 1 and all(part.size == 1 for part in parts):
        raise TracingError(
            f"{asked}: the {len(parts)} channels of {name!r} are reordered one by one (a shuffle, a flip), so it "
            f"is ambiguous where new ones would go; construct the TA by hand"
        )
    total = _length(parts, [dimension.size for dimension in found.dimensions])
    for part in parts:
        yield part.dimension, _new_size(asked, name, part.size, total, width)


def _check_free(found: Trace, asked: str, name: str, part: Part) -> None:
    dimension = found.dimensions[part.dimension]
    if dimension.is_output:
        raise GrowthError(
            f"{asked}: the channels of {name!r} are in the module's output, whose shape a TA shares with the "
            f"Student; leave this layer out"
        )
    if dimension.is_input:
        raise GrowthError(
            f"{asked}: the channels of {name!r} meet those of an input of the module, whose width a TA shares "
            f"with the Student; leave this layer out"
        )
    if dimension.problem is not None:
        raise TracingError(
            f"{asked}: it is ambiguous how the {part.size} channels of {name!r} would grow: "
            f"{dimension.problem}; they are those of {found.describe(part.dimension)}; "
            f"leave this layer out, or construct the TA by hand"
        )


def _new_size(asked: str, name: str, size: int, total: int, width: float) -> int:
    if isinstance(width, bool) or not isinstance(width, int | float) or not isfinite(width):
        raise GrowthError(f"{asked}: expected a factor (float) or a number of channels (int)")
    if isinstance(width, float):
        new = round(size * width)
    elif size * width % total:
        raise GrowthError(
            f"{asked}: {name!r} has {total} channels, {size} of which are one part of several; {width} cannot be "
            f"shared out in the same proportion; ask for a multiple of {total}"
        )
    else:
        new = size * width // total
    if new < size:
        hint = f"; write {width}.0 for a factor" if isinstance(width, int) else ""
        raise GrowthError(f"{asked}: {name!r} would shrink from {total} channels; expected at least as many{hint}")
    return new


def _resize(module: nn.Module, lengths: Mapping[tuple[str, int], int]) -> None:
    """Give parameters and buffers new shapes, in place, and mend the sizes that layers note."""
    names = {id(tensor): name for name, tensor in [*module.named_parameters(), *module.named_buffers()]}
    fresh: dict[int, Tensor] = {}
    for layer in list(module.modules()):
        for key, tensor in [*layer._parameters.items(), *layer._buffers.items()]:
            if tensor is None:
                continue
            name = names[id(tensor)]
            shape = [lengths.get((name, axis), size) for axis, size in enumerate(tensor.shape)]
            if shape != list(tensor.shape):
                new = fresh.setdefault(id(tensor), _stretched(layer, name, tensor, shape))
                names[id(new)] = name
                setattr(layer, key, new)
        _mend_sizes(layer)


def _stretched(layer: nn.Module, name: str, tensor: Tensor, shape: list[int]) -> Tensor:
    """A tensor of a new shape, as random as the old one."""
    if not isinstance(tensor, nn.Parameter):
        if not hasattr(layer, "reset_running_stats"):
            raise GrowthError(
                f"the buffer {name} would grow from {tuple(tensor.shape)} to {tuple(shape)}, and matta cannot "
                f"know its new values; construct the TA by hand"
            )
        return tensor.new_zeros(shape)
    new = torch.empty(shape, dtype=tensor.dtype, device=tensor.device)
    as_random_as(new, tensor.detach())
    return nn.Parameter(new, requires_grad=tensor.requires_grad)


def as_random_as(new: Tensor, old: Tensor) -> None:
    """Fill a tensor with normal values of another's mean and deviation."""
    std, mean = torch.std_mean(old.float(), correction=0)
    new.normal_().mul_(std).add_(mean)


_SIZES: Final[dict[str, dict[str, tuple[str, int]]]] = {
    "Linear": {"out_features": ("weight", 0), "in_features": ("weight", 1)},
    "Conv1D": {"nx": ("weight", 0), "nf": ("weight", 1)},
    "Embedding": {"embedding_dim": ("weight", 1)},
    "EmbeddingBag": {"embedding_dim": ("weight", 1)},
    "GroupNorm": {"num_channels": ("weight", 0)},
    "PReLU": {"num_parameters": ("weight", 0)},
    "RNNBase": {"input_size": ("weight_ih_l0", 1), "hidden_size": ("weight_hh_l0", 1)},
    "RNNCellBase": {"input_size": ("weight_ih", 1), "hidden_size": ("weight_hh", 1)},
}
"""Which attribute of a layer notes which axis of which parameter, by class name."""


def _mend_sizes(layer: nn.Module) -> None:
    for kind in type(layer).__mro__:
        for attribute, (key, axis) in _SIZES.get(kind.__name__, {}).items():
            tensor = getattr(layer, key, None)
            if isinstance(tensor, Tensor) and hasattr(layer, attribute):
                setattr(layer, attribute, tensor.shape[axis])
    if isinstance(layer, nn.modules.conv._ConvNd):
        _mend_convolution(layer)
    elif isinstance(layer, nn.LayerNorm | nn.RMSNorm) and layer.weight is not None:
        layer.normalized_shape = tuple(layer.weight.shape)
    elif isinstance(layer, nn.modules.batchnorm._NormBase):
        counted = next((tensor for tensor in (layer.weight, layer.running_mean) if tensor is not None), None)
        layer.num_features = layer.num_features if counted is None else len(counted)


def _mend_plain_norms(module: nn.Module, lengths: Mapping[str, int]) -> None:
    """Norms without weights note their width too."""
    for name, layer in module.named_modules():
        plain = isinstance(layer, nn.LayerNorm | nn.RMSNorm) and layer.weight is None
        if plain and name in lengths and len(layer.normalized_shape) == 1:
            layer.normalized_shape = (lengths[name],)


def _mend_convolution(layer: nn.modules.conv._ConvNd) -> None:
    first, second = layer.weight.shape[:2]
    if layer.groups > 1 and layer.groups == layer.in_channels == layer.out_channels:
        layer.groups = first  # depthwise; other grouped ones do not grow
    if layer.transposed:
        layer.in_channels, layer.out_channels = first, second * layer.groups
    else:
        layer.in_channels, layer.out_channels = second * layer.groups, first


def matches(argument: str, pattern: str, names: Mapping[str, Any], kind: str) -> list[str]:
    """The names that a pattern matches.

    Raises:
        GrowthError: none.
    """
    found = [name for name in names if fnmatchcase(name, pattern)]
    if not found:
        near = get_close_matches(pattern, names, n=5, cutoff=0.5) or list(names)[:12]
        raise GrowthError(
            f"{argument}={{{pattern!r}: ...}} matched no {kind}; the Student has: {', '.join(near) or 'none'}"
        )
    return found
