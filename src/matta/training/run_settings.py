"""What a run is told, and what it tells: its settings, what looks on, and its result."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, final

import torch

from matta.errors import RunError
from matta.nesting.batches import Batch
from matta.training.cotraining import CoTraining
from matta.training.evaluation import Evaluated
from matta.training.spikes import Rollback
from matta.training.step_output import CoTrainingOutput


class Observer(Protocol):
    """What looks on at each batch, such as `ProgressiveValidation` and `Snapshots`."""

    def before_step(self, cotrain: CoTraining, batch: Batch, out: CoTrainingOutput) -> None:
        """What was predicted, by weights that have not yet learned from the batch."""

    def after_step(self, cotrain: CoTraining) -> None:
        """The optimizer has moved the weights."""

    def state_dict(self) -> dict[str, Any]:
        """What a run needs to continue, of tensors and plain types."""

    def load_state_dict(self, state: dict[str, Any], /) -> None:
        """Continue from a state."""


@final
@dataclass(frozen=True, kw_only=True)
class FitResult:
    """What came of a run.

    `losses` are the means of `student`, `ta` and `distill` in nats since they were last logged, over all labels that
    count in all processes, without those that no step has trained (`Turns`). `num_skipped` counts the steps whose loss
    was not finite, or whose gradients' norm with `clip_norm` or `Shampoo` was not.
    """

    steps: int
    losses: dict[str, float]
    evaluations: tuple[Evaluated, ...]
    best: Evaluated | None
    num_skipped: int


def not_finite(num_steps: int, last: int, place: str, aside: Path | None) -> RunError:
    """What is raised when so many steps in a row were not finite; `place` is that of the last one's data."""
    told = "" if aside is None else f": the batches are in {aside}"
    return RunError(
        f"the loss, or its gradient, was not finite in {num_steps} steps in a row, {last - num_steps + 1} to {last} "
        f"(last: {place}, counted from 0); the weights are those before them. Lower the learning rate, clip the "
        f"gradients (clip_norm=1.0), or look for such values in the data{told}"
    )


_COUNTS = (
    *("steps", "epochs", "accumulate", "evaluate_every", "patience", "checkpoint_every", "max_nonfinite", "log_every"),
)


@final
@dataclass(frozen=True, kw_only=True)
class Settings:
    """The plain values among the arguments of `fit`.

    Raises:
        RunError: a value is out of range, or two exclude each other.
    """

    steps: int | None
    epochs: int | None
    clip_norm: float | None
    accumulate: int
    precision: str
    evaluate_every: int | None
    best: tuple[str, Literal["min", "max"]] | None
    patience: int | None
    checkpoint_every: int
    max_nonfinite: int | None
    log_every: int
    rollback: Rollback | None
    resume: bool | Literal["prolong"]

    def __post_init__(self) -> None:
        if self.steps is not None and self.epochs is not None:
            raise RunError(f"received steps={self.steps} and epochs={self.epochs}; expected one of them")
        for name in _COUNTS:
            value = getattr(self, name)
            if value is not None and not (isinstance(value, int) and value >= 1):
                raise RunError(f"received {name}={value!r}; expected a whole number from 1 up")
        if self.clip_norm is not None and not self.clip_norm > 0:
            raise RunError(f"received clip_norm={self.clip_norm!r}; expected a number over 0, or None for no clipping")
        if self.precision not in ("no", "bf16"):
            raise RunError(f"received precision={self.precision!r}; expected 'no' or 'bf16'")
        if self.best is not None and (len(self.best) != 2 or self.best[1] not in ("min", "max")):
            raise RunError(f"received best={self.best!r}; expected such as ('student_loss', 'min')")
        if self.patience is not None and (self.best is None or self.evaluate_every is None):
            raise RunError(
                f"received patience={self.patience} without best= and evaluate_every=; expected both, since it counts "
                f"evaluations"
            )
        if self.rollback is not None and self.max_nonfinite is None:
            raise RunError("received rollback with max_nonfinite=None; expected a number: both read each step's loss")
        if self.resume not in (True, False, "prolong"):
            raise RunError(f"received resume={self.resume!r}; expected True, False or 'prolong'")

    @property
    def num_passes(self) -> int | None:
        """Passes over the data; None: as many as the steps need."""
        return None if self.steps is not None else self.epochs or 1

    def require_step(self, num_steps: int) -> None:
        """Refuse data that is over and was too short for a step.

        Raises:
            RunError: none was made.
        """
        if not num_steps:
            raise RunError(
                f"the data ended before the first step, which takes accumulate={self.accumulate} batches; expected "
                f"more batches, more passes over them, or a smaller accumulate"
            )

    def plain(self) -> dict[str, Any]:
        """The settings by name, in plain types."""
        return {name: value if name != "rollback" else repr(value) for name, value in vars(self).items()}

    def autocast(self, device: torch.device) -> AbstractContextManager[Any]:
        """The context of a forward."""
        if self.precision == "no":
            return nullcontext()
        return torch.autocast(device.type, dtype=torch.bfloat16)
