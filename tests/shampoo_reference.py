"""Shampoo written plainly from Gupta et al. 2018 (algorithm 1) in float64, with grafting, block by block.

Under the Adam graft the factors' power is -1/2 (Morwani et al. 2024) and the direction Nesterov's.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

EARLY = (1, 2, 4, 8, 16, 24, 32, 40)
WAVES = (1, 4, 8, 16, 24, 32, 40)


def block_slices(length: int, block_size: int) -> list[slice]:
    """Equal parts of an axis, the last one shorter where they do not come out even."""
    side = math.ceil(length / math.ceil(length / block_size))
    return [slice(start, min(start + side, length)) for start in range(0, length, side)]


def matrix_power(factor: Tensor, exponent: float, eps: float) -> Tensor:
    values, basis = torch.linalg.eigh(factor)
    values = values.clamp(min=0) + eps * values.max()
    return basis @ torch.diag(values**exponent) @ basis.T


class Block:
    def __init__(self, rows: int, columns: int) -> None:
        self.momentum = torch.zeros(rows, columns, dtype=torch.float64)
        self.squares = torch.zeros_like(self.momentum)
        self.factors = [torch.zeros(side, side, dtype=torch.float64) for side in (rows, columns)]
        self.roots = [torch.eye(side, dtype=torch.float64) for side in (rows, columns)]


class ReferenceShampoo:
    """One matrix; the arguments are those of `matta.Shampoo`."""

    def __init__(
        self,
        matrix: Tensor,
        *,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
        graft: str,
        block_size: int,
        statistics_every: int,
        refresh_every: int,
        root_eps: float,
        young_eps: float,
    ) -> None:
        self.matrix = matrix.double().clone()
        self.lr, self.betas, self.eps, self.weight_decay = lr, betas, eps, weight_decay
        self.graft, self.root_eps, self.young_eps = graft, root_eps, young_eps
        self.num_seen = 0
        self.statistics_every, self.refresh_every = statistics_every, refresh_every
        self.step_number = self.statistics_step = 0
        self.parts = [
            (rows, columns)
            for rows in block_slices(matrix.shape[0], block_size)
            for columns in block_slices(matrix.shape[1], block_size)
        ]
        self.blocks = [Block(*self.matrix[part].shape) for part in self.parts]
        self.sides = [math.ceil(size / math.ceil(size / block_size)) for size in matrix.shape]

    def step(self, gradient: Tensor) -> None:
        self.step_number += 1
        gradients = [gradient.double()[part] for part in self.parts]
        self.update_factors(gradients)
        for block, side in self.refreshed_now():
            exponent = -0.5 if self.graft == "adam" else -0.25
            eps = max(self.root_eps, self.young_eps / self.num_seen)
            block.roots[side] = matrix_power(block.factors[side], exponent, eps)
        self.matrix *= 1 - self.lr * self.weight_decay
        for part, block, each in zip(self.parts, self.blocks, gradients, strict=True):
            self.matrix[part] -= self.lr * self.update(block, each)

    def update_factors(self, gradients: list[Tensor]) -> None:
        if self.step_number not in EARLY and self.step_number % self.statistics_every:
            return
        decay = self.betas[1] ** (self.step_number - self.statistics_step)
        self.statistics_step = self.step_number
        self.num_seen += 1
        for block, gradient in zip(self.blocks, gradients, strict=True):
            for side, product in enumerate((gradient @ gradient.T, gradient.T @ gradient)):
                if self.graft == "adagrad":
                    block.factors[side] += product
                else:
                    block.factors[side] = decay * block.factors[side] + (1 - decay) * product

    def refreshed_now(self) -> Iterator[tuple[Block, int]]:
        """Left roots, then right ones, each in the step of its wave that its share of the work falls into."""
        starts = [start for start in WAVES if start < self.refresh_every]
        starts += range(self.refresh_every, self.step_number + self.refresh_every + 1, self.refresh_every)
        start = max(each for each in starts if each <= self.step_number)
        length = min(each for each in starts if each > self.step_number) - start
        units = [
            (block, side, self.sides[side] ** 3) for side in (0, 1) if self.sides[side] > 1 for block in self.blocks
        ]
        total, before = sum(work for *_, work in units), 0
        for block, side, work in units:
            if before * length // total == self.step_number - start:
                yield block, side
            before += work

    def update(self, block: Block, gradient: Tensor) -> Tensor:
        direction, graft = self.first_order(block, gradient)
        preconditioned = block.roots[0] @ direction @ block.roots[1]
        norm = preconditioned.norm()
        return preconditioned * (graft.norm() / norm) if norm > 0 else torch.zeros_like(gradient)

    def first_order(self, block: Block, gradient: Tensor) -> tuple[Tensor, Tensor]:
        """What is preconditioned, and the step whose length the result gets."""
        if self.graft == "adagrad":
            block.squares += gradient**2
            return gradient, gradient / (block.squares.sqrt() + self.eps)
        first, second = self.betas
        block.momentum = first * block.momentum + (1 - first) * gradient
        block.squares = second * block.squares + (1 - second) * gradient**2
        mean = block.momentum / (1 - first**self.step_number)
        if self.graft == "sgd":
            return block.momentum, mean
        ahead = first * block.momentum + (1 - first) * gradient
        return ahead, mean / ((block.squares / (1 - second**self.step_number)).sqrt() + self.eps)
