"""Lookups in slices of a table whose gradient is sparse: their cost does not depend on the number of rows.

The gradient of a slice would be dense. Here it is that of the rows that were looked up, in the Student's columns and
zero in the TA's others: sparse, as the TA's own, so that autograd adds the two and an optimizer moves only these rows.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from matta.nesting.layout import Axis


def is_sparse_table(module: nn.Module) -> bool:
    """Whether a module looks up rows of its weight with a sparse gradient, as `nn.Embedding(sparse=True)` does."""
    return isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.sparse


def may_look_up(module: nn.Module, axes: tuple[Axis, ...]) -> bool:
    """Whether a parameter of these axes may get a sparse gradient: modules of one's own say `sparse` as torch's do."""
    return getattr(module, "sparse", False) is True and len(axes) == 2


class SparseSlice(torch.autograd.Function):
    """The slice of a table, a view where it can be, with a gradient that is as sparse as the slice's own."""

    @staticmethod
    def forward(ctx: Any, table: Tensor, axes: tuple[Axis, ...]) -> Tensor:
        ctx.shape, ctx.axes = table.shape, axes
        return _taken(table, axes)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        rows, columns = ctx.axes
        if not gradient.is_sparse:
            whole = gradient.new_zeros(ctx.shape)
            places = [_places(axis, gradient.device) for axis in (rows, columns)]
            whole[places[0].unsqueeze(1), places[1]] = gradient
            return whole, None
        indices, values = gradient._indices(), gradient._values()
        if not rows.is_plain:
            indices = _places(rows, indices.device)[indices]
        if columns.is_plain:
            values = functional.pad(values, (0, columns.ta_size - columns.student_size))
        else:
            values = values.new_zeros(len(values), ctx.shape[1]).index_copy(1, _places(columns, values.device), values)
        return torch.sparse_coo_tensor(indices, values, ctx.shape, check_invariants=False), None


def lookup_bags(module: nn.EmbeddingBag, table: Tensor, axes: tuple[Axis, ...], *args: Any, **options: Any) -> Tensor:
    """What a live `nn.EmbeddingBag` returns: the Student's columns of the bags of the whole table.

    torch copies a table that is not contiguous at each call.
    """
    rows, columns = axes
    if rows.grows:
        table = SparseSlice.apply(table, (rows, Axis.plain(columns.ta_size, columns.ta_size)))
    return columns.take(_bags(module, table, *args, **options), 1)


def _bags(
    module: nn.EmbeddingBag,
    weight: Tensor,
    input: Tensor,
    offsets: Tensor | None = None,
    per_sample_weights: Tensor | None = None,
) -> Tensor:
    """`nn.EmbeddingBag.forward`, for another weight."""
    return functional.embedding_bag(
        input,
        weight,
        offsets,
        module.max_norm,
        module.norm_type,
        module.scale_grad_by_freq,
        module.mode,
        module.sparse,
        per_sample_weights,
        module.include_last_offset,
        module.padding_idx,
    )


def _taken(table: Tensor, axes: tuple[Axis, ...]) -> Tensor:
    for dim, axis in enumerate(axes):
        table = axis.take(table, dim)
    return table.view_as(table)


def _places(axis: Axis, device: torch.device) -> Tensor:
    return torch.tensor(axis.positions(), device=device)
