"""Matrices cut into equal blocks, and the pieces that are preconditioned together.

Shape suffixes: M rows and N columns of a block.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, final

from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True, kw_only=True)
class Grid:
    """How a matrix is cut into equal blocks, padded with zeros where they do not come out even.

    Example:
        >>> grid = Grid.of(5, 4, block_size=3)
        >>> grid.num_blocks, grid.block_shape, grid.padded
        (4, (3, 2), True)
        >>> matrix = torch.arange(20.0).view(5, 4)
        >>> bool((grid.join(grid.cut(matrix)) == matrix).all())
        True
    """

    shape: tuple[int, int]
    counts: tuple[int, int]
    block_shape: tuple[int, int]

    @classmethod
    def of(cls, rows: int, columns: int, *, block_size: int) -> Grid:
        """The fewest equal blocks with no side over `block_size`."""
        down, across = -(-rows // block_size), -(-columns // block_size)
        return cls(
            shape=(rows, columns),
            counts=(down, across),
            block_shape=(-(-rows // down), -(-columns // across)),
        )

    @property
    def num_blocks(self) -> int:
        """How many blocks the matrix is cut into."""
        return self.counts[0] * self.counts[1]

    @property
    def state_size(self) -> int:
        """Numbers of the state: two averages, and a factor and its root on each side that is longer than 1."""
        rows, columns = self.block_shape
        return self.num_blocks * (2 * rows * columns + sum(2 * side * side for side in (rows, columns) if side > 1))

    def strips(self) -> list[Grid]:
        """The rows of blocks, each as a grid of its own.

        Example:
            >>> [strip.shape for strip in Grid.of(5, 4, block_size=3).strips()]
            [(3, 4), (2, 4)]
        """
        rows, columns = self.block_shape[0], self.shape[1]
        heights = [min(rows, self.shape[0] - index * rows) for index in range(self.counts[0])]
        return [Grid(shape=(h, columns), counts=(1, self.counts[1]), block_shape=self.block_shape) for h in heights]

    @property
    def padded(self) -> bool:
        """Whether the blocks cover more than the matrix."""
        (down, across), (rows, columns) = self.counts, self.block_shape
        return (down * rows, across * columns) != self.shape

    def cut(self, matrix: Tensor) -> Tensor:
        """The blocks as (down, across, M, N): a view of the matrix unless it needs padding."""
        (down, across), (rows, columns) = self.counts, self.block_shape
        if self.padded:
            matrix = F.pad(matrix, (0, across * columns - self.shape[1], 0, down * rows - self.shape[0]))
        return matrix.view(down, rows, across, columns).transpose(1, 2)

    def join(self, blocks: Tensor) -> Tensor:
        """The matrix of blocks (down, across, M, N), without the padding."""
        (down, across), (rows, columns) = self.counts, self.block_shape
        matrix = blocks.transpose(1, 2).reshape(down * rows, across * columns)
        return matrix[: self.shape[0], : self.shape[1]]


class Piece(ABC):
    """A matrix, or a part of one, that is preconditioned by itself: where its gradient comes from and its step goes.

    `is_mine` is False where another process does all that; the blocks are counted here all the same.
    """

    parameter: Tensor
    grid: Grid
    is_mine: bool = True

    @property
    def key(self) -> Any:
        """Where its state is kept."""
        return self.parameter

    @abstractmethod
    def gradient(self) -> Tensor | None:
        """The gradient in the grid's shape, if there is one in this step."""

    @abstractmethod
    def move(self, update: Tensor) -> None:
        """Takes the step, as blocks (down, across, M, N) that are to be added."""


@final
class Whole(Piece):
    """A parameter that this process holds as a whole."""

    def __init__(self, parameter: Tensor, grid: Grid) -> None:
        self.parameter, self.grid = parameter, grid

    def gradient(self) -> Tensor | None:
        gradient = self.parameter.grad
        return gradient if gradient is None or gradient.shape == self.grid.shape else gradient.reshape(self.grid.shape)

    def move(self, update: Tensor) -> None:
        parameter = self.parameter
        if self.grid.padded or not parameter.is_contiguous():
            parameter.add_(self.grid.join(update).reshape(parameter.shape))
        else:
            self.grid.cut(parameter.view(self.grid.shape)).add_(update)
