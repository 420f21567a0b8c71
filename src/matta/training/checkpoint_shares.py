"""Checkpoints by shares: each process of a sharded run writes what it holds, and reads what it is to hold.

    shard-00001-…       the tensors that the first process holds: its rows of the weights and of the optimizer's state
                        (of Shampoo's the strips of blocks that it owns), and its random states
    process-00000.json  its place in the data
    training.json       everything else, of the first process
    CRC32SUMS           the checksums of all files: written last, by the first process, when all have written theirs

The tensors are written and read by `torch.distributed.checkpoint` as safetensors, whose headers say which part of a
tensor is where; any number of processes can read them. A process makes the checksums of its own files. On a fault of
any, all are told, and the folder does not take its place.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, final, overload

import torch
from torch import Tensor, distributed, nn

from matta.errors import DAMAGE, CheckpointError
from matta.optim.divided_parameters import is_sharded
from matta.optim.exchange import strip_index
from matta.optim.group_step import owned_strips
from matta.optim.shampoo import Shampoo
from matta.sizes.saving import held_state, require_fit
from matta.sizes.storage import SUMS, has_checksums, read_checksums, verify
from matta.sizes.weight_files import SHARD
from matta.training.plain_state import PackedState, unpacked
from matta.training.processes import PATIENCE, gathered, is_main_process, num_processes, process_rank

TRAINING: Final = "training"
PROCESS: Final = "process-"
OPTIMIZER: Final = "optimizer."
"""Before the number of a parameter and the name of a part of its state."""


@final
@dataclass(frozen=True, kw_only=True)
class Share:
    """A copy of what this process writes of a checkpoint: tensors by name, and texts by file name."""

    tensors: Mapping[str, Tensor]
    texts: Mapping[str, str]


@final
class ShareWriter:
    """Writes checkpoints of a sharded run. All its processes make one, and then call each method together."""

    def __init__(self) -> None:
        from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

        has_device = torch.cuda.is_available()
        options = StagingOptions(
            use_pinned_memory=has_device,
            use_shared_memory=False,
            use_async_staging=False,
            use_non_blocking_copy=has_device,
        )
        self._stager = DefaultStager(options)
        # of its own: training sends messages meanwhile
        self._group: Any = distributed.new_group(backend="gloo", timeout=PATIENCE)

    def copy(
        self,
        module: nn.Module,
        optimizer: torch.optim.Optimizer,
        training: Mapping[str, Any],
        own: Mapping[str, Any],
    ) -> Share:
        """What this process writes: its shares, its `own` state, and on the first what is common to all.

        The next copy is made in the same memory.

        Raises:
            CheckpointError: the state holds something that is neither a tensor nor a plain type.
        """
        tensors, others = held_state(module)
        of_parameters, rest = _split_optimizer(optimizer)
        packed = {name_of(process_rank()): own}
        if is_main_process():
            packed[TRAINING] = {**training, "optimizer": rest, "extra_state": others}
        parts = {name: PackedState(state, f"{name}.") for name, state in packed.items()}
        staged: Any = self._stager.stage({**_to_write(tensors), **of_parameters})
        copies = {name: tensor for part in parts.values() for name, tensor in part.tensors.items()}
        texts = {f"{name}.json": part.text() for name, part in parts.items()}
        return Share(tensors={**staged, **copies}, texts=texts)

    def write(self, share: Share, target: Path) -> None:
        """Write a checkpoint, which takes the place of `target` when all processes have ended.

        Raises:
            CheckpointError: a process could not write its share.
        """
        from matta.training.share_files import write_share

        made = target.with_name(f".{target.name}-shares")
        try:
            write_share(share.tensors, share.texts, made, target, self._group)
        finally:
            if is_main_process():
                shutil.rmtree(made, ignore_errors=True)

    def close(self) -> None:
        """Give the memory of the copy back."""
        self._stager.close()
        distributed.destroy_process_group(self._group)


def name_of(rank: int) -> str:
    """The name of the file that a process writes for itself, without its ending.

    Example:
        >>> name_of(3)
        'process-00003'
    """
    return f"{PROCESS}{rank:05d}"


def _to_write(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Shards, and on the first process what all hold alike."""
    return {name: value for name, value in tensors.items() if is_main_process() or is_sharded(value)}


