"""Sub-models from the file of a nesting, slice by slice: no model is built, nothing is read that no slice needs."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import final

from torch import Tensor, nn

from matta.errors import CheckpointError
from matta.nesting.layout import Axis
from matta.nesting.nested import Nested
from matta.nesting.slicing import LiveSlice, materialize, slices_of
from matta.sizes.saving import WEIGHTS, held_state, nest_saved, require_fit
from matta.sizes.storage import whole_file
from matta.sizes.submodels import SubModel, live, wide_narrow_wide
from matta.sizes.weight_files import weights_in, write_weights

Pieces = tuple[Tensor, Iterable[Tensor]]
"""A tensor of a type and shape, without memory, and what it consists of."""


@final
class SavedWeights:
    """The weights of a nesting in safetensors, and the nesting that tells where they are.

    Its parameters may be on the meta device; its buffers, which are few, are read.

    Args:
        path: The file, or the folder of a checkpoint by shares.
        nested: A nesting like the one saved.
        prefix: Before the names in the file, such as "nested." in a checkpoint of `CoTraining`.

    Raises:
        CheckpointError: the file cannot be read, or holds another nesting.
    """

    def __init__(self, path: Path, nested: Nested, prefix: str = "") -> None:
        self.nested, self._prefix, self._file = nested, prefix, weights_in(path)
        names = (name.removeprefix(prefix) for name in self._file.names if name.startswith(prefix))
        require_fit(path, {name: self._file.like(prefix + name) for name in names}, held_state(nested)[0])
        self._names = {
            id(each): name for name, each in reversed(list(nested.named_parameters())) if prefix + name in self._file
        }
        self._read_buffers()

    def _read_buffers(self) -> None:
        read: dict[int, Tensor] = {}
        for name, buffer in list(self.nested.named_buffers(remove_duplicate=False)):
            if id(buffer) not in read and self._prefix + name in self._file:
                read[id(buffer)] = self._file.read(self._prefix + name).to(buffer.dtype)
            if id(buffer) in read:
                path, _, leaf = name.rpartition(".")
                self.nested.get_submodule(path)._buffers[leaf] = read[id(buffer)]

    def tensors(self, module: nn.Module) -> dict[str, Pieces]:
        """The state of a live module of the nesting by name, tied tensors under each of their names.

        Raises:
            CheckpointError: it keeps something in its state that is no tensor.
        """
        found: dict[str, Pieces] = {}
        slices = slices_of(module)
        for name, value in module.state_dict(keep_vars=True).items():
            if not isinstance(value, Tensor):
                raise CheckpointError(
                    f"{name} is no tensor, and a file of weights holds only tensors; expected none (get_extra_state): "
                    f"load the nesting and use matta.extract"
                )
            found[name] = value, self._pieces(value, slices.get(name))
        return found

    def _pieces(self, value: Tensor, slice_: LiveSlice | None) -> Iterable[Tensor]:
        parameter = value if slice_ is None else getattr(slice_.owner, slice_.name)
        if id(parameter) not in self._names:
            return (value.detach().contiguous(),)  # a buffer
        axes = tuple(Axis.plain(size, size) for size in value.shape) if slice_ is None else slice_.axes
        return _Again(lambda: self._file.pieces(self._prefix + self._names[id(parameter)], axes))


@final
class _Again:
    """An iterable that begins afresh each time."""

    def __init__(self, begin: Callable[[], Iterator[Tensor]]) -> None:
        self._begin = begin

    def __iter__(self) -> Iterator[Tensor]:
        return self._begin()


def extract_saved(
    saved: str | os.PathLike[str], path: str | os.PathLike[str], *modules: nn.Module, spec: SubModel | int | None = None
) -> Path:
    """Write a sub-model of a saved nesting as safetensors, reading no more of the nesting than its slices.

    It has the tensors of `matta.extract(matta.load(saved, ...), spec)`. Neither model is ever in memory, so that this
    works with a TA of any size; for that, build the modules on the meta device. `safetensors.torch.load_model` loads
    the file. The checksum of the weights is not compared, since that would read all of them. Between Student and TA
    running statistics (BatchNorm) are those of the one or the other: call `matta.recalibrate` on what was loaded.

    Args:
        saved: The folder of `matta.save`.
        path: The file to write, whole or not at all; one that is there is replaced.
        modules: As for `matta.load`: the Student (or all Students) and then the TA.
        spec: The sub-model, or how many layers of `matta.wide_narrow_wide` are wide; by default the (first) Student.

    Raises:
        CheckpointError: the folder is missing, damaged or something else, does not fit the modules, or their state
            is not of tensors alone; or `path` is a folder.
        SubModelError: `spec` does not fit the nesting.

    Example:
        >>> import matta, tempfile, torch
        >>> from safetensors.torch import load_model
        >>> def tower(width): return nn.Sequential(nn.Linear(3, width), nn.ReLU(), nn.Linear(width, 1))
        >>> nested, student = matta.nest(tower(4), tower(8)), tower(4)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     saved = matta.save(nested, f"{folder}/ranker")
        ...     with torch.device("meta"):
        ...         path = extract_saved(saved, f"{folder}/student.safetensors", tower(4), tower(8))
        ...     load_model(student, path)
        (set(), [])
        >>> bool((student[0].weight == nested.student[0].weight).all())
        True
    """
    if Path(path).is_dir():
        raise CheckpointError(f"received {path}, a folder, to write to; expected a file: {path}/student.safetensors")
    nested = nest_saved(saved, *modules)
    weights = SavedWeights(Path(saved) / WEIGHTS, nested)
    chosen = wide_narrow_wide(nested, spec) if isinstance(spec, int) else spec
    module = nested.student if chosen is None else live(nested, chosen)
    found = weights.tensors(module)
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(target) as made:
        names = held_state(materialize(module))[0]  # of tied names the first
        write_weights(made, {name: found[name] for name in names}, has_checksum=False)
    return target
