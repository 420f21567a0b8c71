"""Find the configuration that builds a given model of Transformers, block by block where its blocks differ.

A sub-model's modules are right, but its blocks come from Student and TA, and each holds the configuration it was built
from. The model's own configuration is that of the whole, and the values in which a block's differs are that block's,
whether or not a parameter shows them: some are read in `forward` alone. Sizes that no configuration states are read off
the shapes. What a configuration builds is compared with the model: names and shapes of all tensors, ties, the class of
every module, and the values that modules keep (heads, scales, epsilons). Models are built on the meta device, which
takes no memory; `matta.lm.folders` compares what both compute.
"""

from __future__ import annotations

from matta.lm.needed import EXTRA as EXTRA

import copy
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, final

import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from matta.errors import SubModelError

Signature = dict[tuple[str, str], Any]
"""What there is to a model: for each module's path and the name of a thing in it, its shape or value."""

Values = dict[str, Any]
"""Values of a configuration, such as those that differ."""

Held = dict[str, Values]
"""The values of the configurations that modules hold, by the modules' paths."""


@final
@dataclass(frozen=True)
class Fit:
    """The configuration of a model, and the values in which single blocks differ from it.

    `blocks` has for each list of blocks, by its path, one mapping for each block. Where it is empty, the
    model is what its own class builds.
    """

    config: PreTrainedConfig
    blocks: dict[str, list[Values]] = field(default_factory=dict)

    @property
    def is_uniform(self) -> bool:
        """Whether the stock class builds the model."""
        return not self.blocks


def fit_configuration(model: PreTrainedModel) -> Fit:
    """The configuration that builds `model`, and what its blocks have of their own.

    Raises:
        SubModelError: no configuration of its class builds it.
    """
    search = _Search(model)
    config = search.best_whole()
    wrong = search.differences(config)
    if not wrong and not search.has_own_blocks():
        return Fit(config)
    blocks: dict[str, list[Values]] = {}
    for path, count in search.lists.items():
        values = [search.values_of_block(config, path, i) for i in range(count)]
        if any(values):
            blocks[path] = values
            wrong = search.unmended(config, path, values, wrong)
    if wrong:
        raise SubModelError(_complaint(model, config, search, min(wrong)))
    return Fit(config, blocks)


def signature(model: nn.Module) -> Signature:
    """Everything in a model that a configuration decides, apart from dropout."""
    found: Signature = {}
    first: dict[int, str] = {}
    for path, part in model.named_modules(remove_duplicate=False):
        prefix = f"{path}." if path else ""
        found[prefix, "class"] = type(part).__name__
        for name, tensor in [*part._parameters.items(), *part._buffers.items()]:
            if tensor is not None:
                same = first.setdefault(id(tensor), prefix + name)
                found[prefix, name] = tuple(tensor.shape), same
        for name, value in vars(part).items():
            if _is_decided(name, value) and not isinstance(part, nn.Dropout):
                found[prefix, name] = value
    return found


def held_configurations(model: nn.Module) -> Held:
    """The configurations that the modules of a model read in `forward`."""
    found: Held = {}
    known: dict[int, Values] = {}
    for path, part in model.named_modules():
        config = vars(part).get("config")
        if isinstance(config, PreTrainedConfig):
            if id(config) not in known:
                known[id(config)] = config.to_dict()
            found[path] = known[id(config)]
    return found


def _is_decided(name: str, value: Any) -> bool:
    """Whether an attribute is one of those that make a module what it is."""
    if name.startswith("_") or "drop" in name or name in ("training", "name_or_path", "gradient_checkpointing"):
        return False
    plain = value is None or isinstance(value, bool | int | float | str)
    return plain or (isinstance(value, tuple | list) and all(isinstance(each, bool | int | float) for each in value))


@contextmanager
def without_weights() -> Iterator[None]:
    """Models built here have weights on the meta device, which nothing initialises and nothing ties yet."""
    with init_empty_weights(include_buffers=False), no_init_weights():
        yield


