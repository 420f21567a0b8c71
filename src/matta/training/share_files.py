"""The files of a checkpoint by shares: written and read by `torch.distributed.checkpoint`, with checksums."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import final

import torch
from torch import Tensor, distributed
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from matta.errors import CheckpointError
from matta.sizes.storage import checksum_of, put_in_place, write_checksums


def write_share(
    tensors: Mapping[str, Tensor], texts: Mapping[str, str], made: Path, target: Path, group: distributed.ProcessGroup
) -> None:
    """Write this process's files to `made`; when all have, the folder takes the place of `target`.

    Raises:
        CheckpointError: a process could not write its files; raised in all of them.
    """
    try:
        save(dict(tensors), storage_writer=_Writer(made, target, texts), process_group=group)
    except CheckpointException as error:
        raise CheckpointError(_first_fault(error)) from None


@final
class _Writer(HuggingFaceStorageWriter):
    """Writes texts beside the tensors, and in the end the checksums that every process has made of its files."""

    def __init__(self, made: Path, target: Path, texts: Mapping[str, str]) -> None:
        super().__init__(str(made), save_distributed=True)
        self._made, self._target, self._texts = made, target, texts

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write the files of this process: a result for each, with its checksum."""
        results = super().write_data(plan, planner).wait()
        for name, text in self._texts.items():
            (self._made / name).write_text(text, encoding="utf-8")
        names = {each.storage_data.relative_path for each in results} | self._texts.keys()
        written: Future[list[WriteResult]] = Future()
        written.set_result([self._result(name) for name in sorted(names)])
        return written

    def _result(self, name: str) -> WriteResult:
        file = self._made / name
        size = file.stat().st_size
        return WriteResult(index=MetadataIndex(name), size_in_bytes=size, storage_data=checksum_of(file))

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """On the first process, when all have written: the checksums, and then the folder's name."""
        files = [each for of_process in results for each in of_process]
        write_checksums(self._made, {each.index.fqn: each.storage_data for each in files})
        put_in_place(self._made, self._target)


@final
class ShareReader(HuggingFaceStorageReader):
    """Reads tensors of a checkpoint by shares, whatever the number of processes that wrote it.

    Raises:
        CheckpointError: the headers of its files cannot be read.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(str(folder))
        try:
            self.metadata = super().read_metadata()
        except Exception as error:
            raise CheckpointError(f"{folder} cannot be read: {error}; take another copy of the folder") from None

    def like(self) -> dict[str, Tensor]:
        """Tensors of the types and shapes of those saved, without memory."""
        saved = self.metadata.state_dict_metadata
        return {
            name: torch.empty(each.size, dtype=each.properties.dtype, device="meta")
            for name, each in saved.items()
            if isinstance(each, TensorStorageMetadata)
        }

    def read_metadata(self) -> Metadata:
        """What is where, read once."""
        return self.metadata

    def fill(self, tensors: Mapping[str, Tensor]) -> None:
        """Read tensors into the memory given: whole ones, and of sharded ones what this process holds.

        Raises:
            CheckpointError: one is not there, or cannot be read.
        """
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="torch.distributed is disabled")
                load(dict(tensors), storage_reader=self, no_dist=True)
        except CheckpointException as error:
            raise CheckpointError(f"{self.path} cannot be read: {_first_fault(error)}") from None


def _first_fault(error: CheckpointException) -> str:
    rank, (cause, _) = min(error.failures.items(), key=lambda each: each[0])
    return f"process {rank}: {cause}"
