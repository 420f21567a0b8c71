"""What a run shows: a progress bar, values for trackers such as TensorBoard, and tables.

Losses stay on the device until something is shown; only then does the host wait for them.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, final

import torch
from torch import Tensor

from matta.errors import RunError
from matta.objectives.losses import divisor
from matta.training.processes import num_processes, summed
from matta.training.step_output import CoTrainingOutput

if TYPE_CHECKING:
    from accelerate.tracking import GeneralTracker
    from rich.console import Console
    from rich.table import Table

REFRESH_SECONDS: Final = 0.5
FILE_WIDTH: Final = 200  # characters of a line where there is no terminal
LOSSES: Final = ("student", "ta", "distill")


def require_installed(package: str) -> None:
    """Refuse to continue without a package of the `fit` extra.

    Raises:
        RunError: it is not installed.
    """
    try:
        __import__(package)
    except ModuleNotFoundError:
        raise RunError(f"matta.fit needs {package}, which is not installed; pip install 'matta[fit]'") from None


@final
class Losses:
    """The losses of the steps since they were last read, over all processes, still on the device."""

    def __init__(self) -> None:
        self.means: dict[str, float] = {}
        self.latest: tuple[Tensor, ...] = ()
        self._unread: list[tuple[Tensor, ...]] = []

    def add(self, outputs: Sequence[CoTrainingOutput]) -> None:
        """Take in the batches of a step; in one process nothing is computed, of several the means are taken."""
        rows = [_row(out) for out in outputs]
        if num_processes() > 1:
            rows = [tuple(_means(summed(_sums(rows))))]
        losses, counts = ([each.sum() for each in part] for part in (rows[-1][:3], rows[-1][3:]))
        earlier = self.latest or losses
        shown = (torch.where(n > 0, new, old) for new, old, n in zip(losses, earlier, counts, strict=False))
        self.latest = (*shown, outputs[-1].distill_weight)
        self._unread += rows

    def read(self) -> dict[str, float]:
        """The means since the last reading; the last ones again of what was not trained since, none if it never was."""
        if self._unread:
            means, counts = _means(_sums(self._unread)).reshape(6, -1).sum(1).tensor_split(2)
            rows = zip(LOSSES, means.tolist(), counts.tolist(), strict=True)
            self.means |= {name: mean for name, mean, count in rows if count}
            self._unread = []
        return self.means

    def unread(self) -> list[Any]:
        """What was taken in since the last reading, as plain numbers: sums, and the numbers of labels."""
        return _sums(self._unread).tolist() if self._unread else []

    def load(self, means: Mapping[str, float], unread: list[Any], device: torch.device) -> None:
        """Continue from means that were read, and from what was not."""
        self.means, self.latest = dict(means), ()
        sums = torch.tensor(unread, dtype=torch.float64, device=device)
        self._unread = [tuple(_means(sums))] if unread else []


def _row(out: CoTrainingOutput) -> tuple[Tensor, ...]:
    """The losses of a batch, and of how many labels each is the mean: none where a step has left the model out.

    Of several heads each is a vector: what the heads add, each a mean over labels of its own.
    """
    took_part = (out.trains_students, out.trains_ta, out.trains_students and out.trains_ta)
    if out.head_losses is not None:
        return *out.head_losses.unbind(), *(out.num_labels * part for part in took_part)
    count = out.num_labels.sum()
    return out.student_loss, out.ta_loss, out.distill_loss, *(count * part for part in took_part)


def _sums(rows: Sequence[tuple[Tensor, ...]]) -> Tensor:
    """The sum of each loss over the labels of some batches, and the numbers of these."""
    losses, counts = torch.stack([torch.stack([each.double() for each in row]) for row in rows]).tensor_split(2, dim=1)
    return torch.cat([torch.where(counts > 0, losses * counts, 0.0).sum(0), counts.sum(0)])


def _means(sums: Tensor) -> Tensor:
    """What `_sums` gave, as means and the numbers of labels."""
    totals, counts = sums.tensor_split(2)
    return torch.cat([totals / divisor(counts), counts])


def logged(
    losses: Mapping[str, float],
    rates: Sequence[float | Tensor],
    norm: Tensor | None,
    distill_weight: Tensor,
    num_skipped: int,
) -> dict[str, float]:
    """The values of a step for trackers, by name."""
    names = ["learning_rate", *(f"learning_rate_{index}" for index in range(1, len(rates)))]
    return {
        **{f"loss/{name}": value for name, value in losses.items()},
        **{name: float(rate) for name, rate in zip(names, rates, strict=True)},
        **({} if norm is None else {"gradient_norm": float(norm)}),
        "distill_weight": float(distill_weight),
        "skipped_steps": num_skipped,
    }


def rates_of(optimizer: torch.optim.Optimizer) -> list[float | Tensor]:
    """The learning rate of each group, which a scheduler may change in place."""
    rates = [group["lr"] for group in optimizer.param_groups]
    return [rate.clone() if isinstance(rate, Tensor) else rate for rate in rates]


@final
class Bar:
    """The progress bar, on standard error."""

    def __init__(self, total: int | None, step: int) -> None:
        require_installed("rich")
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[shown]}"),
        )
        # A thread of its own would take the interpreter from the loop.
        self._progress = Progress(*columns, console=Console(stderr=True), auto_refresh=False)
        self._task = self._progress.add_task("", total=total, completed=step, shown="")
        self._next = 0.0
        self._progress.start()

    def is_due(self) -> bool:
        """Whether the bar has stood still for long enough."""
        return time.monotonic() >= self._next

    def show(self, step: int, latest: Sequence[Tensor]) -> None:
        """Draw the bar, with the losses of a batch and the distillation weight (see `Losses.latest`)."""
        shown = "  ".join(f"{name} {float(loss):.4f}" for name, loss in zip(LOSSES, latest, strict=False))
        weight = f"  ω {float(latest[-1]):.2f}" if latest else ""
        self._progress.update(self._task, completed=step, shown=shown + weight)
        self._progress.refresh()
        self._next = time.monotonic() + REFRESH_SECONDS

    def close(self) -> None:
        """Leave the bar as it is."""
        self._progress.stop()


def tensorboard(run: Path, step: int) -> GeneralTracker:
    """Accelerate's TensorBoard tracker of a run; what an interrupted run wrote beyond `step` is purged."""
    require_installed("tensorboard")
    from accelerate.tracking import TensorBoardTracker

    tracker = TensorBoardTracker("tensorboard", run, purge_step=step + 1 if step else None)
    tracker.start()
    return tracker