def build(kind: type[PreTrainedModel], config: PreTrainedConfig) -> PreTrainedModel:
    """A model without memory for its weights and buffers."""
    with torch.device("meta"), no_init_weights():
        made = kind(copy.deepcopy(config))
    made.tie_weights()
    return made


@final
class _Search:
    """What candidates for the configuration of one model build, and how far they are off."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.target = signature(model)
        self.lists = _block_lists(model)
        self._wanted = _by_block(self.target, self.lists)
        self._holds = held_configurations(model)
        self._built: dict[str, tuple[dict[str, Signature], Held] | None] = {}

    def build(self, config: PreTrainedConfig) -> tuple[dict[str, Signature], Held] | None:
        """What the model's class builds, as signature by block and held configurations; None where it cannot."""
        key = json.dumps(config.to_dict(), sort_keys=True, default=str)
        if key not in self._built:
            try:
                made = build(type(self.model), config)
                self._built[key] = _by_block(signature(made), self.lists), held_configurations(made)
            except Exception:  # classes check their values with errors of many kinds
                self._built[key] = None
        return self._built[key]

    def differences(self, config: PreTrainedConfig, prefix: str = "") -> set[tuple[str, str]]:
        """What differs from the model, everywhere or in the block below `prefix`."""
        built = self.build(config)
        wanted = self._wanted.get(prefix, {})
        if built is None:
            return {*wanted, ("", "cannot be built")}
        given = built[0].get(prefix, {})
        return {key for key in wanted.keys() | given.keys() if wanted.get(key, _MISSING) != given.get(key, _MISSING)}

    def best_whole(self) -> PreTrainedConfig:
        """The model's own configuration, with the ties, the depth and the sizes that the model has.

        Blocks have a say in it where they are all alike, in sizes that their shapes show or that it leaves open.
        """
        start = copy.deepcopy(self.model.config)
        wrong = self.differences(start)
        if not wrong:
            return start
        candidates: list[Values] = [{"tie_word_embeddings": not getattr(start, "tie_word_embeddings", False)}]
        if self._has_other_depth(start):
            candidates += [{key: n} for key in _number_keys(start) if "layer" in key for n in set(self.lists.values())]
        found = self._try(start, candidates, "")
        if _are_alike(self.target, self.lists):
            found = self._try(found, self._sizes_of_blocks(found), "")
            return self._search_numbers(found, "")
        is_outside = any(not self._is_in_block(key) for key in self.differences(found))
        return self._search_numbers(found, "") if is_outside else found

    def has_own_blocks(self) -> bool:
        """Whether some module holds a configuration that the model's own would not give it."""
        return any(self._held(""))

    def values_of_block(self, whole: PreTrainedConfig, path: str, index: int) -> Values:
        """What the block holds otherwise than the model's configuration gives it, and what it takes beyond that."""
        prefix = f"{path}.{index}."
        tried = [each for values in self._held(prefix) if (each := _with(whole, values)) is not None]
        start = min(tried, key=lambda each: len(self.differences(each, prefix)), default=whole)
        found = self._try(start, self._kinds(start, path, index), prefix)
        return _changes(whole.to_dict(), self._search_numbers(found, prefix).to_dict())

    def unmended(
        self, whole: PreTrainedConfig, path: str, blocks: Sequence[Values], wrong: set[tuple[str, str]]
    ) -> set[tuple[str, str]]:
        """The differences that are left with the values of the blocks in a list."""
        for i, values in enumerate(blocks):
            prefix = f"{path}.{i}."
            left = {key for key in wrong if not key[0].startswith(prefix)}
            if len(left) < len(wrong):
                changed = _with(whole, values)
                wrong = left if changed is not None and not self.differences(changed, prefix) else wrong
        return wrong

    def _try(self, start: PreTrainedConfig, candidates: Sequence[Values], prefix: str) -> PreTrainedConfig:
        """Take each of the candidates that leaves fewer differences than there were."""
        best, fewest = start, len(self.differences(start, prefix))
        for values in candidates:
            changed = _with(best, values)
            if changed is not None and (count := len(self.differences(changed, prefix))) < fewest:
                best, fewest = changed, count
        return best

    def _held(self, prefix: str) -> list[Values]:
        """What configurations below `prefix` have otherwise than those that the model's own gives there, each once."""
        own = self.model.config.to_dict()
        built = self.build(self.model.config)
        given = {} if built is None else built[1]
        found: dict[str, Values] = {}
        for path, held in self._holds.items():
            if f"{path}.".startswith(prefix) and held.get("model_type") == own.get("model_type"):
                changes = _changes(given.get(path, own), held).items()
                values = {key: value for key, value in changes if not (_is_depth(key, value) or is_of_whole(key))}
                found.setdefault(json.dumps(values, sort_keys=True, default=str), values)
        return list(found.values())

    def _sizes_of_blocks(self, config: PreTrainedConfig) -> list[Values]:
        """Each number that blocks have otherwise than the model, where shapes show it or the model leaves it open."""
        found = [{key: value} for values in self._held("") for key, value in values.items() if type(value) is int]
        return [each for each in found if self._shows(config, each)]

    def _shows(self, config: PreTrainedConfig, values: Values) -> bool:
        changed = _with(config, values)
        if changed is None or all(getattr(config, key, None) is None for key in values):
            return changed is not None
        before, after = (
            {key for key in self.differences(each) if _is_shape(self.target.get(key))} for each in (config, changed)
        )
        return after < before

    def _has_other_depth(self, config: PreTrainedConfig) -> bool:
        """Whether a configuration builds lists of blocks of other lengths than the model's."""
        built = self.build(config)
        return built is None or any(
            f"{path}.{count - 1}." not in built[0] or f"{path}.{count}." in built[0]
            for path, count in self.lists.items()
        )

    def _kinds(self, config: PreTrainedConfig, path: str, index: int) -> list[Values]:
        """Lists that change a block's kind (sliding or full attention), where it is not the kind of its place."""
        wrong = self.differences(config, f"{path}.{index}.")
        kinds = {value for key in wrong if isinstance(value := self.target.get(key), str | bool)}
        found: list[Values] = []
        for key, value in config.to_dict().items():
            plain = isinstance(value, list) and all(isinstance(each, str | int) for each in value)
            if plain and len(value) == self.lists[path]:
                others = [each for each in sorted({*kinds, *value}, key=str) if type(each) is type(value[index])]
                found += [{key: [*value[:index], each, *value[index + 1 :]]} for each in others if each != value[index]]
        return found

    def _search_numbers(self, config: PreTrainedConfig, prefix: str) -> PreTrainedConfig:
        """Try the numbers that the model has where it differs, in place of each number of the configuration."""
        while wrong := self.differences(config, prefix):
            numbers = sorted(set(self._numbers(wrong)))
            candidates = [{key: n} for key in _number_keys(config) for n in numbers]
            changed = self._try(config, candidates, prefix)
            if changed is config:
                return config
            config = changed
        return config

    def _numbers(self, wrong: set[tuple[str, str]]) -> Iterator[int]:
        """Sizes that might stand in the configuration: of axes, of attributes, of module lists."""
        for key in wrong:
            value = self.target.get(key)
            sizes = (
                value[0] if isinstance(value, tuple) and len(value) == 2 and isinstance(value[0], tuple) else [value]
            )
            yield from (size for size in sizes if isinstance(size, int) and not isinstance(size, bool) and size > 0)
        yield from self.lists.values()

    def _is_in_block(self, key: tuple[str, str]) -> bool:
        return any(key[0].startswith(f"{path}.") for path in self.lists)


