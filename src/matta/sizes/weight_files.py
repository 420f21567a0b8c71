"""Safetensors files read and written piece by piece, so that neither a file nor one large tensor is ever in memory.

A file is the length of its header in 8 bytes, the header in JSON (type, shape and place of each tensor), and the data.
What is written is byte for byte what `safetensors` writes of the same tensors.
"""

from __future__ import annotations

import json
import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from io import BufferedWriter, FileIO
from pathlib import Path
from typing import Any, Final, final

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from matta.errors import DAMAGE, CheckpointError
from matta.nesting.layout import Axis
from matta.sizes.storage import Checksum

SHARD: Final = "shard-*.safetensors"
"""What the files of one set of tensors are called that several processes have written."""
PIECE: Final = 1 << 20
"""Bytes read at a time: few enough that they are still in the cache of the processor when they are written."""
_FLUSH: Final = 1 << 25
"""Bytes after which the disk is told to begin, so that little is left to wait for in the end."""
_TYPES: Final[Mapping[str, torch.dtype]] = {  # in the order in which a file has its tensors, the last first
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3": torch.float8_e4m3fn,
    "I16": torch.int16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "F32": torch.float32,
    "C64": torch.complex64,
    "F64": torch.float64,
    "I64": torch.int64,
}
_NAMES: Final = {dtype: name for name, dtype in _TYPES.items()}
_RANKS: Final = {name: rank for rank, name in enumerate(_TYPES)}


