"""Metrics that a user brings to an evaluation: what they must have, and what they are given."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Final, Protocol, final

from torch import Tensor, nn

from matta.errors import RunError, first_line
from matta.objectives.labels import TopK
from matta.objectives.losses import at_least_float32
from matta.objectives.objective import Objective, side_by_side
from matta.objectives.several_heads import Heads

_CLASSES: Final = "torchmetrics.classification"  # its metrics want probabilities, and classes for labels
_MANY: Final = 100  # so many outputs between 0 and 1 are no chance
Rows = dict[str, tuple[Tensor, Tensor]]  # logits and labels of each head; of one output under ""


class Metric(Protocol):
    """What a metric must have; those of torchmetrics do."""

    def update(self, logits: Tensor, labels: Tensor, /) -> Any:
        """Take in a batch."""

    def compute(self) -> Any:
        """The value over all batches since the last reset."""

    def reset(self) -> Any:
        """Forget all batches."""


def require_metrics(metrics: Any, objective: Objective | None) -> None:
    """Refuse metrics that are not by name, and those that are none.

    Raises:
        RunError: as it says; or, for an objective of several heads, metrics that are not those of its heads.
    """
    heads = objective.heads if isinstance(objective, Heads) else {}
    for head, own in metrics.items() if heads and hasattr(metrics, "items") else [("", metrics)]:
        if not hasattr(own, "items") or (heads and head not in heads):
            example = f"{{{next(iter(heads))!r}: {{'auc': AUROC(...)}}}}" if heads else "{'auc': AUROC(...)}"
            raise RunError(
                f"received {metrics!r:.80} as metrics; expected them by {'head and ' if heads else ''}name, such as "
                f"{example}"
            )
        for name, metric in own.items():
            _require_metric(name, metric)
            if not head and name == "loss" and objective is not None:
                raise RunError("received a metric named 'loss', which the objective gives; expected another name")


def require_other_names(models: Iterable[str], where: str) -> None:
    """Refuse sub-models under the names of the pair's own models, which they would stand in for.

    Raises:
        RunError: there is one.
    """
    for name in models:
        if name in ("ta", "student") or name.removeprefix("student_").isdigit():
            raise RunError(
                f"received a sub-model named {name!r} in {where}=, which is a name of the pair's own models; expected "
                f"another, such as 'half'"
            )


def _require_metric(name: str, metric: Any) -> None:
    if isinstance(metric, type) or not all(hasattr(metric, each) for each in ("update", "compute", "reset")):
        told = getattr(metric, "__name__", type(metric).__name__)
        raise RunError(
            f"received {told} as the metric {name!r}; expected an object with update, compute and reset, such as "
            f"torchmetrics.AUROC(task='binary')"
        )


def rows_of(logits: Any, labels: Any, objective: Objective | None) -> Rows:
    """What the metrics of one output, or of each head, are to be given of a batch.

    Raises:
        RunError: labels that are a Teacher's top k.
    """
    if isinstance(objective, Heads):
        return {name: rows_of(logits[name], labels[name], each)[""] for name, (each, _) in objective.heads.items()}
    if isinstance(labels, TopK):
        raise RunError(
            "received metrics, and data whose labels are a Teacher's top k; expected labels that are classes or "
            "probabilities; leave metrics out for the loss alone, or evaluate on the data without the Teacher"
        )
    return {"": (side_by_side if objective is None else objective.judged)(logits, labels)}


@final
class Metrics:
    """Copies of an evaluation's metrics, for one model."""

    def __init__(self, metrics: Mapping[str, Any], objective: Objective | None) -> None:
        heads = objective.heads if isinstance(objective, Heads) else None
        by_head = {"": metrics} if heads is None else metrics
        self._metrics = [
            (head, name, copy.deepcopy(metric)) for head, own in by_head.items() for name, metric in own.items()
        ]
        self._looked_at: dict[tuple[str, str], tuple[bool, int]] = {}  # whether all lie between 0 and 1; how many
        self._objectives = {"": objective} if heads is None else {head: each for head, (each, _) in heads.items()}
        for _, _, metric in self._metrics:
            for part in _parts(metric):
                if hasattr(part, "distributed_available_fn"):  # torchmetrics would wait for all processes to compute
                    part.distributed_available_fn = lambda: False
            metric.reset()

    def __bool__(self) -> bool:
        return bool(self._metrics)

    def update(self, rows: Rows) -> None:
        """Take in the rows of a batch.

        Raises:
            RunError: a metric that fails on them.
        """
        for head, name, metric in self._metrics:
            logits, labels = rows[head]
            if not labels.numel():  # all are ignored
                continue
            objective = self._objectives[head]
            if _wants_classes(metric) and (objective is None or objective.makes_probabilities):
                self._look_at((head, name), logits)
                logits, labels = _probabilities(logits, labels), _classes(name, metric, labels)
            try:
                metric.update(logits, labels)
            except Exception as error:  # of the user's metric: any kind
                raise RunError(
                    f"the metric {name!r} fails on logits of shape {tuple(logits.shape)} and labels of shape "
                    f"{tuple(labels.shape)}: {first_line(error)}; expected a metric for these"
                ) from error

    def _look_at(self, key: tuple[str, str], logits: Tensor) -> None:
        is_unit, count = self._looked_at.get(key, (True, 0))
        is_unit = is_unit and bool(((logits >= 0) & (logits <= 1)).all())
        self._looked_at[key] = is_unit, count + logits.numel()

    def values(self) -> Iterator[tuple[str, float]]:
        """The name and the value of each; a warning where a module seems to return probabilities."""
        for head, name, metric in self._metrics:
            is_unit, count = self._looked_at.get((head, name), (False, 0))
            if is_unit and count >= _MANY:
                warnings.warn(
                    f"all {count} outputs that the metric {name!r} was given lie between 0 and 1, and were taken for "
                    f"logits; expected modules that return logits: if these are probabilities, leave their sigmoid or "
                    f"softmax out",
                    stacklevel=2,
                )
            yield f"{head}_{name}" if head else name, _number(name, metric.compute())


