"""A Student and Teaching Assistant pair, and where each Student parameter must live in the TA.

A `Case` builds two modules of one class, random to the last bias (so that a norm or a bias in the
wrong place shows). Its `cuts` say of every axis that is not simply leading which pieces it consists
of; `places` turns that into index arrays with NumPy alone, which is the reference that the library
is held against.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import reduce
from operator import or_
from typing import Any, Literal, NamedTuple, final

import numpy as np
import torch
from torch import Tensor, nn

import matta
from architectures import CLASSES, LENGTH, VOCABULARY

BATCH_SIZE, IGNORED = 3, -100

Cut = tuple[tuple[int, int], ...]
"""The pieces of an axis, each a pair (size in the Student, size in the TA)."""

Batch = tuple[tuple[Tensor, ...], Tensor] | dict[str, Tensor]


def equal(pieces: int, student: int, ta: int) -> Cut:
    """An axis of `pieces` equal pieces."""
    return ((student, ta),) * pieces


class Place(NamedTuple):
    """A TA parameter and, for each of its axes, the indices that are the Student's."""

    name: str
    axes: tuple[np.ndarray, ...]

    @property
    def index(self) -> tuple[Tensor, ...]:
        """What picks the Student's part out of the TA's parameter."""
        return tuple(torch.from_numpy(axis) for axis in np.ix_(*self.axes))


@final
@dataclass(frozen=True, kw_only=True)
class Case:
    """A pair of modules, what `nest` is told about them, and where the Student must end up.

    `depth` maps a module list to the TA's index of each Student block. `layouts` is derived from
    `cuts` unless given; a case that matta must know by itself gives an empty one. `mixed` names the
    list whose blocks may be exchanged between the two models. `width_only` says that with all but the
    Student's part zeroed the TA must compute what the Student computes: only inner widths grow.
    """

    id: str
    make: Callable[[], tuple[nn.Module, nn.Module]]
    inputs: Callable[[torch.Generator], tuple[Tensor, ...] | dict[str, Tensor]]
    target: Literal["binary", "classes", "tokens"] = "classes"
    soft: bool = False
    layers: Mapping[str, Any] = field(default_factory=dict)
    depth: Mapping[str, Sequence[int]] = field(default_factory=dict)
    cuts: Mapping[str, Mapping[int, Cut]] = field(default_factory=dict)
    layouts: Mapping[str, Any] | None = None
    private: tuple[str, ...] = ()
    mixed: str | None = None
    width_only: bool = False

    def build(self) -> tuple[nn.Module, nn.Module]:
        """Student and TA in float64, with every parameter and running statistic random."""
        with torch.random.fork_rng():
            torch.manual_seed(0)
            student, ta = self.make()
            for module in (student.double(), ta.double()):
                _shake(module)
        return student, ta

    def nest(self) -> matta.Nested:
        """The pair, nested as its user would."""
        return self.nested(*self.build())

    def nested(self, student: nn.Module, ta: nn.Module, **arguments: Any) -> matta.Nested:
        """The given pair, nested with this case's declarations."""
        layouts = declared(self.cuts) if self.layouts is None else self.layouts
        return matta.nest(student, ta, layers=self.layers, layouts=layouts, private=list(self.private), **arguments)

    def batch(self, seed: int = 0) -> Batch:
        """Inputs of both modules and labels for them."""
        generator = torch.Generator().manual_seed(seed)
        inputs = self.inputs(generator)
        labels = self._labels(generator)
        return {**inputs, "labels": labels} if isinstance(inputs, dict) else (inputs, labels)

    def _labels(self, generator: torch.Generator) -> Tensor:
        if self.target == "binary":
            drawn = torch.rand(BATCH_SIZE, generator=generator, dtype=torch.float64)
            return drawn if self.soft else drawn.round()
        if self.target == "tokens":
            drawn = integers(generator, VOCABULARY, BATCH_SIZE, LENGTH)
            drawn[0, -1] = IGNORED
            return drawn
        if self.soft:
            drawn = torch.rand(BATCH_SIZE, CLASSES, generator=generator, dtype=torch.float64)
            return drawn / drawn.sum(-1, keepdim=True)
        return integers(generator, CLASSES, BATCH_SIZE)


def _shake(module: nn.Module) -> None:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
        for norm in module.modules():
            if isinstance(norm, nn.BatchNorm2d):
                assert norm.running_mean is not None
                assert norm.running_var is not None
                norm.running_mean.normal_()
                norm.running_var.uniform_(0.5, 2.0)