class WeightSource(ABC):
    """Saved tensors, of which only what is asked for is read."""

    @property
    @abstractmethod
    def names(self) -> tuple[str, ...]:
        """The names of the tensors."""

    @abstractmethod
    def like(self, name: str) -> Tensor:
        """A tensor of the type and shape of one saved, without memory."""

    @abstractmethod
    def rows(self, name: str, first: int, last: int) -> Tensor:
        """Rows of a tensor; one of a single number is a row."""

    def __contains__(self, name: str) -> bool:
        return name in self.names

    def read(self, name: str) -> Tensor:
        """One whole tensor."""
        return filled(self.like(name), self.pieces(name))

    def pieces(self, name: str, axes: tuple[Axis, ...] | None = None) -> Iterator[Tensor]:
        """A slice of a tensor, or all of it, as contiguous pieces that follow each other on the first axis."""
        like = self.like(name)
        axes = tuple(Axis.plain(size, size) for size in like.shape) if axes is None else axes
        if not like.numel():
            return
        row = like.nbytes // (like.shape or (1,))[0]
        for first, last in _runs(axes[0] if axes else Axis.plain(1, 1), max(1, PIECE // row)):
            piece = self.rows(name, first, last)
            for dim, axis in enumerate(axes[1:], 1):
                piece = axis.take(piece, dim)
            yield piece.contiguous()


@final
class WeightFile(WeightSource):
    """The tensors of a safetensors file.

    Raises:
        CheckpointError: it cannot be read, or holds numbers of a type that is not known here.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with safe_open(path, "pt"):  # checks the length of the header, and every place in it
                pass
            with path.open("rb") as file:
                length = int.from_bytes(file.read(8), "little")
                header: dict[str, Any] = json.loads(file.read(length))
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{path} cannot be read: {error}; take another copy of the folder") from None
        self.metadata: dict[str, str] = header.pop("__metadata__", {})
        self._start, self._entries = 8 + length, header
        for name, entry in header.items():
            if entry["dtype"] not in _TYPES:
                raise CheckpointError(f"{path} has {name} in {entry['dtype']}; expected one of {', '.join(_TYPES)}")

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._entries)

    def __contains__(self, name: str) -> bool:
        return name in self._entries

    def like(self, name: str) -> Tensor:
        entry = self._entries[name]
        return torch.empty(entry["shape"], dtype=_TYPES[entry["dtype"]], device="meta")

    def rows(self, name: str, first: int, last: int) -> Tensor:
        like = self.like(name)
        shape = like.shape or (1,)
        row = like.nbytes // shape[0]
        found = torch.empty(last - first, *shape[1:], dtype=like.dtype, device="cpu")
        with self.path.open("rb", buffering=0) as file:
            file.seek(self._start + self._entries[name]["data_offsets"][0] + first * row)
            _read_into(file, found)
        return found


@final
class WeightShards(WeightSource):
    """The tensors of a checkpoint by shares: each file has some rows of a tensor, and says which.

    Raises:
        CheckpointError: a file cannot be read, a tensor is divided otherwise than by rows, or rows are missing.
    """

    def __init__(self, folder: Path) -> None:
        self._parts: dict[str, list[tuple[int, WeightFile]]] = {}
        for file in map(WeightFile, sorted(folder.glob(SHARD))):
            offsets = _offsets(file)
            for name in file.names:
                self._parts.setdefault(name, []).append((offsets[name], file))
        for name, parts in self._parts.items():
            parts.sort(key=lambda part: part[0])
            end = 0
            for first, file in parts:
                num_rows = _num_rows(file.like(name))
                if num_rows and first != end:
                    raise CheckpointError(f"{folder} lacks rows {end} to {first} of {name}; take another copy of it")
                end += num_rows

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._parts)

    def like(self, name: str) -> Tensor:
        parts = [file.like(name) for _, file in self._parts[name]]
        return parts[0].new_empty((sum(map(_num_rows, parts)), *parts[0].shape[1:])) if parts[0].ndim else parts[0]

    def rows(self, name: str, first: int, last: int) -> Tensor:
        found = []
        for start, file in self._parts[name]:
            begin, end = max(first, start), min(last, start + _num_rows(file.like(name)))
            if begin < end:
                found.append(file.rows(name, begin - start, end - start))
        return torch.cat(found)


def weights_in(path: Path) -> WeightSource:
    """The tensors of a safetensors file, or of a folder with those of a checkpoint by shares."""
    return WeightShards(path) if path.is_dir() else WeightFile(path)


def _num_rows(like: Tensor) -> int:
    return like.shape[:1].numel()


def _offsets(file: WeightFile) -> dict[str, int]:
    """The first row of each tensor in a file of `torch.distributed.checkpoint`."""
    try:
        saved = json.loads(file.metadata["DCP_SHARDING_INFO"])
        offsets = {name: saved[name]["saved_offsets"] for name in file.names}
        if any(any(each[1:]) for each in offsets.values()):
            raise ValueError("a tensor is divided otherwise than by rows")
        return {name: int(each[0]) if each else 0 for name, each in offsets.items()}
    except DAMAGE as error:
        raise CheckpointError(f"{file.path} cannot be read: {error}; expected rows of tensors") from None


def filled(like: Tensor, pieces: Iterable[Tensor]) -> Tensor:
    """A tensor of a type and shape, made of its pieces."""
    made = torch.empty_like(like, device="cpu")
    flat, start = made.view(-1), 0
    for piece in pieces:
        flat[start : start + piece.numel()] = piece.reshape(-1)
        start += piece.numel()
    return made


def write_weights(
    path: Path,
    tensors: Mapping[str, tuple[Tensor, Iterable[Tensor]]],
    metadata: Mapping[str, str] | None = None,
    *,
    has_checksum: bool = True,
) -> str:
    """Write a safetensors file: for each name a tensor of its type and shape (without memory), and its pieces.

    Gives the file's checksum, or without it that of the header; a thread of its own computes it.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    order = sorted(tensors, key=lambda name: (-_RANKS[_NAMES[tensors[name][0].dtype]], name))
    for name in order:
        like, begin = tensors[name][0], end
        end += like.nbytes
        header[name] = {"dtype": _NAMES[like.dtype], "shape": list(like.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    start = len(text).to_bytes(8, "little") + text
    checksum = Checksum()
    checksum.update(start)
    with path.open("wb") as file, ThreadPoolExecutor(1) as beside:
        file.write(start)
        hashed, begun = beside.submit(checksum.update, b""), 0
        for piece in _data(order, tensors):
            hashed.result()  # one at a time: no more than two pieces are in memory
            hashed = beside.submit(checksum.update, piece if has_checksum else b"")
            file.write(piece)
            if file.tell() - begun >= _FLUSH:
                begun = _begin_to_flush(file, begun)
        hashed.result()
        assert file.tell() == len(start) + end, "pieces make up their tensors"
    return checksum.hexdigest()


def _read_into(file: FileIO, tensor: Tensor) -> None:
    """Fill a contiguous tensor from where the file is."""
    rest = _bytes_of(tensor)
    while rest:
        count = file.readinto(rest)
        if not count:
            raise CheckpointError(f"{file.name!s} has become shorter while it was read; take another copy of it")
        rest = rest[count:]


def _begin_to_flush(file: BufferedWriter, begin: int) -> int:
    """Have the system put on disk what was written from `begin` on, without waiting; the end of it."""
    file.flush()
    end = file.tell()
    if hasattr(os, "posix_fadvise"):  # not on a Mac
        os.posix_fadvise(file.fileno(), begin, end - begin, os.POSIX_FADV_DONTNEED)
    return end


def _data(order: Iterable[str], tensors: Mapping[str, tuple[Tensor, Iterable[Tensor]]]) -> Iterator[memoryview]:
    """The bytes of tensors, piece by piece."""
    for name in order:
        like, pieces = tensors[name]
        for piece in pieces:
            yield _bytes_of(piece.to(like.dtype))


def _bytes_of(tensor: Tensor) -> memoryview:
    return tensor.view(-1).view(torch.uint8).numpy().data


def _runs(axis: Axis, most: int) -> Iterator[tuple[int, int]]:
    """Stretches of the larger axis that hold the indices of the smaller one, in order, each of at most so many."""
    offset = 0
    for segment in axis.segments:
        runs: list[Any] = [range(segment.student_size)]
        if segment.grows and len(segment.ta) > 1:
            positions = np.array(segment.positions(), dtype=int)
            runs = np.split(positions, np.flatnonzero(np.diff(positions) != 1) + 1)
        for run in runs:
            for first in range(0, len(run), most):
                start = offset + int(run[0]) + first
                yield start, start + min(most, len(run) - first)
        offset += segment.ta_size
