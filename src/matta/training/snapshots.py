"""Publish the Student, or any sub-models, while training continues, for a server to swap in.

    00000012/          a version: <model>.safetensors for each model, encoder.json, snapshot.json, and checksums
    latest             the name of the newest version

A version is written under another name, put on disk and renamed; then `latest` is replaced, which is a rename
too. Whenever the writer is killed, `latest` names a version that is whole.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol, final

from safetensors import SafetensorError
from safetensors.torch import load_model, save_model
from torch import Tensor, nn

from matta.errors import DAMAGE, CheckpointError, MattaError, RunError
from matta.nesting.batches import Batch, split_labels
from matta.nesting.nested import Nested
from matta.nesting.sharded_slices import is_sharded
from matta.objectives.labels import num_examples
from matta.sizes.extraction import extract, warn_of_statistics
from matta.sizes.storage import verify, whole_file, whole_folder
from matta.sizes.submodels import SubModel
from matta.training.cotraining import CoTraining
from matta.training.processes import gathered, is_main_process
from matta.training.step_output import CoTrainingOutput

LATEST: Final = "latest"
DESCRIPTION: Final = "snapshot.json"
ENCODER: Final = "encoder.json"
FORMAT: Final = {"format": "matta.snapshot", "format_version": 1}
_TRIES: Final = 50


class HasState(Protocol):
    """What is published beside the modules, such as a stream's `encoder`."""

    def state_dict(self) -> Mapping[str, Any]:
        """The state to be published, in JSON types."""


@final
@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """A published module, in eval mode. `encoder` is for `matta.streams.Encoder.from_state`; time is since 1970."""

    module: nn.Module
    version: int
    events: int
    time_s: float
    encoder: dict[str, Any] | None


