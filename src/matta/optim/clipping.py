"""Clip the norm of all gradients, sparse and sharded ones too."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_, get_total_norm


@torch.no_grad()
def clip_gradients(parameters: Sequence[Tensor], most: float) -> Tensor:
    """Scale the gradients of all processes so that their norm together is at most `most`; their norm before.

    torch clips dense ones alone.

    Example:
        >>> table = torch.nn.Embedding(5, 1, sparse=True)
        >>> table(torch.tensor([2, 2])).sum().backward()
        >>> clip_gradients([table.weight], 1.0), table.weight.grad.to_dense()[2]
        (tensor(2.), tensor([1.0000]))
    """
    owners = [each for each in parameters if each.grad is not None]
    if not any(each.grad.is_sparse for each in owners):  # type: ignore[union-attr]
        norm = clip_grad_norm_(owners, most)
        return norm.full_tensor() if hasattr(norm, "full_tensor") else norm
    found = []
    for each in owners:
        assert each.grad is not None
        if each.grad.is_sparse:
            each.grad = each.grad.coalesce()  # a row that was looked up twice has one gradient
        found.append(each.grad._values() if each.grad.is_sparse else each.grad)
    norm = get_total_norm(found)
    torch._foreach_mul_(found, (most / (norm + 1e-6)).clamp(max=1.0))
    return norm
