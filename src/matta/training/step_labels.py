"""The labels of a batch: its own, with their weights, and those that Teachers make."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from matta.errors import LabelError, MattaError, require_kind
from matta.nesting.batches import Batch, call, eval_mode, split_labels
from matta.objectives.labels import Weighted
from matta.objectives.objective import Objective

Read = Callable[[Any], Any]  # the logits in what a module returned


def weighted_batch(batch: Batch, objective: Objective) -> tuple[Any, Any]:
    """The inputs and the labels of a batch, with the weights that the objective names, which are no input then.

    Labels are None where there are none, or `Weighted` of None.

    Raises:
        LabelError: the batch has no such field.
    """
    inputs, labels = split_labels(batch)
    name = objective.weights
    if name is None or isinstance(labels, Weighted):
        return inputs, labels
    if not isinstance(inputs, Mapping) or name not in inputs:
        fields = ", ".join(map(str, batch)) if isinstance(batch, Mapping) else f"a pair with {type(labels).__name__}"
        raise LabelError(
            f"the objective has weights={name!r}, and the batch has: {fields}; expected a mapping with the field "
            f"{name!r}, or a pair whose labels are matta.objectives.Weighted(labels, weights)"
        )
    return {key: value for key, value in inputs.items() if key != name}, Weighted(labels, inputs[name])


def has_labels(labels: Any) -> bool:
    """Whether there are labels, and not the weights alone of some that a Teacher makes."""
    own = labels.labels if isinstance(labels, Weighted) else labels
    return not isinstance(own, str) and any(isinstance(each, Tensor) for each in tree_leaves(own))


@final
@dataclass(frozen=True, kw_only=True)
class Teachers:
    """What makes the labels of a batch.

    Args:
        modules: The Teachers; the mean of the labels that they make is taken, of probabilities or values.
        temperature: What their logits are divided by before that.
        labels: What the batch's own labels weigh in the mixture with the Teachers'.

    Raises:
        MattaError: a value out of range, or one that needs a Teacher without one.
    """

    modules: tuple[nn.Module, ...]
    temperature: float = 1.0
    labels: float = 0.0

    def __post_init__(self) -> None:
        if not 0 < self.temperature < float("inf"):
            raise MattaError(f"received temperature={self.temperature!r}; expected a number over 0")
        if not 0 <= self.labels <= 1:
            raise MattaError(
                f"received labels={self.labels!r}; expected the weight of the batch's own labels beside a Teacher's, "
                f"from 0 to 1"
            )
        if not self.modules and (self.temperature, self.labels) != (1.0, 0.0):
            raise MattaError("received temperature or labels without a Teacher; expected CoTraining(teacher=...) too")

    def label(self, inputs: Any, given: Any, objective: Objective, read: Read) -> Any:
        """The labels of a batch: given ones, or those of the Teachers.

        Raises:
            LabelError: there are none, or none to be mixed with the Teachers'.
        """
        if not self.modules or self.labels == 1.0:
            self._require(given, "CoTraining(teacher=...) to make them")
            return given
        own: Any = given.labels if isinstance(given, Weighted) else given
        own = own if has_labels(own) else None
        made = [self._taught(each, inputs, own, objective, read) for each in self.modules]
        taught = made[0] if len(made) == 1 else tree_map(_mean, *made)
        if self.labels:
            self._require(given, "CoTraining(labels=0.0), the Teacher's alone")
            taught = objective.mixed(own, taught, self.labels)
        return Weighted(taught, given.weights) if isinstance(given, Weighted) else taught

    def _taught(self, teacher: nn.Module, inputs: Any, own: Any, objective: Objective, read: Read) -> Any:
        with eval_mode(teacher), torch.no_grad():
            logits = read(call(teacher, inputs))
        if self.temperature != 1.0:
            logits = tree_map(lambda each: each / self.temperature, logits)
        return objective.teach(logits, own)

    @staticmethod
    def _require(labels: Any, other: str) -> None:
        if not has_labels(labels):
            own = labels.labels if isinstance(labels, Weighted) else labels
            raise LabelError(
                f"the labels of the batch are {type(own).__name__}; expected a tensor or a TopK: 'labels' of a "
                f"mapping, the second of a pair, or {other}"
            )


def as_teachers(teacher: nn.Module | Sequence[nn.Module] | None) -> tuple[nn.Module, ...]:
    """The Teachers as they were given to `CoTraining`: none, one or several.

    Raises:
        MattaError: one is no module.
    """
    several = teacher if isinstance(teacher, Sequence) else () if teacher is None else (teacher,)
    for each in several:
        require_kind("teacher", each, nn.Module, "a module, or a list of modules")
    return tuple(several)


def refuse_shifted_twice(inputs: Any, labels: Any) -> None:
    """Refuse, for an objective that shifts the labels, a decoder's inputs that are these labels shifted already.

    Raises:
        LabelError: they are.
    """
    ids = inputs.get("decoder_input_ids") if isinstance(inputs, Mapping) else None
    if not (isinstance(ids, Tensor) and isinstance(labels, Tensor) and ids.shape == labels.shape):
        return
    counts = labels[..., :-1] >= 0
    is_shifted = (labels[..., :-1] == ids[..., 1:])[counts]
    if not torch.equal(ids, labels) and is_shifted.numel() and bool(is_shifted.all()):
        raise LabelError(
            "received CausalLM, which shifts the labels, and decoder_input_ids that are the labels shifted already; "
            "expected matta.objectives.Classification()"
        )


def _mean(*labels: Tensor) -> Tensor:
    return torch.stack(labels).mean(0)
