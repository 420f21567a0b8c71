"""Run folders: checkpoints from which a run resumes as if it had never stopped, and Ctrl-C that waits for one.

    fit.json             what this folder is
    checkpoint-00001000/ model.safetensors and training.pt; the newest three are kept
    best/                the nesting at its best evaluation (matta.load)
    nested/              the nesting at the end (matta.load)
    preconditioner.safetensors  Shampoo's factors at the end, where it was used (matta figure preconditioner)
    tensorboard/         losses, rates and evaluations

A checkpoint is written under another name and renamed when it is complete: whenever a run is killed,
its folder holds one that is whole. Every file has a checksum: where the newest checkpoint has been damaged since, the
run resumes from an older one.
"""

from __future__ import annotations

import json
import os
import pickle
import shutil
import signal
import threading
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, final

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from matta.errors import CheckpointError, RunError
from matta.sizes.saving import apart, require_fit, split_state
from matta.sizes.storage import verify, whole_folder, write_json

MARKER: Final = "fit.json"
MODEL: Final = "model.safetensors"
TRAINING: Final = "training.pt"
FORMAT: Final = {"format": "matta.fit", "version": 1}
NUM_KEPT: Final = 3


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
                f"{self.path} exists and holds a run; expected a new folder: continue it with resume=True, or choose "
                f"another name for run="
            )
        try:
            found = json.loads((self.path / MARKER).read_text(encoding="utf-8"))
        except ValueError as error:
            raise RunError(f"{self.path / MARKER} is damaged: {error}; expected {json.dumps(FORMAT)} in it") from None
        if found != FORMAT:
            raise RunError(f"{self.path / MARKER} is not of this version of matta; expected {FORMAT}")

    def begin(self) -> None:
        """Make the folder, and clear away what a killed run has left half-written."""
        self.path.mkdir(parents=True, exist_ok=True)
        write_json(self.path / MARKER, FORMAT)
        for left in self.path.glob(".checkpoint-*"):
            shutil.rmtree(left, ignore_errors=True)

    def checkpoints(self) -> list[Path]:
        """The complete checkpoints, oldest first."""
        return sorted(self.path.glob("checkpoint-*"))

    def save(self, step: int, module: nn.Module, training: Mapping[str, Any]) -> None:
        """Write a checkpoint in place of any of this step; then remove all but the newest ones."""
        with whole_folder(self.path / f"checkpoint-{step:08d}") as made:
            tensors, others = split_state(module)
            save_file(apart(tensors), made / MODEL)
            torch.save({**training, "extra_state": others}, made / TRAINING)
        for old in self.checkpoints()[:-NUM_KEPT]:
            shutil.rmtree(old, ignore_errors=True)

    def load(self, module: nn.Module) -> dict[str, Any] | None:
        """Put the newest whole checkpoint's weights into `module`; the rest of it, or None if there is no checkpoint.

        A damaged checkpoint is passed over with a warning.

        Raises:
            CheckpointError: all checkpoints are damaged, or one does not fit; the module is then as it was.
        """
        damaged: list[str] = []
        for path in reversed(self.checkpoints()):
            try:
                tensors, training = _read(path)
            except CheckpointError as error:
                damaged.append(str(error))
                continue
            require_fit(path, tensors, split_state(module)[0])
            if damaged:
                warnings.warn(f"{'; '.join(damaged)}. The run resumes from {path}, which is whole", stacklevel=2)
            module.load_state_dict({**tensors, **training.pop("extra_state")}, strict=False)
            return training
        if damaged:
            raise CheckpointError(
                f"no checkpoint in {self.path} is whole: {'; '.join(damaged)}; take another copy of the run, or remove "
                f"that folder and begin the run afresh"
            )
        return None


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of a checkpoint, and the rest of it."""
    verify(path)
    try:
        return load_file(path / MODEL), torch.load(path / TRAINING, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, SafetensorError, pickle.UnpicklingError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from None


@final
class Interrupt:
    """Ctrl-C that waits for the end of the step; a second one does not."""

    def __init__(self, *, enabled: bool) -> None:
        is_main = threading.current_thread() is threading.main_thread()
        self._enabled = enabled and is_main and signal.getsignal(signal.SIGINT) is signal.default_int_handler
        self.came = False

    def __enter__(self) -> Interrupt:
        if self._enabled:
            signal.signal(signal.SIGINT, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        if self._enabled:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    def _note(self, *_: object) -> None:
        if self.came:
            raise KeyboardInterrupt
        self.came = True
