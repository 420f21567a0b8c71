"""Kronecker factors of stacked matrix blocks, and when their roots are computed.

Shape suffixes: B blocks in a stack, D a side of a block, X its other side.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

EARLY_STEPS = (1, 2, 4, 8, 16, 24, 32, 40)
"""Steps at which roots are computed below the regular interval, while the factors still change fast."""


def num_statistics(step: int, every: int) -> int:
    """How many gradients the factors have seen after a step: at the early steps, and every so many.

    Example:
        >>> [num_statistics(step, 10) for step in (1, 3, 10, 16, 30)]
        [1, 2, 5, 6, 9]
    """
    early = sum(each <= step and each % every != 0 for each in EARLY_STEPS)
    return early + step // every


class Factors:
    """One side's factors (B, D, D) of a stack of blocks, and their roots: powers of a negative exponent.

    Statistics follow Gupta et al. 2018 (summed), or are an exponential average. Roots start as the identity:
    a block that waits for its first refresh is moved along the gradient.
    """

    def __init__(self, statistics: Tensor, roots: Tensor, exponent: float) -> None:
        self.statistics = statistics
        self.roots = roots
        self.exponent = exponent

    @classmethod
    def zeros(cls, num_blocks: int, side: int, like: Tensor, *, exponent: float) -> Factors:
        """Factors before the first gradient."""
        statistics = torch.zeros(num_blocks, side, side, dtype=like.dtype, device=like.device)
        roots = torch.eye(side, dtype=like.dtype, device=like.device).repeat(num_blocks, 1, 1)
        return cls(statistics, roots, exponent)

    def update(self, gradient_BDX: Tensor, blocks: slice, *, decay: float, weight: float) -> None:
        """Statistics of these blocks become decay * statistics + weight * G Gᵀ."""
        gradient = gradient_BDX[blocks]
        self.statistics[blocks].baddbmm_(gradient, gradient.mT, beta=decay, alpha=weight)

    def refresh(self, block: int, *, eps: float) -> None:
        """Computes the root of one block anew; where that fails the old root stays."""
        root = inverse_root(self.statistics[block], exponent=self.exponent, eps=eps)
        if root is not None:
            self.roots[block] = root


def inverse_root(factor_DD: Tensor, *, exponent: float, eps: float) -> Tensor | None:
    """(S / λ + eps)^exponent of a positive semi-definite S with largest eigenvalue λ; None where it has none.

    The epsilon is relative, so the root does not depend on the scale of gradients. Dividing by λ changes
    the root by a number only, which grafting takes out again. Dead ReLU rows can make float32 `eigh` fail:
    float64 is tried next.

    Example:
        >>> inverse_root(torch.diag(torch.tensor([16.0, 1.0])), exponent=-0.25, eps=0.0)
        tensor([[1., 0.],
                [0., 2.]])
        >>> inverse_root(torch.zeros(2, 2), exponent=-0.25, eps=1e-6) is None
        True
    """
    for dtype in (factor_DD.dtype, torch.float64):
        try:
            eigenvalues, basis = torch.linalg.eigh(factor_DD.to(dtype))
        except RuntimeError:
            continue
        largest = float(eigenvalues[-1])
        if not 0.0 < largest < float("inf"):
            return None
        scales = eigenvalues.div_(largest).clamp_(min=0.0).add_(eps).pow_(exponent)
        root = (basis * scales) @ basis.mT
        if bool(root.isfinite().all()):
            return root.to(factor_DD.dtype)
    return None


def refresh_wave(step: int, every: int) -> tuple[int, int]:
    """First step of the wave of refreshes that `step` belongs to, and its number of steps.

    Example:
        >>> [refresh_wave(step, 10) for step in (1, 2, 3, 4, 9, 10, 25)]
        [(1, 1), (2, 2), (2, 2), (4, 4), (8, 2), (10, 10), (20, 10)]
    """
    if step >= every:
        return step - step % every, every
    starts = [*(early for early in EARLY_STEPS if early < every), every]
    position = max(i for i, start in enumerate(starts) if start <= step)
    return starts[position], starts[position + 1] - starts[position]


class Refresher:
    """Computes roots round robin: each wave's work is spread evenly over its steps, and over the processes.

    The work of a root counts as the cube of its side. Which roots a step computes follows from the step's
    number alone, so a resumed run repeats an uninterrupted one exactly.
    """

    def __init__(self, factors: Sequence[Factors]) -> None:
        self.units = [(each, block) for each in factors for block in range(len(each.roots))]
        self.work_before: list[int] = []
        self.work = 0
        for each, _ in self.units:
            self.work_before.append(self.work)
            self.work += int(each.roots.shape[-1]) ** 3

    def due(self, step: int, every: int) -> list[tuple[Factors, int]]:
        """The roots that this step computes, as factors and the index of a block."""
        if not self.units:
            return []
        start, length = refresh_wave(step, every)
        bounds = (-(-self.work * k // length) for k in (step - start, step - start + 1))
        first, last = (bisect_left(self.work_before, bound) for bound in bounds)
        return self.units[first:last]

    def refresh(self, step: int, *, every: int, eps: float, group: dist.ProcessGroup | None) -> None:
        """Computes this step's roots; in a process group each process does its share and sends it on."""
        due = self.due(step, every)
        rank, size = (dist.get_rank(group), dist.get_world_size(group)) if group else (0, 1)
        for factors, block in due[rank::size]:
            factors.refresh(block, eps=eps)
        if group is not None and size > 1:
            for owner in range(size):
                _send_roots(due[owner::size], owner, group)


def _send_roots(units: Sequence[tuple[Factors, int]], owner: int, group: dist.ProcessGroup) -> None:
    """Copies the roots of these units from one process of the group to all."""
    if not units:
        return
    roots = [factors.roots[block] for factors, block in units]
    message = torch.cat([root.flatten() for root in roots])
    dist.broadcast(message, group_src=owner, group=group)
    for root, part in zip(roots, message.split([root.numel() for root in roots]), strict=True):
        root.copy_(part.view_as(root))