_MISSING = object()


def _by_block(found: Signature, lists: Iterable[str]) -> dict[str, Signature]:
    """All of a signature, under "", and what there is of each block, under the path of its modules."""
    parts: dict[str, Signature] = {"": found}
    for key, value in found.items():
        for path in lists:
            if key[0].startswith(f"{path}.") and (index := key[0][len(path) + 1 :].partition(".")[0]):
                parts.setdefault(f"{path}.{index}.", {})[key] = value
    return parts


def _block_lists(model: nn.Module) -> dict[str, int]:
    """The outermost module lists whose entries have parameters, with their lengths."""
    found: dict[str, int] = {}
    for path, part in model.named_modules():
        inside = any(path.startswith(f"{other}.") for other in found)
        if isinstance(part, nn.ModuleList) and not inside and any(True for _ in part.parameters()):
            found[path] = len(part)
    return found


def _are_alike(target: Signature, lists: Mapping[str, int]) -> bool:
    """Whether the blocks of each list have the same shapes, so that the stock class may build them all."""
    return all(
        _shapes(target, f"{path}.{i}.") == _shapes(target, f"{path}.0.")
        for path, count in lists.items()
        for i in range(count)
    )


def _shapes(target: Signature, prefix: str) -> dict[tuple[str, str], Any]:
    return {(key[0].removeprefix(prefix), key[1]): value[0] for key, value in _tensors(target, prefix)}


