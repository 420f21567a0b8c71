"""How far an exported file is from its module, also on batches and lengths that it was not traced with."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final, final

import torch
from torch import Tensor

from matta.choosing.measuring import num_examples, resized
from matta.errors import ExportError
from matta.nesting.batches import map_tensors, relative_difference, tensors_of

SMALLEST_BATCH: Final = 2  # a traced batch of one would be taken for a constant
OTHER_BATCH: Final = 3  # added to the example's, to compare with a batch of another size
LONGEST: Final = 2**12  # to which lengths are tried that a branch of the module excludes

Outputs = dict[str, Tensor]


@final
@dataclass(frozen=True)
class Untraced:
    """A length of an open axis for which the module may take another branch than the one that was traced.

    `spots` are the inputs, by number, and their axes that have this length.
    """

    length: int
    spots: tuple[tuple[int, int], ...]

    def of(self, inputs: Any) -> Any:
        """The inputs with this length: cut, or repeated."""
        numbers = iter(range(len(tensors_of(inputs))))
        return map_tensors(inputs, lambda tensor: self._resized(tensor, next(numbers)))

    def _resized(self, tensor: Tensor, number: int) -> Tensor:
        for axis in (axis for index, axis in self.spots if index == number):
            tensor = tensor.index_select(axis, torch.arange(self.length, device=tensor.device) % tensor.shape[axis])
        return tensor


def untraced(program: torch.export.ExportedProgram | None) -> list[Untraced]:
    """The lengths next to those for which a traced program holds, and one, by what its shapes are known to fulfil."""
    if program is None:
        return []
    values = {node.name: node.meta.get("val") for node in program.graph.nodes if node.op == "placeholder"}
    spots: dict[Any, list[tuple[int, int]]] = {}
    for number, name in enumerate(program.graph_signature.user_inputs):
        for axis, size in enumerate(getattr(values.get(str(name)), "shape", ())):
            if isinstance(size, torch.SymInt):
                spots.setdefault(size.node.expr, []).append((number, axis))
    found = []
    for symbol, where in spots.items():
        known = program.range_constraints.get(symbol)
        lengths = {1}
        if known is not None:
            lengths |= {int(known.lower) - 1} if known.lower > SMALLEST_BATCH else set()
            lengths |= {int(known.upper) + 1} if known.upper < LONGEST else set()
        found += [Untraced(length, tuple(where)) for length in sorted(lengths)]
    return found


@torch.no_grad()
def largest_difference(
    ours: Callable[[Any], Outputs],
    theirs: Callable[[Any], Outputs],
    inputs: Any,
    open_axes: Sequence[int],
    rest: Sequence[Untraced],
) -> tuple[float, str]:
    """Of the logits of a module and of its file, relative to the largest, and where.

    They are compared on the inputs, a batch of another size, shorter, and the rest. What one of the two fails on is
    left out of the rest: it cannot be wrong in silence.
    """
    found, where, largest = 0.0, "", {}
    for batch in _traced(inputs, open_axes):
        largest = ours(batch)
        found = max(found, _difference(largest, theirs(batch)))
    for each in rest:
        batch = each.of(inputs)
        try:
            outputs, others = ours(batch), theirs(batch)
        except Exception:  # of the user's module, or of another runtime: any kind
            continue
        if not all(bool(value.isfinite().all()) for value in outputs.values()):  # as of the deviation of one number
            continue
        error = _difference(outputs, others, largest)
        if error > found:
            found, where = error, f" where an open axis has length {each.length}, on which the module may branch"
    return found, where


def _traced(inputs: Any, open_axes: Sequence[int]) -> Iterator[Any]:
    """The inputs, and others of lengths as they were traced."""
    size = num_examples(inputs)
    has_rows = all(is_row_wise(each, size) for each in tensors_of(inputs))
    other_size = size + OTHER_BATCH if has_rows else size - 1  # offsets of bags stay in order only if they are cut
    yield inputs
    yield _shorter(resized(inputs, other_size), other_size, open_axes)


def _difference(expected: Outputs, got: Outputs, beside: Outputs | None = None) -> float:
    """Relative to the largest logit, of those beside them too: one row alone may have none that is large."""
    found = []
    for name, each in expected.items():
        if got[name].shape != each.shape:
            raise ExportError(
                f"the exported file gives logits of shape {tuple(got[name].shape)}, and the module "
                f"{tuple(each.shape)}, for a batch of another size: an operation of the module has taken a length for "
                f"a constant"
            )
        more = [] if beside is None else [beside[name].float().flatten()]
        one, other = (torch.cat([value.float().flatten(), *more]) for value in (each, got[name]))
        found.append(relative_difference(one, other))
    return max(found)


def is_row_wise(tensor: Tensor, count: int) -> bool:
    """Whether a tensor has a row for each example, or one for all."""
    return not tensor.ndim or len(tensor) in (1, count)


def _shorter(inputs: Any, count: int, axes: Sequence[int]) -> Any:
    """The inputs, one shorter on every open axis beside that of the batch."""

    def cut(tensor: Tensor) -> Tensor:
        for axis in axes:
            if axis and axis < tensor.ndim and len(tensor) == count and tensor.shape[axis] > SMALLEST_BATCH:
                tensor = tensor.narrow(axis, 0, tensor.shape[axis] - 1)
        return tensor

    return map_tensors(inputs, cut)
