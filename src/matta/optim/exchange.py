"""Matrices sharded over processes (FSDP2): each strip of blocks has an owner, who keeps its state and makes its steps.

A strip is a row of blocks: a stretch of the matrix in memory, as a shard is. One all-to-all takes the gradient of every
strip to its owner, another brings the step back to those that hold the parameter's rows. A process sends and receives
twice the size of its shards, whatever the number of processes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
import torch.distributed as dist
from torch import Tensor

from matta.optim.divided_parameters import local, sharding_group
from matta.optim.grids import Grid, Piece


@final
class Strip(Piece):
    """A row of blocks of a sharded matrix: `start` to `stop` of its elements. `index` counts the strips of the matrix.

    `gradient` is there for the owner during a step, and so is `step`, what is to be added to the matrix.
    """

    def __init__(self, parameter: Tensor, index: int, grid: Grid, owner: int, *, is_mine: bool) -> None:
        self.parameter, self.grid, self.index, self.owner, self.is_mine = parameter, grid, index, owner, is_mine
        self.start = index * grid.block_shape[0] * grid.shape[1]
        self.stop = self.start + grid.shape[0] * grid.shape[1]
        self.received: Tensor | None = None
        self.step: Tensor | None = None

    @property
    def key(self) -> Any:
        return self

    def gradient(self) -> Tensor | None:
        return self.received

    def move(self, update: Tensor) -> None:
        self.step = self.grid.join(update)


def strips_of(parameters: Sequence[tuple[Tensor, Grid]]) -> list[Strip]:
    """The strips of sharded matrices, in order; owners are chosen so that all have about as much state."""
    made: list[Strip] = []
    by_group: dict[Any, list[tuple[Tensor, Grid]]] = {}
    for parameter, grid in parameters:
        by_group.setdefault(sharding_group(parameter), []).append((parameter, grid))
    for group, own in by_group.items():
        rows = [(parameter, index, strip) for parameter, grid in own for index, strip in enumerate(grid.strips())]
        owners = owners_of([strip for _, _, strip in rows], dist.get_world_size(group))
        rank = dist.get_rank(group)
        made += [
            Strip(*row, owner, is_mine=owner == rank)  # of one group, in the order of the parameters
            for row, owner in zip(rows, owners, strict=True)
        ]
    return made


def owners_of(strips: Sequence[Grid], num_processes: int) -> list[int]:
    """The process that owns each strip: the largest first, to the one that has least.

    Example:
        >>> owners_of([Grid.of(4, 4, block_size=4), Grid.of(2, 4, block_size=4), Grid.of(2, 4, block_size=4)], 2)
        [0, 1, 1]
    """
    load, owners = [0] * num_processes, [0] * len(strips)
    for number in sorted(range(len(strips)), key=lambda number: -strips[number].state_size):
        owners[number] = load.index(min(load))
        load[owners[number]] += strips[number].state_size
    return owners


@dataclass(frozen=True, kw_only=True)
class _Part:
    """The part of a strip that one process holds: elements of the strip, and of that process's shard."""

    strip: Strip
    peer: int
    in_strip: slice
    in_shard: slice