def _parts(metric: Any) -> Iterable[Any]:
    return metric.modules() if isinstance(metric, nn.Module) else ()


def _wants_classes(metric: Any) -> bool:
    return any(kind.__module__.startswith(_CLASSES) for part in _parts(metric) for kind in type(part).__mro__)


def _probabilities(logits: Tensor, labels: Tensor) -> Tensor:
    """Of a batch whose logits all lie between 0 and 1 torchmetrics would think that it has probabilities already."""
    if logits.shape == labels.shape:
        return logits.double().sigmoid()  # in float32 all logits from 17 on would be alike
    return at_least_float32(logits).softmax(-1)


def _classes(name: str, metric: Any, labels: Tensor) -> Tensor:
    """Labels of 0 and 1 as integers.

    Raises:
        RunError: probabilities, and labels below 0 that the metric does not ignore; some metrics take both for 0.
    """
    if labels.is_floating_point() and not bool((labels == labels.round()).all()):
        raise RunError(
            f"the metric {name!r} of torchmetrics takes classes, and the labels are probabilities; expected evaluation "
            f"data with hard labels, or a metric of your own"
        )
    lowest = int(labels.min())
    if lowest < 0 and all(getattr(part, "ignore_index", None) is None for part in _parts(metric)):
        raise RunError(
            f"the metric {name!r} of torchmetrics takes classes, and a label is {lowest}; expected such a metric with "
            f"ignore_index={lowest}"
        )
    return labels.long()


def _number(name: str, value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError, RuntimeError):
        raise RunError(
            f"the metric {name!r} computes {' '.join(repr(value).split()):.80}; expected one number (a "
            f"MetricCollection is metrics= itself)"
        ) from None
