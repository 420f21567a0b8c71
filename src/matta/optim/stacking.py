"""Blocks of one shape from all parameters stacked, to be worked on at once.

Shape suffixes: B blocks in a stack, M rows and N columns of a block.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, final

import torch
from torch import Tensor

from matta.optim.first_order import Entry, FirstOrder
from matta.optim.grids import Piece, Whole
from matta.optim.preconditioner import Factors


@final
class Member:
    """A piece of this process in a stack, and the views that it has of the stack's tensors."""

    def __init__(self, piece: Piece, blocks: slice) -> None:
        self.piece = piece
        self.blocks = blocks
        self.gradient = torch.empty(0)
        self.scratch = torch.empty(0)
        self.state: dict[str, Tensor] = {}
        self.shared = torch.empty(0)
        self.num_steps = 0  # in which it had a gradient


class Stack:
    """Blocks of one shape with their gradients, graft state and factors, each as one tensor.

    The optimizer's `state[parameter]` holds views of these tensors; values found there (a loaded state) are
    taken over. Of pieces that other processes own it only knows how many blocks they have.
    """

    def __init__(
        self,
        pieces: Sequence[Piece],
        state: Mapping[Any, dict[str, Tensor]],
        graft: FirstOrder,
        dtype: torch.dtype,
    ) -> None:
        self.graft = graft
        self.members: list[Member] = []
        self.num_everywhere, num_blocks = 0, 0
        places: list[int] = []
        for piece in pieces:
            if piece.is_mine:
                self.members.append(Member(piece, slice(num_blocks, num_blocks + piece.grid.num_blocks)))
                places += range(self.num_everywhere, self.num_everywhere + piece.grid.num_blocks)
                num_blocks += piece.grid.num_blocks
            self.num_everywhere += piece.grid.num_blocks
        self.is_shared = any(isinstance(piece, Whole) for piece in pieces)
        self.places = places
        self.gradient = torch.zeros(
            num_blocks, *pieces[0].grid.block_shape, dtype=dtype, device=pieces[0].parameter.device
        )
        self.scratch = torch.zeros_like(self.gradient)
        self.averages = {name: torch.zeros_like(self.gradient) for name in graft.state_names}
        rows, columns = self.gradient.shape[1:]
        self.left = self._factors(rows)
        self.right = self._factors(columns)
        self.active: list[Member] = []
        for member in self.members:
            self._share(member, state[member.piece.key])

    @property
    def factors(self) -> list[Factors]:
        """L and R, of sides longer than 1: the root of a 1x1 factor is a number, which grafting takes out."""
        return [each for each in (self.left, self.right) if each is not None]

    def load_gradients(self) -> None:
        """Takes the gradients of the members that have one; the others sit out this step."""
        found = [(member, member.piece.gradient()) for member in self.members]
        self.active = [member for member, gradient in found if gradient is not None]
        for member in self.active:
            member.num_steps += 1
        if self.active:
            blocks = [member.piece.grid.cut(gradient) for member, gradient in found if gradient is not None]
            torch._foreach_copy_([member.shared for member in self.active], blocks)

    def graft_entries(self) -> list[Entry]:
        """What the graft is to move: from zero, so that its steps are left in the scratch tensors."""
        if self.active:
            self.scratch.zero_()
        return [(member.scratch, member.gradient, member.state) for member in self.active]

    def update_factors(self, *, decay: float, weight: float) -> None:
        """L becomes decay * L + weight * G Gᵀ, and R with Gᵀ G."""
        spans = [member.blocks for member in self.active]
        if len(spans) == len(self.members):
            spans = [slice(0, len(self.gradient))]
        for blocks in spans:
            if self.left is not None:
                self.left.update(self.gradient, blocks, decay=decay, weight=weight)
            if self.right is not None:
                self.right.update(self.gradient.mT, blocks, decay=decay, weight=weight)

    def move(self, *, momentum: float, weight_decay: float) -> None:
        """Moves the active members along the preconditioned direction, as far as the graft has moved."""
        if not self.active:
            return
        lengths = torch.linalg.vector_norm(self.scratch, dim=(1, 2))
        update = self._direction(momentum)
        # a block without any gradient yet has the length 0 / 0
        scales = (lengths / torch.linalg.vector_norm(update, dim=(1, 2))).nan_to_num_(0.0, posinf=0.0).neg_()
        torch.mul(update, scales[:, None, None], out=self.gradient)
        whole = [member.piece.parameter for member in self.active if isinstance(member.piece, Whole)]
        if weight_decay and whole:
            torch._foreach_mul_(whole, 1.0 - weight_decay)
        for member in self.active:
            member.piece.move(member.shared)

    def _direction(self, momentum: float) -> Tensor:
        update = self.gradient
        if self.graft.direction == "momentum":
            update = self.averages["exp_avg"]
        elif self.graft.direction == "nesterov":
            update.lerp_(self.averages["exp_avg"], momentum)
        if self.left is not None:
            update = torch.bmm(self.left.roots, update, out=self.scratch)
        if self.right is not None:
            spare = self.gradient if update is self.scratch else self.scratch
            update = torch.bmm(update, self.right.roots, out=spare)
        return update

    def _factors(self, side: int) -> Factors | None:
        if side == 1:
            return None
        made = Factors.zeros(len(self.gradient), side, self.gradient, exponent=self.graft.exponent)
        made.places, made.num_everywhere, made.is_shared = self.places, self.num_everywhere, self.is_shared
        owners = [member for member in self.members for _ in range(member.piece.grid.num_blocks)]
        made.num_steps_of = lambda block: owners[block].num_steps
        return made

    def _share(self, member: Member, state: dict[str, Tensor]) -> None:
        """Points a parameter's state at its part of the stack, after copying what it holds."""
        tensors = dict(self.averages)
        for side, factors in (("left", self.left), ("right", self.right)):
            if factors is not None:
                tensors |= {side: factors.statistics, f"{side}_root": factors.roots}
        for name, tensor in tensors.items():
            part = tensor[member.blocks]
            if name in state:
                part.copy_(state[name])
            state[name] = part
        member.num_steps = int(state.get("step", 0))
        state.setdefault("step", torch.zeros((), device=self.gradient.device))
        member.state = state
        member.gradient, member.scratch = self.gradient[member.blocks], self.scratch[member.blocks]
        member.shared = member.gradient.view(*member.piece.grid.counts, *member.piece.grid.block_shape)
