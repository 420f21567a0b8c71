"""Run folders: checkpoints from which a run resumes as if it had never stopped.

    fit.json             what this folder is
    lock                 held by the process that writes here
    checkpoint-00001000/ model.safetensors, and optimizer, data position and the rest in training.safetensors and
                         training.json; of a sharded run the shares of its processes (matta.training.checkpoint_shares);
                         the newest three are kept
    nonfinite/           batches whose loss or gradient was not finite (matta.training.plain_state.read_state)
    best/                the nesting at its best evaluation (matta.load)
    nested/              the nesting at the end (matta.load)
    preconditioner.safetensors  Shampoo's factors at the end, where it was used (matta figure preconditioner)
    tensorboard/         losses, rates and evaluations

A checkpoint is a copy of the run in memory, which a thread writes while training continues. It is written under
another name and renamed when it is complete: whenever a run is killed, its folder holds one that is whole. Every file
has a checksum: where the newest checkpoint has been damaged since, the run resumes from an older one. Nothing is
pickled.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import warnings
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, final

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from matta.errors import DAMAGE, CheckpointError, MattaError, RunError, first_line
from matta.nesting.batches import Batch
from matta.nesting.nested import Nested
from matta.nesting.sharded_slices import is_sharded, placed
from matta.sizes.saving import held_state, require_fit, save_from
from matta.sizes.storage import put_back, verify, whole_folder, write_json
from matta.sizes.weight_files import weights_in
from matta.training.checkpoint_shares import TRAINING, SavedShares, Share, ShareWriter, has_shares, require_types
from matta.training.plain_state import PackedState, cpu_copy, read_state
from matta.training.processes import gathered, is_main_process, of_main, raise_together

if TYPE_CHECKING:
    from filelock import FileLock

MARKER: Final = "fit.json"
MODEL: Final = "model.safetensors"
LOCK: Final = "lock"
NESTED: Final = "nested"
FORMAT: Final = {"format": "matta.fit", "version": 2}
NUM_KEPT: Final = 3
ASIDE: Final = "nonfinite"
NUM_ASIDE: Final = 8
_NO_LOCKS: Final = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)
_CHECKPOINT: Final = re.compile(r"checkpoint-\d{8,}")


@final
class RunFolder:
    """A folder that a run writes to.

    Nothing is written until `begin`.

    Raises:
        RunError: the folder exists and is not to be resumed, or is something else.
    """

    def __init__(self, path: str | os.PathLike[str], *, resume: bool) -> None:
        self.given = os.fspath(path)
        self.path = Path(path).absolute()  # a run that changes its working directory writes here all the same
        self._has_begun = False
        self._held: FileLock | None = None
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="matta.checkpoint")
        self._writing: Future[None] | None = None
        self._shares: ShareWriter | None = None
        if self.path.is_symlink() and not self.path.exists():
            raise RunError(
                f"{self.path} is a link to {self.path.readlink()}, which is not there; make that folder first"
            )
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
        except DAMAGE as error:
            raise RunError(f"{self.path / MARKER} is damaged: {error}; expected {json.dumps(FORMAT)} in it") from None
        if found != FORMAT:
            raise RunError(
                f"{self.path / MARKER} says {json.dumps(found)}, and this version of matta reads {json.dumps(FORMAT)}; "
                f"resume the run with the version that began it, or begin a new run"
            )

    def begin(self) -> None:
        """Make the folder, lock it, and clear away what a killed run has left half-written.

        Raises:
            RunError: another process is writing there.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        self._lock()
        write_json(self.path / MARKER, FORMAT)
        self._has_begun = True
        put_back(self.path)
        for left in (each for name in ("checkpoint", "best", NESTED) for each in self.path.glob(f".{name}-*")):
            shutil.rmtree(left, ignore_errors=True)

    def checkpoints(self) -> list[Path]:
        """The complete checkpoints, oldest first."""
        return checkpoints_in(self.path)

    def _lock(self) -> None:
        from filelock import FileLock, Timeout

        if self._held is not None:
            return
        try:
            self._held = FileLock(self.path / LOCK, blocking=False)
            self._held.acquire()
        except Timeout:
            self._held = None
            raise RunError(
                f"{self.path} is in use: another process trains there; wait for its end, or choose another run="
            ) from None
        except (NotImplementedError, OSError) as error:
            self._held = None
            if not _has_no_locks(error):
                raise

    def _make_again(self) -> None:
        """Begin anew where the folder has been moved or removed since: what is written can then be resumed."""
        if self._has_begun and not (self.path / MARKER).is_file():
            warnings.warn(
                f"{self.path} has been moved or removed while the run trains; it is made again, with the checkpoints "
                f"from here on",
                stacklevel=2,
            )
            self._release()
            try:
                self.begin()
            except OSError as error:
                raise RunError(f"{self.path} cannot be made again: {error}; mend that, and begin afresh") from None

    def _release(self) -> None:
        if self._held is not None:
            self._held.release()
            self._held = None

    def save(self, step: int, module: nn.Module, training: Mapping[str, Any]) -> None:
        """Copy a checkpoint, to be written while training continues, in place of any of this step.

        Raises:
            RunError: the checkpoint before could not be written.
            CheckpointError: the state holds something that is neither a tensor nor a plain type.
        """
        self.wait()
        self._make_again()
        tensors, others = held_state(module)
        copies = {name: cpu_copy(tensor) for name, tensor in tensors.items()}
        packed = PackedState({**training, "extra_state": others})
        self._writing = self._writer.submit(self._write, step, copies, packed)

    def save_shares(
        self,
        step: int,
        module: nn.Module,
        optimizer: torch.optim.Optimizer,
        training: Mapping[str, Any],
        own: Mapping[str, Any],
    ) -> None:
        """As `save`, of a sharded module; all processes call this, each with a state of its `own`, and each writes.

        Raises:
            RunError: the checkpoint before could not be written.
            CheckpointError: the state holds something that is neither a tensor nor a plain type.
        """
        self.wait()
        self._make_again()
        self._shares = self._shares or ShareWriter()
        share = self._shares.copy(module, optimizer, training, own)
        self._writing = self._writer.submit(self._write_share, step, self._shares, share)

    def save_nested(self, step: int, nested: Nested) -> None:
        """Write the nesting at the end of the run, from the checkpoint of its last step; one process does this."""
        checkpoint = self._checkpoint(step)
        weights = weights_in(checkpoint if has_shares(checkpoint) else checkpoint / MODEL)
        save_from(weights, "nested.", nested, self.path / NESTED)

    def wait(self) -> None:
        """Return when the last checkpoint is on disk.

        Raises:
            RunError: it could not be written.
        """
        writing, self._writing = self._writing, None
        try:
            if writing is not None:
                writing.result()
        except (OSError, SafetensorError, CheckpointError) as error:
            whole = self.checkpoints()
            remedy = f"mend that, and resume from {whole[-1].name}" if whole else "mend that, and begin afresh"
            raise RunError(f"a checkpoint could not be written to {self.path}: {error}; {remedy}") from None

    def wait_together(self) -> None:
        """Return when the last checkpoints of all processes are on disk; all call this.

        Raises:
            RunError: one could not be written.
        """
        failed: Exception | None = None
        try:
            self.wait()
        except RunError as error:
            failed = error
        raise_together(failed)

    def close(self) -> None:
        """Wait for the last checkpoint, and let others write here.

        Raises:
            RunError: it could not be written.
        """
        try:
            self.wait()
        finally:
            if self._shares is not None:
                self._shares.close()
                self._shares = None
            self._release()

    def _write(self, step: int, tensors: dict[str, Tensor], training: PackedState) -> None:
        """Write a checkpoint; then remove all but the newest ones."""
        with whole_folder(self._checkpoint(step)) as made:
            save_file(tensors, made / MODEL)
            training.write(made, TRAINING)
        self._remove_old()

    def _write_share(self, step: int, writer: ShareWriter, share: Share) -> None:
        """Write this process's part of a checkpoint; then, on the main one, remove all but the newest ones."""
        writer.write(share, self._checkpoint(step))
        if is_main_process():
            self._remove_old()

    def _checkpoint(self, step: int) -> Path:
        return self.path / f"checkpoint-{step:08d}"

    def _remove_old(self) -> None:
        for old in self.checkpoints()[:-NUM_KEPT]:
            shutil.rmtree(old, ignore_errors=True)

    def put_aside(self, name: str, batches: Sequence[Batch]) -> Path | None:
        """Write batches that did harm, to be looked at, of the first few steps; where they are, or None."""
        aside = self.path / ASIDE
        if not (aside / f"{name}.json").exists() and len(list(aside.glob("*.json"))) < NUM_ASIDE:
            try:
                aside.mkdir(exist_ok=True)
                PackedState({"batches": list(batches)}).write(aside, name)
            except (CheckpointError, OSError, SafetensorError):  # other types, or a full disk: no harm to the run
                for half in aside.glob(f"{name}.*"):
                    half.unlink()
        return aside if aside.is_dir() and any(aside.iterdir()) else None

    def load(
        self, module: nn.Module, optimizer: torch.optim.Optimizer, *, converts: bool = False
    ) -> dict[str, Any] | None:
        """Put the newest whole checkpoint's weights into `module`; the rest of it, or None if there is no checkpoint.

        A damaged checkpoint is passed over with a warning. All processes call this; of shares each reads those of
        `module` and of the state of `optimizer` that it holds. With `converts` the types of tensors may differ.

        Raises:
            CheckpointError: all checkpoints are damaged, or one does not fit; the module is then as it was.
        """
        damaged: list[str] = []
        for name, is_shared in of_main([(each.name, has_shares(each)) for each in reversed(self.checkpoints())]):
            path = self.path / name
            try:
                saved = _opened(path, is_shared=is_shared)
            except CheckpointError as error:
                damaged.append(str(error))
                continue
            saved.require_fit(module, converts=converts)
            if damaged and is_main_process():
                warnings.warn(f"{'; '.join(damaged)}. The run resumes from {path}, which is whole", stacklevel=2)
            return saved.load(module, optimizer)
        if damaged:
            raise CheckpointError(
                f"no checkpoint in {self.path} is whole: {'; '.join(damaged)}; take another copy of the run, or remove "
                f"that folder and begin the run afresh"
            )
        return None


