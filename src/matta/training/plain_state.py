"""The state of a run as two files without code: its tensors (safetensors) and everything else (JSON).

JSON knows no tuples, no keys but text and no NaN; such values are written as a mapping with one key that begins with
`$`, and are read back as they were: `read_state` gives what `PackedState` was given, to the last bit.
"""

from __future__ import annotations

import json
import math
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Final, final

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from matta.errors import DAMAGE, CheckpointError

_MAPPINGS: Final[dict[str, Any]] = {
    "$dict": dict,
    "$ordered": OrderedDict,
    "$counter": Counter,
    "$default": defaultdict,
}
_SEQUENCES: Final[dict[str, Any]] = {"$tuple": tuple, "$set": set, "$size": torch.Size}


@final
class PackedState:
    """A copy of a state, on the CPU, that training no longer changes; to be written when there is time.

    Its `tensors` are numbered, and the numbers begin with a `prefix`.

    Raises:
        CheckpointError: something in it is neither a tensor nor a plain type; where and what it is is told.
    """

    def __init__(self, state: Mapping[str, Any], prefix: str = "") -> None:
        self.tensors: dict[str, Tensor] = {}
        self._prefix = prefix
        self._plain = self._packed(state, "")

    def write(self, folder: Path, name: str) -> None:
        """Write `<name>.json` and `<name>.safetensors` into a folder."""
        save_file(self.tensors, folder / f"{name}.safetensors")
        (folder / f"{name}.json").write_text(self.text(), encoding="utf-8")

    def text(self) -> str:
        """Everything but the tensors, in JSON."""
        return json.dumps(self._plain, allow_nan=False, separators=(",", ":"))

    def _packed(self, value: Any, path: str) -> Any:
        if value is None or isinstance(value, bool | int | str):
            return value
        if isinstance(value, float):
            return float(value) if math.isfinite(value) else {"$float": repr(float(value))}
        if isinstance(value, Tensor):
            return self._tensor(value)
        if isinstance(value, list):
            return self._items(value, path)
        for tag, kind in _SEQUENCES.items():
            if type(value) is kind:
                return {tag: self._items(value, path)}
        for tag, kind in _MAPPINGS.items():
            if type(value) is kind:
                return self._mapping(tag, value, path)
        raise CheckpointError(
            f"the state of the run has {path.lstrip('.')} of type {type(value).__name__}; expected tensors, numbers, "
            f"text, and lists, tuples and mappings of those, since no code is saved"
        )

    def _items(self, values: Iterable[Any], path: str) -> list[Any]:
        return [self._packed(each, f"{path}[{index}]") for index, each in enumerate(values)]

    def _tensor(self, value: Tensor) -> dict[str, str]:
        if value.is_complex():
            return {"$complex": self._tensor(torch.view_as_real(value))["$tensor"]}
        name = f"{self._prefix}{len(self.tensors)}"
        self.tensors[name] = cpu_copy(value)
        return {"$tensor": name}

    def _mapping(self, tag: str, value: Mapping[Any, Any], path: str) -> Any:
        if tag == "$dict" and all(isinstance(key, str) and not key.startswith("$") for key in value):
            return {key: self._packed(each, f"{path}.{key}") for key, each in value.items()}
        return {tag: [[self._packed(key, path), self._packed(each, f"{path}.{key}")] for key, each in value.items()]}


def cpu_copy(tensor: Tensor) -> Tensor:
    """A contiguous copy on the CPU, which shares memory with nothing."""
    return torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu").copy_(tensor.detach())


def read_state(folder: Path, name: str) -> dict[str, Any]:
    """The state that was packed and written; its tensors on the CPU.

    Raises:
        CheckpointError: a file is missing, or was not written by `PackedState`.
    """
    try:
        return unpacked(folder / f"{name}.json", load_file(folder / f"{name}.safetensors"))
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{folder / name} cannot be read: {error}; take another copy of the folder") from None


def unpacked(file: Path, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """The state that was packed: everything but the tensors in a file, and the tensors by name.

    Raises:
        CheckpointError: the file is missing, or is not of a `PackedState` with these tensors.
    """
    try:
        state = _read(json.loads(file.read_text(encoding="utf-8")), tensors)
    except (OSError, RuntimeError, *DAMAGE) as error:
        raise CheckpointError(f"{file} cannot be read: {error}; take another copy of the folder") from None
    if not isinstance(state, dict):
        raise CheckpointError(f"{file} is not the state of a run; take another copy of the folder")
    return state


def _read(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(value, list):
        return [_read(each, tensors) for each in value]
    if not isinstance(value, dict):
        return value
    tag: str = next(iter(value), "")
    inner: Any = value.get(tag)
    if not tag.startswith("$"):
        return {key: _read(each, tensors) for key, each in value.items()}
    if tag in ("$tensor", "$complex"):
        return tensors[inner] if tag == "$tensor" else torch.view_as_complex(tensors[inner])
    if tag == "$float":
        return float(inner)
    if tag in _SEQUENCES:
        return _SEQUENCES[tag](_read(each, tensors) for each in inner)
    pairs = {_read(key, tensors): _read(each, tensors) for key, each in inner}
    return defaultdict(None, pairs) if tag == "$default" else _MAPPINGS[tag](pairs)
