"""The first-order steps that Shampoo is grafted to, and that embeddings and vectors get."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

State = Mapping[str, Tensor]
Entry = tuple[Tensor, Tensor, State]  # what is moved, its gradient, its state


@dataclass(frozen=True, kw_only=True)
class FirstOrder:
    """A first-order optimizer over lists of contiguous tensors of one type and device.

    `move(targets, gradients, states, lr, group)` updates the states, whose "step" counts this step already,
    and moves the targets by `lr` times the optimizer's step. Weight decay is left to the caller.

    What Shampoo does under this graft: `direction` is what it preconditions, `exponent` the power of the
    factors on either side, and `decays` tells averaged statistics from summed ones.
    """

    state_names: tuple[str, ...]
    direction: Literal["gradient", "momentum", "nesterov"]
    exponent: float
    decays: bool
    move: Callable[[list[Tensor], list[Tensor], list[State], float, Mapping[str, Any]], None]


class TouchedRows:
    """The rows of a table that its sparse gradient has, with their part of the state, as an entry of their own."""

    def __init__(self, parameter: Tensor, state: State, dtype: torch.dtype) -> None:
        assert parameter.grad is not None
        gradient = parameter.grad.coalesce()
        self._parameter, self._state, self._rows = parameter, state, gradient.indices()[0]
        self._names = [name for name in state if name != "step"]
        own = {name: state[name].index_select(0, self._rows) for name in self._names}
        self.target = parameter.index_select(0, self._rows).to(dtype)
        self.entry: Entry = (self.target, gradient.values().to(dtype), {**own, "step": state["step"]})

    def write(self) -> None:
        """Put what has moved back into the table and its state."""
        self._parameter.index_copy_(0, self._rows, self.target.to(self._parameter.dtype))
        for name in self._names:
            self._state[name].index_copy_(0, self._rows, self.entry[2][name])


def _move_adam(
    targets: list[Tensor],
    gradients: list[Tensor],
    states: list[State],
    lr: float,
    group: Mapping[str, Any],
) -> None:
    torch._fused_adam_(
        targets,
        gradients,
        [state["exp_avg"] for state in states],
        [state["exp_avg_sq"] for state in states],
        [],
        [state["step"] for state in states],
        lr=lr,
        beta1=group["betas"][0],
        beta2=group["betas"][1],
        eps=group["eps"],
        weight_decay=0.0,
        amsgrad=False,
        maximize=False,
    )


def _move_adagrad(
    targets: list[Tensor],
    gradients: list[Tensor],
    states: list[State],
    lr: float,
    group: Mapping[str, Any],
) -> None:
    squares = [state["sum"] for state in states]
    torch._foreach_addcmul_(squares, gradients, gradients)
    roots = list(torch._foreach_sqrt(squares))
    torch._foreach_add_(roots, group["eps"])
    torch._foreach_addcdiv_(targets, gradients, roots, value=-lr)


def _move_sgd(
    targets: list[Tensor],
    gradients: list[Tensor],
    states: list[State],
    lr: float,
    group: Mapping[str, Any],
) -> None:
    beta: float = group["betas"][0]
    averages = [state["exp_avg"] for state in states]
    torch._foreach_lerp_(averages, gradients, weight=1.0 - beta)
    for target, average, state in zip(targets, averages, states, strict=True):
        target.sub_(average * (lr / (1.0 - beta ** state["step"].double())))


# With averaged statistics the power -1/2 is the better approximation (Morwani et al. 2024, arXiv 2406.17748);
# with summed ones -1/4 is what Gupta et al. 2018 prove.
GRAFTS: Mapping[str, FirstOrder] = {
    "adam": FirstOrder(
        state_names=("exp_avg", "exp_avg_sq"),
        direction="nesterov",
        exponent=-0.5,
        decays=True,
        move=_move_adam,
    ),
    "adagrad": FirstOrder(state_names=("sum",), direction="gradient", exponent=-0.25, decays=False, move=_move_adagrad),
    "sgd": FirstOrder(state_names=("exp_avg",), direction="momentum", exponent=-0.25, decays=True, move=_move_sgd),
}
