"""Several outputs of one model, each with an objective and labels of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, final

import torch
from torch import Tensor

from matta.errors import LabelError
from matta.objectives.labels import Weighted, unweighted
from matta.objectives.losses import LossWeights
from matta.objectives.objective import Joint, Losses, Objective


@final
class Heads(Objective):
    """Several heads: L_S, L_TA and L_D are the sums over the heads of their own, each times the head's weight.

    The modules return a mapping or an object with an output under each head's name. The labels are a mapping from the
    same names: `{"x": ..., "labels": {"click": ..., "watch_s": ...}}`. Each head's loss is the mean over its own
    labels, over the whole step where batches are accumulated or several processes train. A Teacher labels every head.

    Args:
        heads: The objective and the weight of each head, by name. Their `ignore_index` says which labels do not count.
        weights: The field of the batch that says what each example weighs in the mean, for all heads; None: all the
            same.

    Raises:
        LabelError: no heads, one that is no pair of an objective and a weight, a weight that is not a number of 0 or
            more, or sample weights named by a head.

    Example:
        >>> import matta
        >>> heads = Heads({"click": (matta.objectives.Binary(), 1.0), "watch_s": (matta.objectives.Huber(), 0.5)})
        >>> logits = {"click": torch.zeros(2), "watch_s": torch.zeros(2)}
        >>> labels = {"click": torch.ones(2), "watch_s": torch.ones(2)}
        >>> round(heads.cross_entropy(logits, labels).item(), 4)  # 0.6931 + 0.5 * 0.5
        0.9431
    """

    def __init__(self, heads: Mapping[str, tuple[Objective, float]], *, weights: str | None = None) -> None:
        if not heads:
            raise LabelError("received no heads; expected such as {'click': (Binary(), 1.0)}")
        for name, head in heads.items():
            if not isinstance(head, Sequence) or len(head) != 2 or not isinstance(head[0], Objective):
                raise LabelError(
                    f"received {head!r:.100} for the head {name!r}; expected an objective and its weight: "
                    f"(Binary(), 1.0)"
                )
            objective, weight = head
            if not 0 <= weight < float("inf"):
                raise LabelError(
                    f"received the weight {weight!r} for the head {name!r}; expected a number of 0 or more"
                )
            if objective.weights is not None:
                raise LabelError(
                    f"the head {name!r} has weights={objective.weights!r}; expected Heads(..., weights="
                    f"{objective.weights!r}), for all heads"
                )
        self.heads, self.weights, self.outputs = dict(heads), weights, tuple(heads)
        self.makes_probabilities = all(objective.makes_probabilities for objective, _ in heads.values())

    def joint(self, students: Sequence[Any], ta: Any, labels: Any, weights: LossWeights) -> Joint:
        made = [
            objective.joint([each[name] for each in students], ta[name], own, weights)
            for name, objective, own in self._each(labels)
        ]
        parts = self._scaled([each.loss for each in made])
        return Joint(loss=parts.sum(), losses=self._summed([each.losses for each in made]), parts=parts)

    def losses(self, students: Sequence[Any], ta: Any, labels: Any) -> Losses:
        return self._summed(
            [
                objective.losses([each[name] for each in students], ta[name], own)
                for name, objective, own in self._each(labels)
            ]
        )

    def cross_entropy(self, logits: Any, labels: Any) -> Tensor:
        return self.cross_entropies(logits, labels).sum()

    def cross_entropies(self, logits: Any, labels: Any) -> Tensor:
        """The loss of each head, times its weight."""
        return self._scaled([each.cross_entropy(logits[name], own) for name, each, own in self._each(labels)])

    def num_counted(self, labels: Any) -> Tensor:
        """The labels of each head that count."""
        return torch.stack([torch.as_tensor(each.num_counted(own)) for _, each, own in self._each(labels)])

    def teach(self, logits: Any, labels: Any) -> Any:
        own = {name: each for name, _, each in self._each(labels)} if labels is not None else {}
        return {name: each.teach(logits[name], own.get(name)) for name, (each, _) in self.heads.items()}

    def mixed(self, labels: Any, taught: Any, share: float) -> Any:
        return {name: each.mixed(own, taught[name], share) for name, each, own in self._each(labels)}

    def _each(self, labels: Any) -> list[tuple[str, Objective, Any]]:
        """The name, the objective and the labels of each head, which all have the same weights.

        Raises:
            LabelError: labels that are no mapping, or without a head.
        """
        own, weights = unweighted(labels)
        if not isinstance(own, Mapping) or not all(name in own for name in self.heads):
            found = ", ".join(map(str, own)) if isinstance(own, Mapping) else type(own).__name__
            raise LabelError(
                f"the labels are {found}; expected a mapping with labels for each head: {', '.join(self.heads)}"
            )
        of = (lambda each: each) if weights is None else (lambda each: Weighted(each, weights))
        return [(name, objective, of(own[name])) for name, (objective, _) in self.heads.items()]

    def _scaled(self, losses: Sequence[Tensor]) -> Tensor:
        return torch.stack([weight * each for each, (_, weight) in zip(losses, self.heads.values(), strict=True)])

    def _summed(self, found: Sequence[Losses]) -> Losses:
        heads = tuple(_times(weight, each) for each, (_, weight) in zip(found, self.heads.values(), strict=True))
        return Losses(
            students=tuple(torch.stack(each).sum() for each in zip(*(each.students for each in heads), strict=True)),
            ta=torch.stack([each.ta for each in heads]).sum(),
            distill=tuple(torch.stack(each).sum() for each in zip(*(each.distill for each in heads), strict=True)),
            heads=heads,
        )


def _times(weight: float, losses: Losses) -> Losses:
    return Losses(
        students=tuple(weight * each for each in losses.students),
        ta=weight * losses.ta,
        distill=tuple(weight * each for each in losses.distill),
    )
