"""Losses that leap: noticed against the steps before, so that a run can return to an earlier checkpoint.

What is done is that of the large runs that published theirs (PaLM, section 5.1 of Chowdhery et al. 2022): go back to a
checkpoint before the spike and leave out the batches since.
"""

from __future__ import annotations

import math
import statistics
import warnings
from collections import deque
from dataclasses import dataclass
from typing import Any, final

from matta.errors import RunError
from matta.training.processes import is_main_process


@final
@dataclass(frozen=True, kw_only=True)
class Rollback:
    """Return to the newest checkpoint when the loss of a step is over `factor` times the median of `window` steps.

    The loss is the weighted mean of the step's losses, so that a ramp, or a model that joins in (`Turns`), is no leap.
    The weights, the optimizer and the schedule are then those of the checkpoint, and the batches since are left out.
    More than `most` rollbacks end the run.

    Raises:
        RunError: a factor not over 1, a window below 2, or fewer than one rollback.

    Example:
        >>> Rollback(factor=3.0)
        Rollback(factor=3.0, window=100, most=5)
    """

    factor: float = 2.0
    window: int = 100
    most: int = 5

    def __post_init__(self) -> None:
        if not 1 < self.factor < math.inf or self.window < 2 or self.most < 1:
            raise RunError(f"received {self}; expected a factor over 1, a window from 2 up and most from 1 up")


@final
class SpikeWatch:
    """The losses of the last steps.

    Example:
        >>> watch = SpikeWatch(Rollback(factor=2.0, window=3))
        >>> [watch.is_spike(loss) for loss in (1.0, 1.1, 0.9, 1.9, 2.1, 1.0)]
        [False, False, False, False, False, False]
        >>> watch.is_spike(9.0)
        True
    """

    def __init__(self, rollback: Rollback) -> None:
        self.rollback, self.num_rollbacks = rollback, 0
        self._recent: deque[float] = deque(maxlen=rollback.window)

    def is_spike(self, loss: float) -> bool:
        """Whether a loss leaps out of the window; one that does not enters it."""
        is_full = len(self._recent) == self.rollback.window
        if is_full and loss > self.rollback.factor * statistics.median(self._recent):
            return True
        self._recent.append(loss)
        return False

    def count(self, loss: float, step: int, *, back_at: int) -> None:
        """Count a rollback, and say so on the main process.

        Raises:
            RunError: there are too many.
        """
        self.num_rollbacks += 1
        told = f"the loss of step {step} is {loss:.4g}, over {self.rollback.factor:g} times the median before"
        if self.num_rollbacks > self.rollback.most:
            raise RunError(
                f"{told}, and the run has rolled back {self.rollback.most} times; lower the learning rate, clip the "
                f"gradients (clip_norm=1.0), or look at the data"
            )
        if is_main_process():
            warnings.warn(f"{told}; the run continues from step {back_at} with the batches that follow", stacklevel=2)

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs."""
        return {"recent": list(self._recent), "num_rollbacks": self.num_rollbacks}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state; rollbacks since are still counted."""
        self._recent = deque(state["recent"], self.rollback.window)
        self.num_rollbacks = max(self.num_rollbacks, state["num_rollbacks"])
