"""Weights of a Transformers folder written piece by piece, and two models compared without weights."""

from __future__ import annotations

from matta.lm.needed import EXTRA as EXTRA

import copy
from collections.abc import Mapping
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import Any, Final, final

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map
from transformers import PreTrainedConfig, PreTrainedModel

from matta.errors import SubModelError
from matta.lm.configurations import is_of_whole, signature
from matta.nesting.batches import eval_mode
from matta.sizes.storage import enter_checksum
from matta.sizes.streamed_extraction import Pieces
from matta.sizes.weight_files import WeightFile, filled, write_weights

WEIGHTS: Final = "model.safetensors"
_NO_VALUES: Final = frozenset(  # attributes that a forward in eval mode does not read, or that are compared otherwise
    (
        *("_parameters", "_buffers", "_modules", "training", "generation_config", "name_or_path", "warnings_issued"),
        "_is_hf_initialized",
    )
)


def save_streamed(model: PreTrainedModel, folder: Path, tensors: Mapping[str, Pieces]) -> None:
    """Do what `model.save_pretrained(folder)` does, for a model without weights; `tensors` are those of its state.

    Which tensors Transformers writes, and under which names, it is asked with a number in the place of each. Where
    it writes other tensors than the model has, this model is filled, and saved as usual.
    """
    names = list(tensors)
    first: dict[int, Tensor] = {}  # tied tensors are one number
    present = model.state_dict(keep_vars=True)
    numbers = {name: first.setdefault(id(present[name]), torch.tensor([i])) for i, name in enumerate(names)}
    written: dict[str, Tensor] = {}
    try:
        model.save_pretrained(folder, state_dict=dict(numbers))
        written = load_file(folder / WEIGHTS)
    except Exception:  # conversions of weights fail on numbers in ways of their own
        pass
    if not written or any(each.shape != (1,) or each.dtype != torch.int64 for each in written.values()):
        model.load_state_dict({name: filled(*each) for name, each in tensors.items()}, assign=True)
        model.tie_weights()
        model.save_pretrained(folder)
        return
    metadata = WeightFile(folder / WEIGHTS).metadata
    found = {key: tensors[names[int(number)]] for key, number in written.items()}
    enter_checksum(folder / WEIGHTS, write_weights(folder / WEIGHTS, found, metadata))


def require_same_operators(model: PreTrainedModel, loaded: PreTrainedModel, batch: Mapping[str, Tensor]) -> None:
    """Compare what two models without weights compute on a batch, and their buffers.

    They compute the same if they consist of the same modules with the same values. Where some value differs, or cannot
    be compared, they are run, and compared operator by operator.

    Raises:
        SubModelError: an operator is another one, or has other operands, or a buffer differs.
    """
    given, wanted = (dict(each.named_buffers()) for each in (loaded, model))
    for name, buffer in wanted.items():
        if name not in given or not torch.equal(given[name], buffer):
            raise SubModelError(
                f"the folder of this {type(model).__name__} would not hold the model: {name} is another tensor when it "
                f"is loaded; expected a model whose tensors follow from its configuration and its weights"
            )
    if _consist_of_the_same(model, loaded):
        return
    calls = (_operators(each, batch) for each in (model, loaded))
    for place, (expected, found) in enumerate(zip_longest(*calls, fillvalue=("none", None))):
        if found != expected:
            raise SubModelError(
                f"the folder of this {type(model).__name__} would not hold the model: operator {place} is "
                f"{expected[0]}, and another, or of other values, when it is loaded; expected a model that its "
                f"configuration and its weights describe"
            )


def _consist_of_the_same(model: nn.Module, loaded: nn.Module) -> bool:
    given, wanted = ({**signature(each), ("", "class"): None} for each in (loaded, model))
    return given == wanted and all(
        _is_built_as(type(part), type(twin)) and _has_same_values(part, twin)
        for part, twin in zip(model.modules(), loaded.modules(), strict=True)
    )


def _is_built_as(kind: type, loaded: type) -> bool:
    """Whether a class is the other one, or the one in our folders, which builds other blocks and adds nothing else."""
    only_builds = all(name.startswith("__") or name == "config_class" for name in vars(loaded))
    return loaded is kind or (loaded.__bases__ == (kind,) and only_builds)


def _has_same_values(part: nn.Module, twin: nn.Module) -> bool:
    """Whether two modules have the same attributes, and parameters of the same type; shapes are compared already."""
    given, wanted = ({name: each for name, each in vars(m).items() if name not in _NO_VALUES} for m in (twin, part))
    types = [[getattr(each, "dtype", None) for each in m._parameters.values()] for m in (twin, part)]
    same_names = given.keys() == wanted.keys() and types[0] == types[1]
    return same_names and all(_is_same(value, given[name]) for name, value in wanted.items())


def _is_same(value: Any, other: Any) -> bool:
    if isinstance(value, PreTrainedConfig):
        return value._attn_implementation == other._attn_implementation and all(
            is_of_whole(name) or _is_same(each, getattr(other, name, None)) for name, each in vars(value).items()
        )
    if isinstance(value, partial) and isinstance(other, partial):
        value, other = ((each.func, each.args, each.keywords) for each in (value, other))
    try:
        return type(value) is type(other) and bool(value == other)
    except Exception:  # of any object
        return False


def _operators(model: PreTrainedModel, batch: Mapping[str, Tensor]) -> list[tuple[str, Any]]:
    """What a model calls on a batch, on the meta device, up to an operator that is not to be had there."""
    if not batch:
        return []
    on_meta = copy.deepcopy(model).to("meta")
    with _Recording(on_meta) as recording, eval_mode(on_meta), torch.no_grad():
        try:
            on_meta(**{name: each.to("meta") for name, each in batch.items()})
        except Exception as error:  # of any operator
            recording.calls.append(("failed", type(error).__name__))
    return recording.calls


@final
class _Recording(TorchDispatchMode):
    """Operators with their operands: parameters and buffers by name, results by their number."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.calls: list[tuple[str, Any]] = []
        self._names: dict[int, str] = {id(each): name for name, each in model.named_parameters()}
        self._names |= {id(each): name for name, each in model.named_buffers()}
        self._kept: list[Any] = []  # an id is another tensor's once the first is gone

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        self.calls.append((str(func), tree_map(self._name, (args, kwargs))))
        result = func(*args, **kwargs)
        for place, each in enumerate(tree_flatten(result)[0]):
            if isinstance(each, Tensor):
                self._names.setdefault(id(each), f"{len(self.calls)}.{place}")
        self._kept.append((args, kwargs, result))
        return result

    def _name(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return self._names.get(id(value), "input"), value.dtype, tuple(value.shape), value.stride()
        return value
