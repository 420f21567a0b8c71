"""A larger module of the Student's own classes, for those who do not construct the TA themselves.

A Transformers model is constructed again from its configuration with some values changed. Any other
module is widened layer by layer: `matta.nesting.tracing` says which axes belong to the width of a named
layer, and all of them grow, those of the layers that it feeds included. A grown module is never
handed out before it has run on the example and been traced again.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from difflib import get_close_matches
from typing import Any

import torch
from torch import nn

from matta.errors import GrowthError
from matta.nesting.batches import Batch, call, split_labels
from matta.nesting.copying import deep_copy
from matta.nesting.widening import as_random_as, matches, widened

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
    for argument, changes in (("config", config), ("widths", widths), ("layers", layers)):
        if changes is not None and not isinstance(changes, Mapping):
            raise GrowthError(f"{argument}={changes!r}; expected a mapping from names to new values")
    if widths and example is None:
        raise GrowthError("widths= needs an example batch, to find what the layers feed; pass example=")
    grown = deep_copy(student)
    if config:
        grown = reconfigured(student, config)
        _check_larger(student, grown, config)
    if layers:
        _deepen(grown, layers)
    if widths and example is not None:
        grown = widened(grown, widths, example)
    if not config or widths or layers:
        _initialise(grown)
    if init is not None:
        grown.apply(init)
    if example is not None and not widths:
        _run(grown.eval(), example)
    return grown.train(student.training)


# --- from a configuration -----------------------------------------------------------------------


def reconfigured(student: nn.Module, changes: Mapping[str, Any]) -> nn.Module:
    """A Transformers model of another configuration, with fresh weights, larger or smaller.

    Raises:
        GrowthError: the module has no configuration, or a value is none of it, or cannot be constructed.
    """
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
        for name in matches("layers", pattern, stacks, "ModuleList or Sequential of equal blocks"):
            stack = stacks[name]
            if isinstance(count, bool) or not isinstance(count, int) or count < len(stack):
                raise GrowthError(
                    f"layers={{{pattern!r}: {count!r}}}: {name!r} has {len(stack)} blocks; "
                    f"expected a whole number of at least as many"
                )
            stack.extend(deep_copy(stack[-1]) for _ in range(count - len(stack)))


def _stacks(module: nn.Module) -> Iterator[tuple[str, Any]]:
    for name, child in module.named_modules():
        if isinstance(child, nn.ModuleList | nn.Sequential) and len(child):
            kinds = {(type(block), _shapes(block)) for block in child}
            if len(kinds) == 1 and _shapes(child[0]):
                yield name, child


def _shapes(module: nn.Module) -> tuple[tuple[str, torch.Size], ...]:
    return tuple((name, parameter.shape) for name, parameter in module.named_parameters())


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
            as_random_as(parameter, parameter.clone())
