"""The weights of the three losses, and the ramp of the third (section 3.1.1)."""

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
        MattaError: a negative number of steps.

    Example:
        >>> [Ramp(start=10, steps=20).at(t) for t in (0, 10, 20, 30, 99)]
        [0.0, 0.0, 0.5, 1.0, 1.0]
    """

    start: int = 0
    steps: int = 1000

    def __post_init__(self) -> None:
        if self.start < 0 or self.steps < 0:
            raise MattaError(f"received {self}; expected start and steps of zero or more")

    def at(self, step: int) -> float:
        """The weight at a step, between 0 and 1."""
        if step < self.start:
            return 0.0
        return min((step - self.start) / self.steps, 1.0) if self.steps else 1.0

    def at_tensor(self, step: Tensor, dtype: torch.dtype) -> Tensor:
        """The same for a step counted on a device, without waiting for the device."""
        if not self.steps:
            return (step >= self.start).to(dtype)
        return ((step - self.start).to(dtype) / self.steps).clamp(0.0, 1.0)