@final
class Snapshots:
    """An observer for `matta.fit` that publishes modules into a folder.

    Of several processes the main one publishes, and the events of all count.

    Args:
        folder: Where to; made if it is not there.
        every_events: Publish after so many events, counted over restarts.
        every_s: Publish after so many seconds. Of these two at least one is needed.
        models: Sub-models by name; None is the Student.
        keep: How many versions stay. A reader needs no more than two.
        encoder: What makes batches of raw events; its state is published with the modules.

    Raises:
        RunError: settings that cannot work.

    Example:
        >>> import matta, tempfile
        >>> nested = matta.nest(nn.Linear(3, 1), nn.Linear(3, 1))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     snapshots = Snapshots(folder, every_events=1000)
        ...     version = snapshots.publish(nested)
        ...     snapshot = matta.read_snapshot(folder, lambda: nn.Linear(3, 1))
        >>> snapshot.version, snapshot.module
        (1, Linear(in_features=3, out_features=1, bias=True))
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        every_events: int | None = None,
        every_s: float | None = None,
        models: Mapping[str, SubModel | None] | None = None,
        keep: int = 3,
        encoder: HasState | None = None,
    ) -> None:
        given = [each for each in (every_events, every_s) if each is not None]
        if not given or min(given) <= 0 or keep < 1:
            raise RunError(
                f"received every_events={every_events}, every_s={every_s} and keep={keep}; expected one of the "
                f"first two, over 0, and to keep at least one"
            )
        self.folder = Path(folder).absolute()
        self.models = {"student": None} if models is None else dict(models)
        for name in self.models:
            if not name.replace("_", "").replace("-", "").isalnum():
                raise RunError(
                    f"received a model named {name!r}; expected letters, digits, '-' and '_': it names a file"
                )
        self._every_events, self._every_s, self._keep, self._encoder = every_events, every_s, keep, encoder
        self._events, self._published_events, self._published_at = 0, 0, time.monotonic()

    def before_step(self, cotrain: CoTraining, batch: Batch, out: CoTrainingOutput) -> None:
        """Count the events."""
        labels = split_labels(batch)[1]
        count = num_examples((out.ta_logits if out.trains_ta else out.student_logits) if labels is None else labels)
        self._events += sum(gathered(count))

    def after_step(self, cotrain: CoTraining) -> None:
        """Publish, if it is time."""
        since = self._events - self._published_events
        is_due = self._every_events is not None and since >= self._every_events
        is_late = self._every_s is not None and time.monotonic() - self._published_at >= self._every_s
        if (is_due or is_late) and is_main_process():
            self.publish(cotrain.nested)

    def publish(self, nested: Nested) -> int:
        """Publish now; the number of the version. Of several processes, only one may call it.

        Raises:
            RunError: the nesting is sharded over processes.
        """
        if is_sharded(nested):
            raise RunError(
                "received a nesting that is sharded over processes to publish; expected a whole one: leave Snapshots "
                "out, and take models from the checkpoints of the run"
            )
        warn_of_statistics(nested, self.models, "call matta.recalibrate(module, batches) on what read_snapshot gives")
        self.folder.mkdir(parents=True, exist_ok=True)
        version = max((int(each.name) for each in _versions(self.folder)), default=0) + 1
        with whole_folder(self.folder / f"{version:08d}") as made:
            self._write(made, nested, version)
        with whole_file(self.folder / LATEST) as pointer:
            pointer.write_text(f"{version:08d}", encoding="utf-8")
        self._published_events, self._published_at = self._events, time.monotonic()
        self._clear(version)
        return version

    def _write(self, made: Path, nested: Nested, version: int) -> None:
        for name, spec in self.models.items():
            module = extract(nested, spec)
            if others := [key for key, value in module.state_dict().items() if not isinstance(value, Tensor)]:
                raise RunError(
                    f"{name} keeps {others[0]} in its state, which is not a tensor, and a snapshot holds only tensors; "
                    f"expected none (get_extra_state): publish with matta.save instead"
                )
            save_model(module, str(made / f"{name}.safetensors"))
        if self._encoder is not None:
            (made / ENCODER).write_text(json.dumps(self._encoder.state_dict()), encoding="utf-8")
        description = {"version": version, "events": self._events, "time_s": time.time()}
        (made / DESCRIPTION).write_text(json.dumps({**FORMAT, **description}, indent=1), encoding="utf-8")

    def _clear(self, version: int) -> None:
        """Remove old versions, each renamed first: what has a version's name is whole."""
        for old in _versions(self.folder):
            if int(old.name) <= version - self._keep:
                old.rename(self.folder / f".removing-{old.name}")
        for left in (*self.folder.glob(".removing-*"), *self.folder.glob(".[0-9]*-*")):
            shutil.rmtree(left, ignore_errors=True)

    def state_dict(self) -> dict[str, Any]:
        """The events counted."""
        return {"events": self._events, "published_events": self._published_events}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Count on from a state."""
        self._events, self._published_events = state["events"], state["published_events"]


def read_snapshot(
    folder: str | os.PathLike[str],
    build: Callable[[], nn.Module],
    *,
    model: str = "student",
    version: int | None = None,
) -> Snapshot:
    """The newest version of a model, or a certain one.

    Safe while a writer publishes or is killed: it gives a version that is whole, or none.

    Args:
        folder: Where `Snapshots` publishes.
        build: Gives a fresh module of the model's architecture.
        model: The model's name there.
        version: Its number; None: the newest.

    Raises:
        CheckpointError: there is no (such) version, it has no such model, it does not fit the module, or it is damaged.
        MattaError: `build` is a module and not a function that builds one.

    Example:
        >>> import matta, tempfile
        >>> nested = matta.nest(nn.Linear(3, 1), nn.Linear(3, 1))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     version = matta.Snapshots(folder, every_s=60).publish(nested)
        ...     snapshot = read_snapshot(folder, lambda: nn.Linear(3, 1))
        >>> bool((snapshot.module.weight == nested.student.weight).all())
        True
    """
    if isinstance(build, nn.Module):
        kind = type(build).__name__
        raise MattaError(f"received a {kind} as build; expected a function that builds one: lambda: {kind}(...)")
    if version is not None:
        chosen = Path(folder) / f"{version:08d}"
        if not chosen.is_dir():
            present = ", ".join(str(int(each.name)) for each in _versions(Path(folder))) or "none"
            raise CheckpointError(f"{folder} has no version {version}; it has: {present}")
        return _read(chosen, build, model)
    for _ in range(_TRIES):  # a version may be removed while it is read: there is a newer one then
        newest = newest_version(Path(folder))
        try:
            return _read(newest, build, model)
        except (FileNotFoundError, CheckpointError):
            if (newest / DESCRIPTION).exists():
                raise
            time.sleep(0.01)
    raise CheckpointError(f"{newest} is not whole, though {LATEST} names it; publish again")


def _read(version: Path, build: Callable[[], nn.Module], model: str) -> Snapshot:
    weights = version / f"{model}.safetensors"
    verify(version, weights.name, ENCODER, DESCRIPTION)
    try:
        description = _read_json(version / DESCRIPTION)
        own = {name: description[name] for name in ("version", "events", "time_s")}
    except KeyError as error:
        raise CheckpointError(f"{version / DESCRIPTION} is damaged: {error!r}; publish again") from None
    if not weights.is_file() or weights.name != f"{model}.safetensors":
        models = ", ".join(sorted(each.stem for each in version.glob("*.safetensors")))
        raise CheckpointError(f"{version} has no model {model!r}; it has: {models}")
    module = build()
    try:
        load_model(module, str(weights))
    except (RuntimeError, SafetensorError) as error:
        raise CheckpointError(f"{weights} does not fit the module that build gave: {error}") from None
    encoder = version / ENCODER
    state = _read_json(encoder) if encoder.is_file() else None
    return Snapshot(module=module.eval(), encoder=state, **own)


def _read_json(file: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(file.read_text(encoding="utf-8")))
    except DAMAGE as error:
        raise CheckpointError(f"{file} is damaged: {error!r}; publish again") from None


def newest_version(folder: Path) -> Path:
    """The folder of the newest version.

    Raises:
        CheckpointError: there is none, or what names it is damaged.
    """
    try:
        name = (folder / LATEST).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise CheckpointError(f"{folder} holds no snapshot; expected what matta.Snapshots published") from None
    except ValueError:
        name = "what is no text"
    if not re.fullmatch("[0-9]{1,20}", name):
        raise CheckpointError(f"{folder / LATEST} is damaged: it names {name:.50}; expected a version: publish again")
    return folder / name


def _versions(folder: Path) -> list[Path]:
    return sorted(each for each in folder.glob("*") if each.name.isdigit() and each.is_dir())