def _split_optimizer(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of an optimizer's state that this process writes, and the rest of it."""
    is_divided = isinstance(optimizer, Shampoo)
    state = optimizer.share_of_state() if isinstance(optimizer, Shampoo) else optimizer.state_dict()
    tensors: dict[str, Tensor] = {}
    rest: dict[Any, dict[str, Any]] = {}
    for number, values in state["state"].items():
        own = {name: value for name, value in values.items() if isinstance(value, Tensor)}
        strips = {name: value for name, value in own.items() if is_divided and strip_index(name) is not None}
        tensors |= {f"{OPTIMIZER}{number}.{name}": value for name, value in {**_to_write(own), **strips}.items()}
        rest[number] = {name: value for name, value in values.items() if name not in own}
    return tensors, {**state, "state": rest}


def has_shares(path: Path) -> bool:
    """Whether a checkpoint is one by shares."""
    return any(path.glob(SHARD))


@final
class SavedShares:
    """A checkpoint by shares, whose files are compared with their checksums: by each process some of them.

    All processes must make one.

    Raises:
        CheckpointError: a file is missing, or is not the one written.
    """

    def __init__(self, path: Path) -> None:
        if faults := [each for each in gathered(_fault(path)) if each is not None]:
            raise CheckpointError(faults[0])
        from matta.training.share_files import ShareReader

        self.path, self._reader = path, ShareReader(path)
        self._like = self._reader.like()

    def require_fit(self, module: nn.Module, *, converts: bool) -> None:
        """Refuse another module than the one saved.

        Raises:
            CheckpointError: names or shapes differ, or, unless it `converts`, types.
        """
        others = (OPTIMIZER, f"{TRAINING}.", PROCESS)
        saved = {name: like for name, like in self._like.items() if not name.startswith(others)}
        require_fit(self.path, saved, held_state(module)[0])
        require_types(self.path, {} if converts else saved, held_state(module)[0])

    def load(self, module: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """Put the weights into `module`; the rest of it, with what this process holds of the optimizer's state."""
        training = self.state(TRAINING)
        tensors = held_state(module)[0]
        of_parameters = self._wanted(optimizer)
        self._reader.fill({**tensors, **of_parameters})
        module.load_state_dict(training.pop("extra_state"), strict=False)
        state = training["optimizer"]["state"]
        for key, value in of_parameters.items():
            number, name = _parameter_of(key)
            state.setdefault(number, {})[name] = value
        return {**training, "feeds": SavedStates(self, training["num_processes"])}

    def state(self, name: str) -> dict[str, Any]:
        """The state that one process has packed under this name."""
        tensors = {
            key: torch.empty_like(like, device="cpu") for key, like in self._like.items() if key.startswith(f"{name}.")
        }
        self._reader.fill(tensors)
        return unpacked(self.path / f"{name}.json", tensors)

    def _wanted(self, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
        """Memory for the tensors of an optimizer's state that this process is to hold."""
        parameters = [each for group in optimizer.param_groups for each in group["params"]]
        is_divided = isinstance(optimizer, Shampoo)
        owned: dict[Tensor, set[int]] = {}
        for group in optimizer.param_groups if is_divided else ():
            owned |= owned_strips(group)
        found: dict[str, Tensor] = {}
        for key, like in self._like.items():
            number, name = _parameter_of(key)
            parameter = parameters[number] if 0 <= number < len(parameters) else None
            strip = strip_index(name) if is_divided else None
            if parameter is None or (strip is not None and strip not in owned.get(parameter, {strip})):
                continue
            if is_sharded(parameter) and like.shape == parameter.shape:
                found[key] = torch.empty_like(parameter, dtype=like.dtype).detach()
            else:
                found[key] = torch.empty_like(like, device="cpu")
        return found


def require_types(folder: Path, saved: Mapping[str, Tensor], present: Mapping[str, Tensor]) -> None:
    """Refuse to resume in other types than those that a run was begun in: it would round, or not be the same run.

    Raises:
        CheckpointError: a tensor was saved in another type.
    """
    for name in sorted(saved.keys() & present.keys()):
        was, now = saved[name].dtype, present[name].dtype
        if was != now:
            raise CheckpointError(
                f"{folder} holds {name} as {was}, and the modules as {now}; expected the type that the run was begun "
                f"with, or resume='prolong', which converts it"
            )


def _parameter_of(key: str) -> tuple[int, str]:
    """The number of a parameter, and the name of a part of its state; -1 for other tensors."""
    number, _, name = key.removeprefix(OPTIMIZER).partition(".")
    return (int(number), name) if key.startswith(OPTIMIZER) else (-1, "")


@final
class SavedStates(Sequence[dict[str, Any]]):
    """What each process keeps for itself; read when it is asked for."""

    def __init__(self, saved: SavedShares, num: int) -> None:
        self._saved, self._num = saved, num

    def __len__(self) -> int:
        return self._num

    @overload
    def __getitem__(self, index: int) -> dict[str, Any]: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[dict[str, Any]]: ...
    def __getitem__(self, index: int | slice) -> Any:
        numbers = range(self._num)[index]
        return self._saved.state(name_of(numbers)) if isinstance(numbers, int) else [self[each] for each in numbers]


def _fault(path: Path) -> str | None:
    """What is wrong with this process's part of the files of a checkpoint."""
    try:
        listed = read_checksums(path)
        if not has_checksums(path):
            raise CheckpointError(f"{path / SUMS} is missing; take another copy of the folder")
        summary = json.loads((path / f"{TRAINING}.json").read_text(encoding="utf-8"))
        num_shards = sum(Path(name).match(SHARD) for name in listed)
        expected = {f"{TRAINING}.json", *(f"{name_of(rank)}.json" for rank in range(num_shards))}
        if num_shards != summary["num_processes"] or not expected <= listed.keys():
            raise CheckpointError(f"{path / SUMS} is damaged: it lacks files; take another copy of the folder")
        verify(path, *sorted(listed)[process_rank() :: num_processes()])
    except CheckpointError as error:
        return str(error)
    except (OSError, *DAMAGE) as error:
        return f"{path / TRAINING}.json cannot be read: {error}; take another copy of the folder"
    return None