def recorded(run: Path) -> dict[str, list[tuple[float, float]]]:
    """What TensorBoard's files in the folder of a run hold: by name, the steps and values; nothing without files."""
    if not (run / "tensorboard").is_dir():
        return {}
    require_installed("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0}).Reload()  # 0: all of them
    return {
        name: [(float(each.step), float(each.value)) for each in events.Scalars(name)]
        for name in events.Tags()["scalars"]
    }


def output_console() -> Console:
    """Standard output: tables as narrow as the terminal, or in a file or pipe, whatever their width."""
    from rich.console import Console

    console = Console()
    return console if console.is_terminal else Console(width=FILE_WIDTH)


def rich_table(
    title: str, columns: Sequence[str], rows: Iterable[Sequence[str]], *, left: Sequence[str] | None = None
) -> Table:
    """A table for the terminal; the columns that `left` does not name (none: but the first) are set to the right."""
    from rich import box
    from rich.table import Table

    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for column in columns:
        table.add_column(column, justify="left" if column in (left or columns[:1]) else "right", overflow="fold")
    for row in rows:
        table.add_row(*row)
    return table


def markdown_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in markdown.

    Example:
        >>> print(markdown_table(["a", "b"], [["1", "2"]]))
        | a | b |
        |---|---|
        | 1 | 2 |
    """
    lines = [f"| {' | '.join(line)} |" for line in (columns, *rows)]
    return "\n".join([lines[0], "|---" * len(columns) + "|", *lines[1:]])


def ranges(indices: Sequence[int]) -> str:
    """Numbers with neighbours drawn together.

    Example:
        >>> ranges([0, 1, 2, 5, 8, 9])
        '0-2, 5, 8-9'
    """
    starts = [i for i in indices if i - 1 not in indices]
    ends = [i for i in indices if i + 1 not in indices]
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in zip(starts, ends, strict=True))


def millions(count: int) -> str:
    """A number of parameters, to four digits.

    Example:
        >>> millions(354_823_168), millions(59_424)
        ('354.8 M', '59,424')
    """
    return f"{count / 1e6:,.1f} M" if count >= 1e6 else f"{count:,}"