def checkpoints_in(folder: Path) -> list[Path]:
    """The complete checkpoints of a run folder, oldest first; copies of other names are the user's own."""
    named = [each for each in folder.glob("checkpoint-*") if _CHECKPOINT.fullmatch(each.name) and each.is_dir()]
    return sorted(named, key=lambda each: int(each.name.removeprefix("checkpoint-")))


def _opened(path: Path, *, is_shared: bool) -> SavedShares | _SavedWhole:
    """A checkpoint that is whole as every process sees it; else all pass over it, and resume from the same one.

    Raises:
        CheckpointError: it is damaged, or a process cannot read it.
    """
    saved, fault = None, None
    try:
        saved = SavedShares(path) if is_shared else _SavedWhole(path)
    except CheckpointError as error:
        fault = str(error)
    faults = [each for each in gathered(fault) if each is not None]
    if saved is None or faults:
        raise CheckpointError(faults[0])
    return saved


def _has_no_locks(error: Exception) -> bool:
    """Whether a file system has no locks, as some that machines share."""
    return isinstance(error, NotImplementedError) or getattr(error, "errno", None) in _NO_LOCKS


@contextmanager
def resuming(folder: Path) -> Iterator[None]:
    """While a state that was read is taken up.

    Raises:
        CheckpointError: it is of another form than expected.
    """
    try:
        yield
    except MattaError:
        raise
    except (RuntimeError, *DAMAGE) as error:
        raise CheckpointError(
            f"{checkpoints_in(folder)[-1]} cannot be resumed from: {first_line(error)!r} ({type(error).__name__}); "
            f"remove it to resume from the one before, or take another copy of the run"
        ) from error


