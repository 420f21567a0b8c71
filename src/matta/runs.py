"""Run folders: checkpoints from which a run goes on as if it had never stopped.

    fit.json             what this folder is
    checkpoint-00001000/ model.safetensors and training.pt, the newest complete one
    best/                the nesting at its best evaluation (matta.load)
    nested/              the nesting at the end (matta.load)
    preconditioner.safetensors  Shampoo's factors at the end, where it was used (matta figure preconditioner)
    tensorboard/         losses, rates and evaluations

A checkpoint is written under another name and renamed when it is complete: whenever a run is killed,
its folder holds one that is whole.
"""

from __future__ import annotations

import json
import os
import pickle
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, final

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from matta.checkpoints import apart, split_state
from matta.errors import CheckpointError, RunError

MARKER: Final = "fit.json"
MODEL: Final = "model.safetensors"
TRAINING: Final = "training.pt"
FORMAT: Final = {"format": "matta.fit", "version": 1}


@final
class RunFolder:
    """A folder that a run writes to.

    Nothing is written until `begin`.

    Raises:
        RunError: the folder exists and is not to be resumed, or is something else.
    """

    def __init__(self, path: str | os.PathLike[str], *, resume: bool) -> None:
        self.path = Path(path)
        if not self.path.exists() or (self.path.is_dir() and not any(self.path.iterdir())):
            return
        if not (self.path / MARKER).is_file():
            raise RunError(f"{self.path} exists and holds no run; expected a new folder: choose another name for run=")
        if not resume:
            raise RunError(
                f"{self.path} exists and holds a run; expected a new folder: go on with resume=True, or choose "
                f"another name for run="
            )
        if json.loads((self.path / MARKER).read_text(encoding="utf-8")) != FORMAT:
            raise RunError(f"{self.path / MARKER} is not of this version of matta; expected {FORMAT}")

    def begin(self) -> None:
        """Make the folder, and clear away what a killed run has left half-written."""
        self.path.mkdir(parents=True, exist_ok=True)
        (self.path / MARKER).write_text(json.dumps(FORMAT), encoding="utf-8")
        for left in self.path.glob(".checkpoint-*"):
            shutil.rmtree(left, ignore_errors=True)

    def checkpoints(self) -> list[Path]:
        """The complete checkpoints, oldest first."""
        return sorted(self.path.glob("checkpoint-*"))

    def save(self, step: int, module: nn.Module, training: Mapping[str, Any]) -> None:
        """Write a checkpoint, unless there is one of this step; then remove the earlier ones."""
        target = self.path / f"checkpoint-{step:08d}"
        if target.exists():
            return
        made = Path(tempfile.mkdtemp(prefix=".checkpoint-", dir=self.path))
        try:
            tensors, others = split_state(module)
            save_file(apart(tensors), made / MODEL)
            torch.save({**training, "extra_state": others}, made / TRAINING)
            for file in made.iterdir():
                _put_on_disk(file)
            made.chmod(0o755)
            made.rename(target)
        finally:
            shutil.rmtree(made, ignore_errors=True)
        for old in self.checkpoints():
            if old != target:
                shutil.rmtree(old, ignore_errors=True)

    def load(self, module: nn.Module) -> dict[str, Any] | None:
        """Put the newest checkpoint's weights into `module`; the rest of the checkpoint, or None if there is none.

        Raises:
            CheckpointError: the checkpoint is damaged or does not fit; the module is then as it was.
        """
        found = self.checkpoints()
        if not found:
            return None
        try:
            tensors = load_file(found[-1] / MODEL)
            training: dict[str, Any] = torch.load(found[-1] / TRAINING, map_location="cpu", weights_only=True)
        except (OSError, RuntimeError, EOFError, SafetensorError, pickle.UnpicklingError) as error:
            raise CheckpointError(
                f"{found[-1]} cannot be read: {error}; remove that folder and begin the run afresh"
            ) from None
        _check_fit(found[-1], tensors, split_state(module)[0])
        module.load_state_dict({**tensors, **training.pop("extra_state")}, strict=False)
        return training


def _check_fit(path: Path, saved: Mapping[str, Tensor], present: Mapping[str, Tensor]) -> None:
    shapes = [{name: tuple(tensor.shape) for name, tensor in each.items()} for each in (saved, present)]
    for name in sorted(shapes[0].keys() | shapes[1].keys()):
        was, now = (each.get(name, "missing") for each in shapes)
        if was != now:
            raise CheckpointError(
                f"{path} does not fit: {name} was {was} in the run and is {now} in the nesting given; expected the "
                f"models that the run was begun with"
            )


def _put_on_disk(file: Path) -> None:
    with file.open("rb") as opened:
        os.fsync(opened.fileno())