def _tensors(target: Signature, prefix: str) -> Iterator[tuple[tuple[str, str], Any]]:
    for key, value in target.items():
        if key[0].startswith(prefix) and _is_shape(value):
            yield key, value


def _is_shape(value: Any) -> bool:
    return isinstance(value, tuple) and len(value) == 2 and isinstance(value[0], tuple)


def _with(config: PreTrainedConfig, values: Mapping[str, Any]) -> PreTrainedConfig | None:
    """The configuration with other values; None where it does not take them."""
    changed = copy.deepcopy(config)
    try:
        for key, value in values.items():
            setattr(changed, key, copy.deepcopy(value))
    except Exception:  # configurations raise errors of many kinds
        return None
    return changed


def _changes(before: Values, after: Values) -> Values:
    unset = object()
    return {key: value for key, value in after.items() if before.get(key, unset) != value and key != "dtype"}


def is_of_whole(key: str) -> bool:
    """Whether a value is no block's to have: names, tokens, ties."""
    return key.startswith("_") or key.endswith("_id") or key in _OF_WHOLE


def _is_depth(key: str, value: Any) -> bool:
    """Whether a value says how many layers there are, or something of each."""
    return "layer" in key and isinstance(value, int | list) and not isinstance(value, bool)


def _number_keys(config: PreTrainedConfig) -> list[str]:
    """The names of sizes in a configuration: whole numbers, or unset ones."""
    return [
        key
        for key, value in config.to_dict().items()
        if (value is None or (isinstance(value, int) and not isinstance(value, bool)))
        and not (key.endswith("_id") or key.startswith("_") or key in _NO_SIZES)
    ]


_OF_WHOLE = (
    *("architectures", "transformers_version", "model_type", "tie_word_embeddings", "use_cache", "id2label"),
    "label2id",
)
_NO_SIZES = ("architectures", "dtype", "problem_type", "chunk_size_feed_forward", "pretraining_tp", "id2label")


def _complaint(model: nn.Module, config: PreTrainedConfig, search: _Search, key: tuple[str, str]) -> str:
    name = f"{key[0]}{key[1]}"
    built = search.build(config)
    is_, would_be = (each.get(key, "missing") for each in (search.target, built[0][""] if built else {}))
    return (
        f"no {type(config).__name__} builds this {type(model).__name__}: {name} is {is_}, and {would_be} by its "
        f"configuration; expected a model as matta.extract gives it, of modules that Transformers' own class builds"
    )
