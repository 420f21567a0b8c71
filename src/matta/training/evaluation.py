"""Judge Student, Teaching Assistant and sub-models in mid-training, by losses and metrics."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol, final

import torch
from torch import Tensor, nn

from matta.errors import RunError
from matta.nesting.batches import Batch, call, logits_of, map_tensors, split_labels
from matta.nesting.nested import Nested
from matta.objectives.labels import Labels, TopK, unweighted
from matta.objectives.losses import divisor
from matta.objectives.objective import Objective
from matta.sizes.submodels import SubModel, live
from matta.training.processes import is_shared_out
from matta.training.step_labels import weighted_batch


class Metric(Protocol):
    """What a metric must have; those of torchmetrics do."""

    def update(self, logits: Tensor, labels: Tensor, /) -> Any:
        """Take in a batch."""

    def compute(self) -> Any:
        """The value over all batches since the last reset."""

    def reset(self) -> Any:
        """Forget all batches."""


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Eval mode and no gradients inside; afterwards each part of `module` has the mode that it had."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for part, mode in modes:
            part.training = mode


@final
@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What `fit(evaluate=...)` calls: one pass over `data`, all models on each batch.

    Called with a nesting, it gives a dict of `<model>_<metric>`, such as `student_loss` or `ta_auroc`. The
    models are `student` (with several, `student_1` is the second), `ta`, and the sub-models named here. Called with
    a plain module it gives that module's, such as `loss`: `matta.family(evaluate=lambda module: f(module)["loss"])`.

    Args:
        data: Batches that can be passed over again and again.
        objective: Gives `<model>_loss` in nats: the cross-entropy, the mean over all examples or positions that
            are not ignored, or by their weights. With labels that are a `TopK` it is the loss that they are trained
            with.
        metrics: Objects with `update(logits, labels)`, `compute()` and `reset()`, by name, such as those of
            torchmetrics. Logits come as (examples, classes), or in the shape of the labels if equally many.
        models: Sub-models to be judged too, by name.
        logits: Where the logits are in what the modules return, as in `CoTraining`.

    Raises:
        RunError: neither an objective nor a metric, an iterator as data, data without batches or without labels that
            count, data of which this process has a share alone, or metrics for labels that are a `TopK`.

    Example:
        >>> import matta
        >>> nested = matta.nest(nn.Linear(2, 1), nn.Linear(2, 1))
        >>> data = [(torch.zeros(4, 2), torch.ones(4))]
        >>> sorted(Evaluation(data=data, objective=matta.objectives.Binary())(nested))
        ['student_loss', 'ta_loss']
    """

    data: Iterable[Batch]
    objective: Objective | None = None
    metrics: Mapping[str, Metric] = field(default_factory=dict)
    models: Mapping[str, SubModel] = field(default_factory=dict)
    logits: str | Callable[[Any], Any] | None = None

    def __post_init__(self) -> None:
        if self.objective is None and not self.metrics:
            raise RunError("received neither an objective nor metrics; expected at least one thing to evaluate by")
        if isinstance(self.data, Iterator):
            raise RunError(
                f"received data of type {type(self.data).__name__}, which can be passed over only once; expected a "
                f"DataLoader or a list"
            )

    def __call__(self, nested: nn.Module) -> dict[str, float]:
        """The values of every model of a nesting; of a plain module those of itself, such as `loss`."""
        if is_shared_out(self.data):
            raise RunError(
                "received evaluation data that gives each process its share, and one process evaluates; expected all "
                "of it: the DataLoader as it was before accelerator.prepare, without a DistributedSampler"
            )
        modules = self._models(nested) if isinstance(nested, Nested) else {"": nested}
        tallies = {f"{name}_" if name else "": _Tally(module, self) for name, module in modules.items()}
        device = next((each.device for each in nested.parameters()), torch.device("cpu"))
        with evaluating(nested):
            for batch in self.data:
                batch = map_tensors(batch, lambda tensor: tensor.to(device))
                inputs, labels = weighted_batch(batch, self.objective) if self.objective else split_labels(batch)
                for tally in tallies.values():
                    tally.add(inputs, labels)
        return {f"{model}{name}": value for model, tally in tallies.items() for name, value in tally.values()}

    def _models(self, nested: Nested) -> dict[str, nn.Module]:
        students = {f"student_{i}" if i else "student": each for i, each in enumerate(nested.students)}
        return {**students, "ta": nested.ta, **{name: live(nested, spec).eval() for name, spec in self.models.items()}}


@final
class _Tally:
    """The values of one model over the batches so far."""

    def __init__(self, module: nn.Module, evaluation: Evaluation) -> None:
        self.module, self.objective, self.where = module, evaluation.objective, evaluation.logits
        self.metrics = {name: copy.deepcopy(metric) for name, metric in evaluation.metrics.items()}
        for metric in self.metrics.values():
            metric.reset()
        self.has_data = False
        self.losses: list[Tensor] = []
        self.counts: list[Tensor] = []

    def add(self, inputs: Any, labels: Labels) -> None:
        logits = logits_of(call(self.module, inputs), self.where, self.objective.outputs if self.objective else None)
        if self.objective is not None:
            self.losses.append(self.objective.cross_entropies(logits, labels).double())
            self.counts.append(torch.as_tensor(self.objective.num_counted(labels)).double().cpu())
        self.has_data = True
        for metric in self.metrics.values():
            metric.update(*_rows(logits, unweighted(labels)[0]))

    def values(self) -> Iterator[tuple[str, float]]:
        if not self.has_data:
            raise RunError("the evaluation data gave no batch; expected at least one")
        if self.losses:
            losses, counts = torch.stack(self.losses).cpu(), torch.stack(self.counts)
            if not counts.any():
                raise RunError("all labels of the evaluation data are ignored; expected some that count")
            yield "loss", float((torch.linalg.vecdot(losses, counts, dim=0) / divisor(counts.sum(0))).sum())
        for name, metric in self.metrics.items():
            yield name, float(metric.compute())


def _rows(logits: Tensor, labels: Tensor | TopK) -> tuple[Tensor, Tensor]:
    """Logits and labels as metrics expect them."""
    if isinstance(labels, TopK):
        raise RunError(
            "received metrics, and data whose labels are a Teacher's top k; expected labels that are classes or "
            "probabilities; leave metrics out for the loss alone, or evaluate on the data without the Teacher"
        )
    if logits.numel() == labels.numel():
        return logits.reshape(labels.shape), labels
    return logits.flatten(0, -2), labels.flatten()
