"""A larger module of the Student's own classes, for those who do not construct the TA themselves.

A Transformers model is constructed again from its configuration with some values changed. Any other
module is widened layer by layer: `matta.tracing` says which axes belong to the width of a named
layer, and all of them grow, those of the layers that it feeds included. A grown module is never
handed out before it has run on the example and been traced again.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import Any, Final

import torch
from torch import Tensor, nn

from matta.batches import Batch, call, split_labels
from matta.errors import GrowthError, TracingError
from matta.tracing import Part, Trace, trace

Initialise = Callable[[nn.Module], Any]


def grow(
    student: nn.Module,
    config: Mapping[str, Any] | None = None,
    *,
    widths: Mapping[str, float] | None = None,
    layers: Mapping[str, int] | None = None,
    example: Batch | None = None,
    init: Initialise | None = None,
) -> nn.Module:
    """A Teaching Assistant: a larger module of the Student's classes, with fresh weights.

    - `config` (Transformers models): values to change in a copy of the Student's configuration;
      values that the configuration derives from them are derived again.
    - `widths`: new widths of layers by pattern over module names, a factor (float) or a number of
      output channels (int). What a layer feeds or is added to grows with it. An axis of a parameter
      can be named as "name:axis", for parameters that stand in no layer of their own. Needs an
      `example` batch, labels optional.
    - `layers`: new numbers of blocks in a ModuleList or Sequential of equal blocks, by pattern.
    - `init`: applied to each module of the result in the end (as `nn.Module.apply` does), for weights
      other than those of the layers' own `reset_parameters`, or where a layer has none, normal ones
      of the Student's mean and deviation.

    The Student is left as it was. Device, dtype and training mode are the Student's. Nest the two
    with `layouts=matta.trace_layouts(student, ta, example)`. A Transformers model that is widened by
    name no longer fits its configuration: prefer `config`.

    Raises:
        GrowthError: nothing to change, a name that matches nothing, a value that would shrink the
            module, a width that an input or the output fixes, two widths for the same dimension, or
            a grown module that does not run on the example.
        TracingError: it is ambiguous how a layer would grow (a reshape into heads, a shuffle, a
            grouped convolution), or the Student does not run on the example.

    Example:
        >>> student = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
        >>> grow(student, widths={"0": 2.0}, example=(torch.zeros(1, 3), None))
        Sequential(
          (0): Linear(in_features=3, out_features=8, bias=True)
          (1): ReLU()
          (2): Linear(in_features=8, out_features=2, bias=True)
        )
    """
    if not config and not widths and not layers:
        raise GrowthError("received nothing to grow; expected config=, widths= or layers= with an entry")
    if widths and example is None:
        raise GrowthError("widths= needs an example batch, to find what the layers feed; pass example=")
    grown = _reconfigured(student, config) if config else copy.deepcopy(student)
    if layers:
        _deepen(grown, layers)
    if widths and example is not None:
        grown = _widened(grown, widths, example)
    if not config or widths or layers:
        _initialise(grown)
    if init is not None:
        grown.apply(init)
    if example is not None and not widths:
        _run(grown.eval(), example)
    return grown.train(student.training)


# --- from a configuration -----------------------------------------------------------------------


def _reconfigured(student: nn.Module, changes: Mapping[str, Any]) -> nn.Module:
    config = getattr(student, "config", None)
    if not hasattr(config, "to_dict"):
        raise GrowthError(
            f"config= changes the configuration of a Transformers model; {type(student).__name__} has none; "
            f"use widths= and layers= with an example"
        )
    _check_keys(config, changes)
    try:
        grown = type(student)(_changed(config, changes))
    except Exception as error:
        raise GrowthError(
            f"{type(student).__name__} cannot be constructed with {dict(changes)}: {error}; change the values, "
            f"or construct the TA by hand"
        ) from error
    _check_larger(student, grown, changes)
    first = next(student.parameters())
    return grown.to(device=first.device, dtype=first.dtype)


def _check_keys(config: Any, changes: Mapping[str, Any]) -> None:
    known = sorted({*config.to_dict(), *getattr(config, "attribute_map", {})})
    for key in changes:
        if key not in known:
            near = get_close_matches(key, known, n=3, cutoff=0.5) or known
            raise GrowthError(
                f"config={{{key!r}: ...}}: {type(config).__name__} has no such value; did you mean {', '.join(near)}?"
            )


def _changed(config: Any, changes: Mapping[str, Any]) -> Any:
    """The configuration with changes, in which what it derives from changed values follows them.

    A value is derived, or the default, where the same configuration results without giving it.
    """
    values = {key: value for key, value in config.to_dict().items() if key != "transformers_version"}
    aliases = getattr(config, "attribute_map", {})
    changes = {aliases.get(key, key): value for key, value in changes.items()}
    given = {key: value for key, value in values.items() if key in changes or not _derives(config, values, key)}
    if type(config)(**given).to_dict() != type(config)(**values).to_dict():
        given = values
    kernel = getattr(config, "_attn_implementation", None)
    extra = {} if kernel is None else {"attn_implementation": kernel}
    return type(config)(**copy.deepcopy({**given, **changes}), **extra)


def _derives(config: Any, values: Mapping[str, Any], key: str) -> bool:
    rest = {name: value for name, value in values.items() if name != key}
    try:
        return bool(type(config)(**rest).to_dict() == type(config)(**values).to_dict())
    except Exception:  # the value is required
        return False


def _check_larger(student: nn.Module, grown: nn.Module, changes: Mapping[str, Any]) -> None:
    shapes = {name: parameter.shape for name, parameter in grown.named_parameters()}
    for name, parameter in student.named_parameters():
        shape = shapes.get(name)
        if shape is None or len(shape) != parameter.ndim:
            raise GrowthError(
                f"with {dict(changes)} the module has no {name} of {parameter.ndim} axes, as the Student has; "
                f"a TA holds all of the Student's layers: only raise numbers"
            )
        if any(new < old for new, old in zip(shape, parameter.shape, strict=True)):
            raise GrowthError(
                f"with {dict(changes)} {name} shrinks from {tuple(parameter.shape)} to {tuple(shape)}; "
                f"a TA is at least as large as the Student on every axis: only raise numbers"
            )


# --- more blocks ----------------------------------------------------------------------------------


def _deepen(module: nn.Module, layers: Mapping[str, int]) -> None:
    """Append blocks to stacks of blocks, in place."""
    if hasattr(getattr(module, "config", None), "to_dict"):
        raise GrowthError(
            f"layers= would leave {type(module).__name__} at odds with its configuration; "
            f"raise its number of layers with config="
        )
    stacks = dict(_stacks(module))
    for pattern, count in layers.items():
        for name in _matches("layers", pattern, stacks, "ModuleList or Sequential of equal blocks"):
            stack = stacks[name]
            if isinstance(count, bool) or not isinstance(count, int) or count < len(stack):
                raise GrowthError(
                    f"layers={{{pattern!r}: {count!r}}}: {name!r} has {len(stack)} blocks; "
                    f"expected a whole number of at least as many"
                )
            stack.extend(copy.deepcopy(stack[-1]) for _ in range(count - len(stack)))


def _stacks(module: nn.Module) -> Iterator[tuple[str, Any]]:
    for name, child in module.named_modules():
        if isinstance(child, nn.ModuleList | nn.Sequential) and len(child):
            kinds = {(type(block), _shapes(block)) for block in child}
            if len(kinds) == 1 and _shapes(child[0]):
                yield name, child


def _shapes(module: nn.Module) -> tuple[tuple[str, torch.Size], ...]:
    return tuple((name, parameter.shape) for name, parameter in module.named_parameters())


def _matches(argument: str, pattern: str, names: Mapping[str, Any], kind: str) -> list[str]:
    found = [name for name in names if fnmatchcase(name, pattern)]
    if not found:
        near = get_close_matches(pattern, names, n=5, cutoff=0.5) or list(names)[:12]
        raise GrowthError(
            f"{argument}={{{pattern!r}: ...}} matched no {kind}; the Student has: {', '.join(near) or 'none'}"
        )
    return found


# --- wider layers ---------------------------------------------------------------------------------


def _widened(module: nn.Module, widths: Mapping[str, float], example: Batch) -> nn.Module:
    before = trace(module, example)
    sizes = _new_sizes(module, before, widths)
    grown = copy.deepcopy(module)
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


@torch.no_grad()
def _run(grown: nn.Module, example: Batch) -> None:
    inputs, _ = split_labels(example)
    try:
        call(grown, inputs)
    except Exception as error:
        raise GrowthError(
            f"the grown module does not run on the example: {type(error).__name__}: {error}; if the Student does, "
            f"construct the TA by hand"
        ) from error


def _new_sizes(module: nn.Module, found: Trace, widths: Mapping[str, float]) -> list[int]:
    """The new size of each dimension."""
    wanted: dict[int, tuple[int, str]] = {}
    layers = dict.fromkeys(name for name, layer in module.named_modules() if name and _is_layer(layer))
    axes = {f"{name}:{axis}": parts for (name, axis), parts in found.axes.items()}
    for pattern, width in widths.items():
        for name in _matches("widths", pattern, axes if ":" in pattern else layers, "layer with weights"):
            for dimension, size in _resized(found, pattern, name, width):
                before, who = wanted.setdefault(dimension, (size, name))
                if before != size:
                    raise GrowthError(
                        f"widths= asks for {before} channels through {who!r} and for {size} through {name!r}, "
                        f"which must be as wide as one another: {found.describe(dimension)}; ask for one width"
                    )
    return [wanted.get(i, (dimension.size,))[0] for i, dimension in enumerate(found.dimensions)]


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
    if isinstance(width, bool) or not isinstance(width, int | float):
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
    _as_random_as(new, tensor.detach())
    return nn.Parameter(new, requires_grad=tensor.requires_grad)


def _as_random_as(new: Tensor, old: Tensor) -> None:
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


# --- fresh weights --------------------------------------------------------------------------------


@torch.no_grad()
def _initialise(module: nn.Module) -> None:
    """Fresh weights; tied ones by the first layer that has them."""
    done: set[int] = set()
    for layer in module.modules():
        own = list(layer.parameters(recurse=False))
        kept = [(parameter, parameter.clone()) for parameter in own if id(parameter) in done]
        _reset(layer, own)
        for parameter, value in kept:
            parameter.copy_(value)
        done.update(map(id, own))
    initialise: Any = getattr(module, "_init_weights", None)  # Transformers
    if callable(initialise):
        module.apply(initialise)


def _reset(layer: nn.Module, own: list[nn.Parameter]) -> None:
    """Fresh weights by the layer's own reset, or else as random as those that it has."""
    reset = getattr(layer, "reset_parameters", getattr(layer, "_reset_parameters", None))
    if callable(reset):
        reset()
    else:
        for parameter in own:
            _as_random_as(parameter, parameter.clone())