def is_in_use(folder: Path) -> bool:
    """Whether a process holds a run folder."""
    from filelock import FileLock, Timeout

    if not (folder / LOCK).exists():
        return False
    try:
        with FileLock(folder / LOCK, blocking=False):
            return False
    except Timeout:
        return True
    except (NotImplementedError, OSError) as error:
        return not _has_no_locks(error)


@final
class _SavedWhole:
    """A checkpoint that one process has written, whole; it is read into memory.

    Raises:
        CheckpointError: it is damaged.
    """

    def __init__(self, path: Path) -> None:
        verify(path)
        self.path = path
        try:
            self._tensors, self._training = load_file(path / MODEL), read_state(path, TRAINING)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{path} cannot be read: {error}") from None

    def require_fit(self, module: nn.Module, *, converts: bool) -> None:
        """Refuse another module than the one saved."""
        require_fit(self.path, self._tensors, held_state(module)[0])
        require_types(self.path, {} if converts else self._tensors, held_state(module)[0])

    def load(self, module: nn.Module, _: torch.optim.Optimizer) -> dict[str, Any]:
        """Put the weights into `module`; the rest of it."""
        present = placed(self._tensors, module) if is_sharded(module) else self._tensors
        module.load_state_dict({**present, **self._training.pop("extra_state")}, strict=False)
        return self._training
