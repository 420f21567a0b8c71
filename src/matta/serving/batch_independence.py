"""Whether the answer to a row depends on the other rows of its batch, and whether it repeats.

Requests that come together are computed together. So what a row is answered must be its own: statistics of the batch
would carry one client's rows into the answer of another.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from math import isfinite
from typing import Any, Final

import torch
from torch import Tensor

from matta.choosing.measuring import num_examples, resized
from matta.errors import ServeError, first_line
from matta.nesting.batches import map_tensors

LOG: Final = logging.getLogger("matta.serve")
NEAR: Final = 1e-3  # of the largest value: as far as the same rows may be apart in two batches
ROUNDINGS: Final = 8  # of the coarsest dtype, if that is more
COUPLED: Final = 0.05  # further apart is refused; 8-bit layers that scale by the batch are 1% apart, which is told

Compute = Callable[[Any], Mapping[str, Tensor]]


def require_own_rows(
    compute: Compute, inputs: Any, constants: Mapping[str, Tensor], dtypes: set[torch.dtype], *, max_rows: int
) -> None:
    """Refuse answers that change with the other rows of their batch or need some, and warn of those that do not repeat.

    A mask or a scale that all rows share does not change an answer when the batch has other rows; ids of bags by
    offsets do.

    Args:
        compute: Gives the answers to inputs, by name.
        inputs: Of the example.
        constants: Tensors of it without a row for each example: all requests share them.
        dtypes: In which the answers are computed.
        max_rows: Of a batch; one row alone has no others.

    Raises:
        ServeError: an answer changes with the other rows, or they cannot be others.
    """
    expected = _judged(compute(inputs))
    near = max([NEAR, *(ROUNDINGS * torch.finfo(each).eps for each in dtypes if each.is_floating_point)])
    count = num_examples(inputs)
    if not constants:
        _require_one_row(compute, inputs)
    if (apart := _apart(expected, _judged(compute(inputs)), count)) > near:
        LOG.warning(
            "answers to the same rows are %.0f%% of the largest apart from call to call; look for a "
            "dropout that ignores eval mode, if that is not meant (functional.dropout without training=self.training)",
            100 * apart,
        )
        return
    if constants:
        _require_no_offsets(compute, inputs, constants, expected, near)
        _require_one_row(compute, inputs)
    elif max_rows > 1:
        _require_uncoupled(compute, inputs, expected, near)


def _require_one_row(compute: Compute, inputs: Any) -> None:
    """Refuse a model that loses the axis of the batch where that has one row: it would answer under load alone."""
    for name, answer in _computed(compute, inputs, 1).items():
        if not answer.ndim or len(answer) != 1:
            raise ServeError(
                f"the module answers one row alone with {name} of shape {tuple(answer.shape)}; expected a row there "
                f"too: squeeze(-1) in place of squeeze()"
            )


def _computed(compute: Compute, inputs: Any, rows: int) -> Mapping[str, Tensor]:
    try:
        return compute(resized(inputs, rows))
    except Exception as error:  # of the user's module: any kind
        raise ServeError(
            f"the module runs on the {num_examples(inputs)} rows of the example and fails on {rows} of them with "
            f"{type(error).__name__}: {first_line(error)}; expected one that takes any number of rows"
        ) from error


def _require_no_offsets(
    compute: Compute, inputs: Any, constants: Mapping[str, Tensor], expected: Mapping[str, Tensor], near: float
) -> None:
    count = num_examples(inputs)
    part = resized(inputs, count // 2 or 2)
    try:
        is_same = _apart(expected, compute(part), min(count, num_examples(part))) <= near
    except Exception:  # of the user's module: any kind
        is_same = False
    if not is_same:
        shapes = ", ".join(f"{name} of shape {tuple(each.shape)}" for name, each in constants.items())
        raise ServeError(
            f"an answer changes with the other rows of its batch, and {shapes} of the example has no row for each "
            f"of its {count} examples; expected inputs with a row each, such as ids padded to (batch, length)"
        )


def _require_uncoupled(compute: Compute, inputs: Any, expected: Mapping[str, Tensor], near: float) -> None:
    count = num_examples(inputs)
    rows = count // 2 or 2
    apart = _apart(expected, _computed(compute, inputs, rows), min(count, rows))
    apart = max(apart, _apart_from_zeros(compute, inputs, expected))
    how = f"by {apart:.0%} of the largest" if isfinite(apart) else "in its shape, or to NaN"
    if apart > COUPLED:
        raise ServeError(
            f"an answer changes with the other rows of its batch, requests are computed together, and it does {how}; "
            f"expected rows that do not mix: running statistics in place of the batch's, or max_batch=1"
        )
    if apart > near:
        LOG.warning(
            "an answer changes with the other rows of its batch, %s (layers that scale by the batch?); max_batch=1 "
            "serves one row at a time",
            how,
        )


def _apart_from_zeros(compute: Compute, inputs: Any, expected: Mapping[str, Tensor]) -> float:
    """How far the first rows are apart when the others are zeros; 0 where the module does not take these."""
    count = num_examples(inputs)
    rows = resized(inputs, max(count, 2))
    kept = max(count // 2, 1)

    def silence(tensor: Tensor) -> Tensor:
        if not (tensor.ndim and len(tensor) == max(count, 2) and tensor.is_floating_point()):
            return tensor
        return torch.cat([tensor[:kept], torch.zeros_like(tensor[kept:])])

    try:
        return _apart(expected, compute(map_tensors(rows, silence)), kept)
    except Exception:  # of the user's module: any kind
        return 0.0


def _judged(answers: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """What closeness says something of: where a model gives numbers, not the classes that follow from them."""
    return {name: each for name, each in answers.items() if each.is_floating_point()} or answers


def _apart(expected: Mapping[str, Tensor], got: Mapping[str, Tensor], rows: int) -> float:
    """The largest difference in the first rows, relative to the largest value of an output; infinity if NaN."""
    found = 0.0
    for name, each in expected.items():
        one, other = each.double(), got[name].double()
        if one.shape[1:] != other.shape[1:]:  # such as scores of each row with each other
            return float("inf")
        error = float((one[:rows] - other[:rows]).abs().max()) if one[:rows].numel() else 0.0
        scale = float(one.abs().max()) if one.numel() else 0.0
        found = max(found, error / max(scale, 1e-12) if error == error else float("inf"))
    return found
