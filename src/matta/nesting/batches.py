"""What a batch is, and how a module is called on one.

A batch is a mapping, whose `labels` are the target while the rest goes to the module as keyword
arguments, or a pair (inputs, labels) with inputs a tensor or a tuple of positional arguments.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from matta.errors import LabelError

LOGITS = "logits"
Batch = Mapping[str, Any] | tuple[Any, Any] | list[Any]


def split_labels(batch: Batch) -> tuple[Any, Any]:
    """The inputs and the labels of a batch; labels are None where a mapping has none.

    Raises:
        LabelError: the batch is neither a mapping nor a pair.

    Example:
        >>> split_labels({"x": 1, "labels": 2})
        ({'x': 1}, 2)
    """
    if isinstance(batch, Mapping):
        return {name: value for name, value in batch.items() if name != "labels"}, batch.get("labels")
    if isinstance(batch, tuple | list) and len(batch) == 2:
        return batch[0], batch[1]
    size = f" of {len(batch)}" if isinstance(batch, tuple | list) else ""
    raise LabelError(
        f"received a batch of type {type(batch).__name__}{size}; expected a mapping with 'labels', "
        f"or a pair (inputs, labels) with inputs a tensor or a tuple of tensors; inputs alone are (inputs, None)"
    )


def call(module: nn.Module, inputs: Any) -> Any:
    """What `module` returns on the inputs of a batch."""
    if isinstance(inputs, Mapping):
        return module(**inputs)
    if isinstance(inputs, tuple | list):
        return module(*inputs)
    return module(inputs)


def map_tensors(value: Any, change: Callable[[Tensor], Any]) -> Any:
    """Changes every tensor in tuples, lists and mappings.

    Example:
        >>> import torch
        >>> map_tensors({"x": (torch.ones(2), "told")}, lambda tensor: 2 * tensor)
        {'x': (tensor([2., 2.]), 'told')}
    """
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, Mapping):
        return {name: map_tensors(each, change) for name, each in value.items()}
    if isinstance(value, tuple | list):
        parts = [map_tensors(each, change) for each in value]
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    return value


def tensors_of(value: Any) -> list[Tensor]:
    """All tensors in tuples, lists and mappings, in order."""
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, tuple | list):  # a PackedSequence too, which cannot be made of other things
        return [tensor for each in value for tensor in tensors_of(each)]
    return [value] if isinstance(value, Tensor) else []


def tensor_names(inputs: Any) -> list[str]:
    """Names for the tensors of the inputs, in order: those of a mapping, else `input_0` and so on.

    What a mapping holds beside tensors (flags, None) has no name.

    Example:
        >>> import torch
        >>> tensor_names({"x": torch.ones(1), "flag": True}), tensor_names((torch.ones(1),))
        (['x'], ['input_0'])
    """
    if isinstance(inputs, Mapping) and all(
        isinstance(each, Tensor) or not tensors_of(each) for each in inputs.values()
    ):
        return [name for name, each in inputs.items() if isinstance(each, Tensor)]
    return [f"input_{index}" for index, _ in enumerate(tensors_of(inputs))]


@contextmanager
def eval_mode(*modules: nn.Module) -> Iterator[None]:
    """Modules in eval mode for a while; each of their parts then has its own mode again.

    What `torch.export` has written has no modes, and says so where it is asked.
    """
    modes = {part: part.training for module in modules for part in module.modules()}
    try:
        for module in modules:
            with suppress(NotImplementedError):
                module.eval()
        yield
    finally:
        for part, mode in modes.items():
            part.training = mode


def outputs_of(output: Any) -> list[Tensor]:
    """The logits in what a module returned; where it has none, all tensors of numbers in it.

    Objects, such as a dataclass or a distribution, are looked into where there is nothing besides: a cache of keys and
    values beside a hidden state is no output.

    Example:
        >>> import torch
        >>> outputs_of({"loss": None, "prediction": (torch.ones(1), torch.ones(1, dtype=torch.long))})
        [tensor([1.])]
    """
    logits = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
    found = output if logits is None else logits
    return list(filter(_is_of_numbers, tree_leaves(found))) or list(filter(_is_of_numbers, _leaves(found, set())))


def _is_of_numbers(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and (leaf.is_floating_point() or leaf.is_complex())


def _leaves(value: Any, seen: set[int]) -> Iterator[Any]:
    """The leaves of containers and of objects, which torch takes for leaves themselves."""
    for leaf in tree_leaves(value):
        inside = {} if isinstance(leaf, Tensor | nn.Module | type) else getattr(leaf, "__dict__", {})
        if not inside:
            yield leaf
        elif id(leaf) not in seen:
            seen.add(id(leaf))
            yield from _leaves(list(inside.values()), seen)


def relative_difference(expected: Tensor, found: Tensor) -> float:
    """The largest difference of two outputs of one shape, relative to the largest finite value of the first.

    Infinities that both have, such as the logits of what must not be chosen, are no difference.

    Example:
        >>> import torch
        >>> relative_difference(torch.tensor([2.0, -torch.inf]), torch.tensor([1.0, -torch.inf]))
        0.5
    """
    if not expected.numel():
        return 0.0
    wide = torch.complex128 if expected.is_complex() else torch.float64
    one, other = expected.detach().to(wide), found.detach().to(wide)
    error = float((one - other).abs().masked_fill(one == other, 0.0).max())
    scale = float(one.abs().masked_fill(one.isinf(), 0.0).max())
    return error / max(scale, 1e-12) if error == error else float("inf")


def has_logits(output: Any) -> bool:
    """Whether a module returned logits: a tensor, or an object or mapping with `logits`."""
    named = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
    return isinstance(output, Tensor) or named is not None


def logits_of(output: Any, where: str | Callable[[Any], Any] | None = None, names: Iterable[str] | None = None) -> Any:
    """The logits in what a module returned: a tensor, or an object or mapping with `logits`.

    Args:
        output: What the module returned.
        where: The name of the field that holds them, or a function of the output; None: as above.
        names: Those of several outputs, each a field of its own; the logits are a mapping then.

    Raises:
        LabelError: there are none.

    Example:
        >>> import torch
        >>> logits_of({"prediction_logits": torch.ones(1)}, "prediction_logits")
        tensor([1.])
    """
    if where is not None and not isinstance(where, str):
        return where(output)
    if names is not None:
        return {name: logits_of(output, name) for name in names}
    if where is None and isinstance(output, Tensor):
        return output
    name = where or "logits"
    logits = output.get(name) if isinstance(output, Mapping) else getattr(output, name, None)
    if isinstance(logits, Tensor):
        return logits
    fields = [str(each) for each, value in _fields_of(output).items() if isinstance(value, Tensor)]
    raise LabelError(
        f"the module returned {type(output).__name__} without {name}; its tensors are: {', '.join(fields) or 'none'}; "
        f"expected a tensor of logits, or an object with .logits; say where they are by logits=..., the name of a "
        f"field or a function of the output, or wrap the module in one that returns its logits"
    )


def outputs_by_name(output: Any, where: str | Callable[[Any], Any] | None = None) -> dict[str, Tensor]:
    """The logits in what a module returned, by name: `logits`, or what a mapping without them holds.

    Args:
        output: What the module returned.
        where: As in `logits_of`; a function may give a mapping.

    Raises:
        LabelError: there are none.

    Example:
        >>> import torch
        >>> outputs_by_name({"click": torch.ones(1), "minutes": torch.zeros(1)})
        {'click': tensor([1.]), 'minutes': tensor([0.])}
    """
    if where is None and isinstance(output, Mapping) and not has_logits(output):
        found: Any = {str(name): value for name, value in output.items() if isinstance(value, Tensor)}
    else:
        found = None
    found = found or logits_of(output, where)
    return dict(found) if isinstance(found, Mapping) else {LOGITS: found}


def _fields_of(output: Any) -> Mapping[str, Any]:
    if isinstance(output, Mapping):
        return output
    if type(output) in (tuple, list):
        return {str(index): each for index, each in enumerate(output)}
    return output._asdict() if hasattr(output, "_asdict") else getattr(output, "__dict__", {})
