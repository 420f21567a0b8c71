"""`matta runs`: what the run folders below a folder have come to, of `matta train` and of `matta.fit`."""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, final

from matta.errors import DAMAGE, RunError, first_line
from matta.lm.command_settings import RunsSettings
from matta.training.checkpoint_shares import TRAINING
from matta.training.reporting import output_console, rich_table
from matta.training.run_folder import MARKER, NESTED, checkpoints_in, is_in_use

COLUMNS = ("run", "state", "step", "student", "ta", "distill", "skipped", "checkpoint")


@final
@dataclass(frozen=True, kw_only=True)
class ListedRun:
    """A run folder. `step`, `losses` (nats, last logged) and `skipped` steps are those of the newest checkpoint.

    `state` is "running" (a process holds the folder), "ended" (its nesting is there) or "stopped".
    """

    path: str
    state: str
    step: int
    losses: dict[str, float]
    skipped: int
    checkpoint_time: str | None
    fault: str | None


def run(settings: RunsSettings) -> dict[str, Any]:
    """Print the runs, newest checkpoint first.

    Raises:
        RunError: there is no such folder.
    """
    top = settings.below or settings.folder
    if not top.is_dir():
        raise RunError(f"{top} is no folder; expected one with runs: matta runs DIR")
    folders = [marker.parent for marker in top.rglob(MARKER)]
    found = sorted(map(listed, folders), key=lambda each: each.checkpoint_time or "", reverse=True)
    console = output_console()
    console.print(rich_table(f"{top}: {len(found)} run(s)", COLUMNS, [_row(each) for each in found]))
    for each in found:
        if each.fault:
            console.print(f"{each.path}: {each.fault}", highlight=False)
    return {"runs": [asdict(each) for each in found]}


def listed(folder: Path) -> ListedRun:
    """What a run folder tells of itself; nothing but the summary of its newest checkpoint is read."""
    state = "running" if is_in_use(folder) else "ended" if (folder / NESTED).is_dir() else "stopped"
    checkpoints = checkpoints_in(folder)
    losses: dict[str, float] = {}
    skipped, fault = 0, None
    if checkpoints:
        try:
            values = json.loads((checkpoints[-1] / f"{TRAINING}.json").read_text(encoding="utf-8"))
            losses = {name: each for name, each in values["losses"].items() if isinstance(each, float)}
            skipped = int(values["num_skipped"])
        except (OSError, *DAMAGE) as error:
            fault = f"{checkpoints[-1].name} cannot be read: {first_line(error)}"
    written = datetime.fromtimestamp(checkpoints[-1].stat().st_mtime) if checkpoints else None
    return ListedRun(
        path=str(folder),
        state=state,
        step=int(checkpoints[-1].name.rpartition("-")[2]) if checkpoints else 0,
        losses=losses,
        skipped=skipped,
        checkpoint_time=None if written is None else written.isoformat(sep=" ", timespec="seconds"),
        fault=fault,
    )


def _row(found: ListedRun) -> list[str]:
    losses = [f"{found.losses[name]:.4f}" if name in found.losses else "–" for name in ("student", "ta", "distill")]
    return [found.path, found.state, f"{found.step:,}", *losses, str(found.skipped), _ago(found.checkpoint_time)]


def _ago(when: str | None) -> str:
    """How long ago, in the largest unit.

    Example:
        >>> _ago(datetime.fromtimestamp(time.time() - 7300).isoformat()), _ago(None)
        ('2 h ago', '–')
    """
    if when is None:
        return "–"
    seconds = max(time.time() - datetime.fromisoformat(when).timestamp(), 0)
    for unit, size in (("d", 86_400), ("h", 3_600), ("min", 60)):
        if seconds >= size:
            return f"{seconds / size:.0f} {unit} ago"
    return f"{seconds:.0f} s ago"