def declared(cuts: Mapping[str, Mapping[int, Cut]]) -> dict[str, Any]:
    """The cuts as a user declares them: a count where the output axis has equal pieces."""
    found: dict[str, Any] = {}
    for pattern, axes in cuts.items():
        if list(axes) == [0] and len(set(axes[0])) == 1:
            found[pattern] = len(axes[0])
        else:
            layouts = [matta.Layout.concat(cut, axis=axis) for axis, cut in axes.items()]
            found[pattern] = reduce(or_, layouts)
    return found


# ------------------------------------------------------------------------ the reference


def places(case: Case, student: nn.Module, ta: nn.Module) -> dict[str, Place]:
    """Where each Student parameter lives in the TA, from the case's declarations and NumPy alone."""
    targets = dict(ta.named_parameters(remove_duplicate=False))
    found = {}
    for name, parameter in student.named_parameters():
        if any(fnmatchcase(name, pattern) for pattern in case.private):
            continue
        ta_name = _translated(name, case.depth)
        cuts = next((axes for pattern, axes in case.cuts.items() if fnmatchcase(name, pattern)), {})
        axes = [
            _positions(cuts.get(axis, ((size, targets[ta_name].shape[axis]),)))
            for axis, size in enumerate(parameter.shape)
        ]
        found[name] = Place(ta_name, tuple(axes))
        assert targets[ta_name].detach()[found[name].index].shape == parameter.shape, name
    return found


def _translated(name: str, depth: Mapping[str, Sequence[int]]) -> str:
    for blocks, indices in depth.items():
        if name.startswith(f"{blocks}."):
            index, _, rest = name.removeprefix(f"{blocks}.").partition(".")
            return f"{blocks}.{indices[int(index)]}.{rest}"
    return name


def _positions(cut: Cut) -> np.ndarray:
    starts = np.cumsum([0] + [ta for _, ta in cut])
    return np.concatenate([np.arange(student) + start for (student, _), start in zip(cut, starts[:-1], strict=True)])


def plain_student(case: Case, student: nn.Module, ta: nn.Module) -> nn.Module:
    """A separate Student that holds copies of its places in the TA; private parameters are its own."""
    plain = copy.deepcopy(student)
    copy_back(plain, ta, places(case, student, ta))
    return plain


def copy_back(student: nn.Module, ta: nn.Module, where: Mapping[str, Place]) -> None:
    """Write into each Student parameter what its place in the TA holds."""
    targets = dict(ta.named_parameters(remove_duplicate=False))
    with torch.no_grad():
        for name, parameter in student.named_parameters():
            if name in where:
                parameter.copy_(targets[where[name].name][where[name].index])


# ------------------------------------------------------------------------ inputs


def logits(module: nn.Module, batch: Batch) -> Tensor:
    """What the module answers to the inputs of the batch."""
    if isinstance(batch, dict):
        return module(**{name: tensor for name, tensor in batch.items() if name != "labels"}).logits
    return module(*batch[0])


def integers(generator: torch.Generator, high: int, *shape: int) -> Tensor:
    """Random integers below `high`."""
    return torch.randint(high, shape, generator=generator)


def vectors(generator: torch.Generator) -> tuple[Tensor, ...]:
    """Rows of `LENGTH` features."""
    return (torch.randn(BATCH_SIZE, LENGTH, generator=generator, dtype=torch.float64),)


def tokens(generator: torch.Generator) -> tuple[Tensor, ...]:
    """Rows of `LENGTH` tokens."""
    return (integers(generator, VOCABULARY, BATCH_SIZE, LENGTH),)


def images(generator: torch.Generator) -> tuple[Tensor, ...]:
    """Images of one channel, 8 by 8."""
    return (torch.randn(BATCH_SIZE, 1, 8, 8, generator=generator, dtype=torch.float64),)


def fields(generator: torch.Generator) -> tuple[Tensor, ...]:
    """Dense features and three categorical ones."""
    return (*vectors(generator), integers(generator, VOCABULARY, BATCH_SIZE, 3))


def prompt(generator: torch.Generator) -> dict[str, Tensor]:
    """Keyword arguments of a Transformers model of text, with padding in one row."""
    mask = torch.ones(BATCH_SIZE, LENGTH, dtype=torch.long)
    mask[0, -1] = 0
    return {"input_ids": tokens(generator)[0], "attention_mask": mask}


def prompt_and_answer(generator: torch.Generator) -> dict[str, Tensor]:
    """Keyword arguments of an encoder-decoder."""
    return {**prompt(generator), "decoder_input_ids": tokens(generator)[0]}


def pixels(generator: torch.Generator) -> dict[str, Tensor]:
    """Keyword arguments of a Transformers model of images."""
    return {"pixel_values": images(generator)[0]}