@final
class Exchange:
    """Takes gradients of sharded matrices to the owners of their strips, and steps back."""

    def __init__(self, strips: Sequence[Strip], group: dist.ProcessGroup, dtype: torch.dtype) -> None:
        self.strips, self.group, self.dtype = strips, group, dtype
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        self.held = [part for strip in strips for part in self._parts(strip, [self.rank])]
        self.owned = [part for strip in strips if strip.is_mine for part in self._parts(strip, range(self.size))]
        self.held.sort(key=lambda part: part.strip.owner)
        self.owned.sort(key=lambda part: part.peer)  # both sorts are stable: the order of the strips stays

    def _parts(self, strip: Strip, peers: Sequence[int]) -> list[_Part]:
        rows = -(-strip.parameter.shape[0] // self.size)
        columns = strip.parameter.numel() // strip.parameter.shape[0]
        found = []
        for peer in peers:
            first = min(peer * rows * columns, strip.parameter.numel())
            last = min(first + rows * columns, strip.parameter.numel())
            start, stop = max(first, strip.start), min(last, strip.stop)
            if start < stop:
                in_strip, in_shard = slice(start - strip.start, stop - strip.start), slice(start - first, stop - first)
                found.append(_Part(strip=strip, peer=peer, in_strip=in_strip, in_shard=in_shard))
        return found

    def take(self) -> None:
        """Every owner gets the gradients of its strips; those of parameters without gradient sit out."""
        held = [part for part in self.held if part.strip.parameter.grad is not None]
        owned = [part for part in self.owned if part.strip.parameter.grad is not None]
        pieces = [local(part.strip.parameter.grad).reshape(-1)[part.in_shard] for part in held]
        received = self._send(held, pieces, owned, to_owners=True)
        for strip in {id(part.strip): part.strip for part in owned}.values():
            strip.received = torch.empty(strip.grid.shape, dtype=self.dtype, device=strip.parameter.device)
        for part, values in zip(owned, received, strict=True):
            assert part.strip.received is not None
            part.strip.received.view(-1)[part.in_strip].copy_(values)

    def give_back(self, *, weight_decay: float) -> None:
        """Every process moves its shards by the steps that the owners have made."""
        held = [part for part in self.held if part.strip.parameter.grad is not None]
        owned = [part for part in self.owned if part.strip.step is not None]
        steps = [part.strip.step.reshape(-1)[part.in_strip] for part in owned if part.strip.step is not None]
        received = self._send(owned, steps, held, to_owners=False)
        shards = {id(part.strip.parameter): local(part.strip.parameter) for part in held}
        if weight_decay and shards:
            torch._foreach_mul_(list(shards.values()), 1.0 - weight_decay)
        for part, values in zip(held, received, strict=True):
            shards[id(part.strip.parameter)].view(-1)[part.in_shard].add_(values)
        for strip in self.strips:
            strip.received = strip.step = None

    def _send(
        self, sent: Sequence[_Part], pieces: Sequence[Tensor], expected: Sequence[_Part], *, to_owners: bool
    ) -> list[Tensor]:
        """One all-to-all: the pieces that were sent to this process, in the order of `expected`."""
        empty = torch.empty(0, dtype=self.dtype, device=self.strips[0].parameter.device)
        message = torch.cat([empty, *(piece.to(self.dtype) for piece in pieces)])
        sizes_sent = self._sizes(sent, by_owner=to_owners)
        sizes_expected = self._sizes(expected, by_owner=not to_owners)
        received = empty.new_empty(sum(sizes_expected))
        dist.all_to_all_single(received, message, sizes_expected, sizes_sent, group=self.group)
        return list(received.split([part.in_strip.stop - part.in_strip.start for part in expected]))

    def _sizes(self, parts: Sequence[_Part], *, by_owner: bool) -> list[int]:
        """How many elements go to, or come from, each process: the strips' owners, or those that hold the rows."""
        sizes = [0] * self.size
        for part in parts:
            sizes[part.strip.owner if by_owner else part.peer] += part.in_strip.stop - part.in_strip.start
        return sizes


def gathered(kept: Mapping[Strip, Mapping[str, Tensor]], strips: Sequence[Strip]) -> dict[Tensor, dict[str, Tensor]]:
    """The state of whole matrices from that of their strips: on the first process of each group, in its memory.

    All processes must call this; the others get nothing.
    """
    found: dict[Tensor, dict[str, Tensor]] = {}
    by_parameter: dict[Tensor, list[Strip]] = {}
    for strip in strips:
        by_parameter.setdefault(strip.parameter, []).append(strip)
    for parameter, own in by_parameter.items():
        group = sharding_group(parameter)
        mine = {
            strip.index: {name: value.cpu() for name, value in kept[strip].items()} for strip in own if strip.is_mine
        }
        is_first = dist.get_rank(group) == 0
        everyones: list[Any] | None = [None] * dist.get_world_size(group) if is_first else None
        dist.gather_object(mine, everyones, group=group, group_dst=0)
        if everyones is not None:
            states = dict(sorted((index, state) for each in everyones for index, state in each.items())).values()
            names = next(iter(states))
            found[parameter] = {name: _joined([state[name] for state in states]) for name in names}
    return found


def of_strip(name: str, index: int) -> str:
    """The name of a strip's part of a matrix's state, where each strip is by itself.

    Example:
        >>> of_strip("left", 3), strip_index("left.3"), strip_index("left")
        ('left.3', 3, None)
    """
    return f"{name}.{index}"


def strip_index(name: str) -> int | None:
    """The strip whose part of the state has this name; None where it is that of a whole parameter."""
    index = name.partition(".")[2]
    return int(index) if index else None


def joined_strips(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state of a whole matrix from those of all its strips; any other state as it is."""
    by_name: dict[str, list[Tensor]] = {}
    for name in sorted(state, key=lambda name: strip_index(name) or 0):
        by_name.setdefault(name.partition(".")[0], []).append(state[name])
    return {name: _joined(values) for name, values in by_name.items()}


def _joined(values: Sequence[Tensor]) -> Tensor:
    return torch.cat(list(values)) if values[0].ndim else values[0]
