"""Kronecker factors of stacked matrix blocks, and when their roots are computed.

Shape suffixes: B blocks in a stack, D a side of a block, X its other side.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

EARLY_STEPS = (1, 2, 4, 8, 16, 24, 32, 40)
"""Steps at which factors are updated below the regular interval, while they still change fast."""

EARLY_WAVES = (1, 4, 8, 16, 24, 32, 40)
"""Steps at which all roots begin to be computed anew below the regular interval; the first time over three steps."""


def num_statistics(step: int, every: int) -> int:
    """How many gradients the factors have seen after a step: at the early steps, and every so many.

    Example:
        >>> [num_statistics(step, 10) for step in (1, 3, 10, 16, 30)]
        [1, 2, 5, 6, 9]
    """
    early = sum(each <= step and each % every != 0 for each in EARLY_STEPS)
    return early + step // every


def num_seen(step: int, every: int, own_steps: int) -> int:
    """How many of these a block has seen that had a gradient in the last `own_steps` steps; at least 1.

    Example:
        >>> num_seen(100, 10, own_steps=100) == num_statistics(100, 10), num_seen(100, 10, own_steps=20)
        (True, 2)
    """
    return max(num_statistics(step, every) - num_statistics(max(step - own_steps, 0), every), 1)


class Factors:
    """One side's factors (B, D, D) of a stack of blocks, and their roots: powers of a negative exponent.

    Statistics follow Gupta et al. 2018 (summed), or are an exponential average. Roots start as the identity:
    a block that waits for its first refresh is moved along the gradient.
    """

    def __init__(self, statistics: Tensor, roots: Tensor, exponent: float) -> None:
        self.statistics = statistics
        self.roots = roots
        self.exponent = exponent
        # of blocks that are divided among processes: which of all of them are these
        self.places: Sequence[int] = range(len(roots))
        self.num_everywhere = len(roots)
        self.num_steps_of: Callable[[int], int] | None = None  # steps in which a block had a gradient; None: in all
        self.is_shared = True  # every process has these blocks, so that one may compute a root for all

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

    def refresh(self, blocks: Sequence[int], *, eps: float) -> None:
        """Computes the roots of some blocks anew; where that fails the old root stays."""
        chosen = torch.tensor(blocks).to(self.roots.device, non_blocking=True)
        self.roots[chosen] = inverse_roots(self.statistics[chosen], self.roots[chosen], exponent=self.exponent, eps=eps)


def inverse_roots(factors_BDD: Tensor, old_BDD: Tensor, *, exponent: float, eps: float) -> Tensor:
    """(S / λ + eps)^exponent of positive semi-definite S with largest eigenvalues λ; the old root where that fails.

    The epsilon is relative, so the root does not depend on the scale of gradients. Dividing by λ changes
    the root by a number only, which grafting takes out again. Nothing waits for the device but `eigh` itself. Dead ReLU
    rows can make it fail in float32: then each factor of the stack is tried by itself, and in float64.

    Example:
        >>> inverse_roots(torch.diag(torch.tensor([16.0, 1.0]))[None], torch.eye(2)[None], exponent=-0.25, eps=0.0)
        tensor([[[1., 0.],
                 [0., 2.]]])
        >>> inverse_roots(torch.zeros(1, 2, 2), torch.eye(2)[None], exponent=-0.25, eps=1e-6)
        tensor([[[1., 0.],
                 [0., 1.]]])
    """
    try:
        eigenvalues, basis = torch.linalg.eigh(factors_BDD)
    except RuntimeError:
        if len(factors_BDD) > 1:
            pairs = zip(factors_BDD.split(1), old_BDD.split(1), strict=True)
            return torch.cat([inverse_roots(each, old, exponent=exponent, eps=eps) for each, old in pairs])
        if factors_BDD.dtype == torch.float64:
            return old_BDD
        return inverse_roots(factors_BDD.double(), old_BDD.double(), exponent=exponent, eps=eps).to(old_BDD.dtype)
    largest = eigenvalues[:, -1:]
    scales = (eigenvalues / largest).clamp_(min=0.0).add_(eps).pow_(exponent)
    roots = (basis * scales[:, None]) @ basis.mT
    is_good = (largest > 0) & largest.isfinite() & roots.isfinite().all(dim=(1, 2))[:, None]
    return torch.where(is_good[..., None], roots, old_BDD)


def refresh_wave(step: int, every: int) -> tuple[int, int]:
    """First step of the wave of refreshes that `step` belongs to, and its number of steps.

    Example:
        >>> [refresh_wave(step, 10) for step in (1, 2, 3, 4, 9, 10, 25)]
        [(1, 3), (1, 3), (1, 3), (4, 4), (8, 2), (10, 10), (20, 10)]
    """
    if step >= every:
        return step - step % every, every
    starts = [*(early for early in EARLY_WAVES if early < every), every]
    position = max(i for i, start in enumerate(starts) if start <= step)
    return starts[position], starts[position + 1] - starts[position]


class Refresher:
    """Computes roots round robin: each wave's work is spread evenly over its steps, and over the processes.

    The work of a root counts as the cube of its side. Which roots a step computes follows from the step's
    number alone, so a resumed run repeats an uninterrupted one exactly, with any number of processes.
    """

    def __init__(self, factors: Sequence[Factors]) -> None:
        units: list[tuple[int, Factors, int]] = []
        self.work = 0
        for each in factors:
            of_one = int(each.roots.shape[-1]) ** 3
            units += [(self.work + of_one * place, each, block) for block, place in enumerate(each.places)]
            self.work += of_one * each.num_everywhere
        self.work_before = [before for before, _, _ in units]
        self.units = [(each, block) for _, each, block in units]

    def due(self, step: int, every: int) -> list[tuple[Factors, int]]:
        """The roots that this step computes, as factors and the index of a block."""
        start, length = refresh_wave(step, every)
        bounds = (-(-self.work * k // length) for k in (step - start, step - start + 1))
        first, last = (bisect_left(self.work_before, bound) for bound in bounds)
        return self.units[first:last]

    def refresh(
        self, step: int, *, every: int, eps_of: Callable[[int], float], group: dist.ProcessGroup | None
    ) -> None:
        """Computes this step's roots; of those that all processes have, each does its share and sends it on.

        `eps_of` tells the epsilon from the number of steps in which a block had a gradient.
        """
        due = self.due(step, every)
        shared = [unit for unit in due if unit[0].is_shared]
        rank, size = (dist.get_rank(group), dist.get_world_size(group)) if group else (0, 1)
        alike: dict[tuple[int, float], tuple[Factors, list[int]]] = {}
        for factors, block in [unit for unit in due if not unit[0].is_shared] + shared[rank::size]:
            eps = eps_of(step if factors.num_steps_of is None else factors.num_steps_of(block))
            alike.setdefault((id(factors), eps), (factors, []))[1].append(block)
        for (_, eps), (factors, blocks) in alike.items():
            factors.refresh(blocks, eps=eps)
        if group is not None and size > 1 and shared:
            _exchange_roots(shared, group, rank, size)


def _exchange_roots(units: Sequence[tuple[Factors, int]], group: dist.ProcessGroup, rank: int, size: int) -> None:
    """Every process gets the roots of all: one all-gather for each type and device."""
    kinds = {(unit[0].roots.dtype, unit[0].roots.device) for unit in units}
    for dtype, device in sorted(kinds, key=str):
        roots = [[f.roots[b] for f, b in units[owner::size] if f.roots.dtype == dtype] for owner in range(size)]
        longest = max(sum(root.numel() for root in each) for each in roots)
        message = torch.zeros(longest, dtype=dtype, device=device)
        torch.cat(
            [message[:0], *(root.flatten() for root in roots[rank])], out=message[: sum(map(torch.numel, roots[rank]))]
        )
        received = [torch.empty_like(message) for _ in range(size)]
        dist.all_gather(received, message, group=group)
        for part, theirs in zip(received, roots, strict=True):
            sizes = [root.numel() for root in theirs]
            for root, values in zip(theirs, part[: sum(sizes)].split(sizes), strict=True):
                root.copy_(values.view_as(root))
