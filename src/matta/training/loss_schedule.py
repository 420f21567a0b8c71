"""What a step minimises: the weights of the three losses, the ramp of the third (3.1.1), and whose turn it is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from matta.errors import MattaError


@final
@dataclass(frozen=True, kw_only=True)
class Weights:
    """ω of L = ω₁·L_S + ω₂·L_TA + ω₃·ramp(t)·L_D.

    Raises:
        MattaError: a weight is negative or not finite.

    Example:
        >>> Weights(distill=0.5)
        Weights(student=1.0, ta=1.0, distill=0.5)
    """

    student: float = 1.0
    ta: float = 1.0
    distill: float = 1.0

    def __post_init__(self) -> None:
        for name in ("student", "ta", "distill"):
            value = getattr(self, name)
            if not 0 <= value < float("inf"):
                raise MattaError(f"received Weights({name}={value}); expected a finite number, zero or more")


@final
@dataclass(frozen=True, kw_only=True)
class Ramp:
    """The weight of the distillation loss over training: zero up to step `start`, one `steps` later.

    Steps are optimizer steps: training-mode forwards divided by `accumulate` of `CoTraining`.

    Raises:
        MattaError: a number of steps that is negative, not finite, or between 0 and 1.

    Example:
        >>> [Ramp(start=10, steps=20).at(t) for t in (0, 10, 20, 30, 99)]
        [0.0, 0.0, 0.5, 1.0, 1.0]
    """

    start: int = 0
    steps: int = 1000

    def __post_init__(self) -> None:
        if not (0 <= self.start < float("inf") and 0 <= self.steps < float("inf")):
            raise MattaError(f"received {self}; expected start and steps of zero or more")
        _refuse_shares(self, self.start, self.steps)

    def at(self, step: int) -> float:
        """The weight at a step, between 0 and 1."""
        if step < self.start:
            return 0.0
        return min((step - self.start) / self.steps, 1.0) if self.steps else 1.0

    def at_tensor(self, step: Tensor, dtype: torch.dtype) -> Tensor:
        """`at` for a step that is counted on a device, without waiting for the device."""
        if not self.steps:
            return (step >= self.start).to(dtype)
        return ((step - self.start).to(dtype) / self.steps).clamp(0.0, 1.0)


@final
@dataclass(frozen=True, kw_only=True)
class Turns:
    """Which models a step trains, so that a family costs less: the Students alone at first, later the TA and one other.

    Each of the first `alone_steps` optimizer steps trains the Students alone, at the Students' cost. If the pair was
    nested with `warm_start=True`, the TA computes what the Student does until then. Each later step trains the TA and,
    with `student_chance`, the Students; otherwise the sub-model that `CoTraining(sample=...)` draws in their place.
    Without `sample` it trains the TA and the Students. `matta study compute` measures what this is worth.

    Parameters that a step does not train have a gradient of zero in it, so weight decay still moves them.

    Raises:
        MattaError: a number of steps that is negative or between 0 and 1, or a chance outside of 0 to 1.

    Example:
        >>> Turns(alone_steps=100)
        Turns(alone_steps=100, student_chance=0.3)
    """

    alone_steps: int = 0
    student_chance: float = 0.3

    def __post_init__(self) -> None:
        if self.alone_steps < 0:
            raise MattaError(f"received {self}; expected alone_steps of zero or more")
        _refuse_shares(self, self.alone_steps)
        if not 0 <= self.student_chance <= 1:
            raise MattaError(f"received {self}; expected a student_chance from 0 to 1")


def _refuse_shares(given: Ramp | Turns, *steps: float) -> None:
    if any(0 < each < 1 for each in steps):
        raise MattaError(f"received {given}; expected optimizer steps, not shares of a run: int(share * num_steps)")
