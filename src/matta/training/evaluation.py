"""Judge Student, Teaching Assistant and sub-models in mid-training, by losses and metrics."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import NoneType
from typing import Any, final

import torch
from torch import Tensor, distributed, nn

from matta.errors import RunError, require_kind
from matta.nesting.batches import Batch, call, eval_mode, logits_of, map_tensors, split_labels
from matta.nesting.copying import deep_copy
from matta.nesting.nested import Nested
from matta.nesting.plan import slices
from matta.nesting.sharded_slices import follow_shards
from matta.nesting.slicing import bind, skeleton, slices_of
from matta.objectives.labels import Labels, unweighted
from matta.objectives.losses import divisor
from matta.objectives.objective import Objective
from matta.optim.divided_parameters import is_sharded
from matta.sizes.extraction import warn_of_statistics
from matta.sizes.submodels import SubModel, live
from matta.training.metrics import Metric, Metrics, Rows, require_metrics, require_other_names, rows_of
from matta.training.processes import (
    collected,
    dealt,
    gathered_by_main,
    is_main_process,
    is_shared_out,
    known_length,
    of_main,
    while_all,
)
from matta.training.step_labels import weighted_batch


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Eval mode and no gradients inside; afterwards each part of `module` has the mode that it had."""
    with eval_mode(module), torch.no_grad():
        yield


Evaluate = Callable[[Nested], Mapping[str, float]]


@final
@dataclass(frozen=True, kw_only=True)
class Evaluated:
    """What `evaluate` gave after a step."""

    step: int
    values: dict[str, float]


@final
@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What `fit(evaluate=...)` calls: one pass over `data`, all models on each batch.

    Called with a nesting, it gives a dict of `<model>_<metric>`, such as `student_loss` or `ta_auroc`. The
    models are `student` (with several, `student_1` is the second), `ta`, and the sub-models named here. In a run of
    several processes they share the batches. Called with a plain module it gives that module's, such as `loss`:
    `matta.family(evaluate=lambda module: f(module)["loss"])`.

    Args:
        data: Batches that can be passed over again and again: in several processes all of them in each.
        objective: Gives `<model>_loss` in nats: the cross-entropy, the mean over all examples or positions that
            are not ignored, or by their weights. With labels that are a `TopK` it is the loss that they are trained
            with.
        metrics: Objects with `update(logits, labels)`, `compute()` and `reset()`, by name, such as those of
            torchmetrics; for an objective of several heads by head and name: `{"click": {"auc": AUROC(...)}}` gives
            `student_click_auc`. Logits come as (examples, classes), or in the shape of the labels if equally many. With
            an objective what it ignores is left out (but where an example has several labels, some of them ignored),
            and with `CausalLM` each position has the next token for its label. Metrics of `torchmetrics.classification`
            get probabilities in place of logits: they would take a batch of logits from 0 to 1 for such. The weights of
            examples are for the loss alone.
        models: Sub-models to be judged too, by name.
        logits: Where the logits are in what the modules return, as in `CoTraining`.

    Raises:
        RunError: neither an objective nor a metric, a metric that is none, fails or computes no number, data that is
            an iterator or no iterable of batches, data without batches or without labels that count, data of which this
            process has a share alone, or that ends earlier in some, or metrics for labels that they cannot judge.

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
        if not isinstance(self.data, Iterable):
            raise RunError(
                f"received data of type {type(self.data).__name__}; expected batches: a DataLoader of it, or a list"
            )
        require_kind("objective", self.objective, (Objective, NoneType), "such as matta.objectives.Binary()")
        require_metrics(self.metrics, self.objective)
        require_other_names(self.models, "models")

    def __call__(self, nested: nn.Module) -> dict[str, float]:
        """The values of every model of a nesting, in this process alone; of a plain module those of itself."""
        return self._values(nested, together=False)

    def together(self, nested: Nested) -> dict[str, float]:
        """As called, with the batches shared among all processes, which must all call this.

        The buffers are those of the main process, the data must come in the same order to all, and the values are the
        same on all. Losses are added up, and metrics updated, in the order of the batches, as in one process.
        """
        with _buffers_of_main(nested):
            return of_main(self._values(nested, together=True))

    def _values(self, nested: nn.Module, *, together: bool) -> dict[str, float]:
        if is_shared_out(self.data):
            raise RunError(
                "received evaluation data that gives each process its share; expected all of it, which Evaluation "
                "shares out itself: the DataLoader as it was before accelerator.prepare, without a DistributedSampler"
            )
        require_kind("module", nested, nn.Module, "what matta.nest gives, or a plain module")
        modules = self._models(nested) if isinstance(nested, Nested) else {"": nested}
        tallies = {
            f"{name}_" if name else "": _Tally(module, self, together=together) for name, module in modules.items()
        }
        device = next((each.device for each in nested.parameters()), torch.device("cpu"))
        if together and isinstance(nested, Nested):
            follow_shards(list(modules.values()), nested.ta)
        rounds = dealt(self.data, together=together)
        if together and known_length(self.data) is None:  # of others fit has compared the lengths
            rounds = while_all(rounds, device, alike=True)
        with evaluating(nested):
            for batch, counts in rounds:
                batch = map_tensors(batch, lambda tensor: tensor.to(device))
                inputs, labels = weighted_batch(batch, self.objective) if self.objective else split_labels(batch)
                for tally in tallies.values():
                    tally.add(inputs, labels, counts=counts)
        return {f"{model}{name}": value for model, tally in tallies.items() for name, value in tally.values()}

    def _models(self, nested: Nested) -> dict[str, nn.Module]:
        students = {f"student_{i}" if i else "student": each for i, each in enumerate(nested.students)}
        warn_of_statistics(nested, self.models, "it is evaluated with these")
        return {**students, "ta": nested.ta, **{name: live(nested, spec).eval() for name, spec in self.models.items()}}


@contextmanager
def _buffers_of_main(nested: Nested) -> Iterator[None]:
    """The main process's buffers in all; BatchNorm has seen other batches in each."""
    kept: list[tuple[Tensor, Tensor]] = []
    for buffer in nested.buffers():
        value = buffer.detach().contiguous().clone()
        distributed.broadcast(value, 0)
        if not torch.equal(value, buffer):
            kept.append((buffer, buffer.detach().clone()))
            buffer.data.copy_(value)
    try:
        yield
    finally:
        for buffer, own in kept:
            buffer.data.copy_(own)


@final
class _Tally:
    """The values of one model over the batches so far; of all processes' on the main one."""

    def __init__(self, module: nn.Module, evaluation: Evaluation, *, together: bool) -> None:
        self.module, self.objective, self.where = module, evaluation.objective, evaluation.logits
        self.together = together
        self.metrics = Metrics(evaluation.metrics, evaluation.objective)
        self.has_data = False
        self.losses: list[Tensor] = []
        self.counts: list[Tensor] = []

    def add(self, inputs: Any, labels: Labels, *, counts: bool) -> None:
        logits = logits_of(call(self.module, inputs), self.where, self.objective.outputs if self.objective else None)
        if self.objective is not None and counts:
            self.losses.append(self.objective.cross_entropies(logits, labels).double())
            self.counts.append(torch.as_tensor(self.objective.num_counted(labels)).double().cpu())
        self.has_data = True
        if self.metrics:
            own = rows_of(logits, unweighted(labels)[0], self.objective)
            for rows in self._rows_of_all(own, counts=counts):
                self.metrics.update(rows)

    def _rows_of_all(self, rows: Rows, *, counts: bool) -> list[Rows]:
        """Logits and labels of this round's batches, on the main process."""
        if not self.together:
            return [rows]
        device = next(iter(rows.values()))[0].device
        found = gathered_by_main(map_tensors(rows, Tensor.cpu) if counts else None)
        return [map_tensors(each, lambda tensor: tensor.to(device)) for each in found if each is not None]

    def values(self) -> Iterator[tuple[str, float]]:
        if not self.has_data:
            raise RunError("the evaluation data gave no batch; expected at least one")
        if self.objective is not None:
            own = [each.cpu() for each in self.losses]
            losses, counts = (torch.stack(collected(each, together=self.together)) for each in (own, self.counts))
            if not counts.any():
                raise RunError("all labels of the evaluation data are ignored; expected some that count")
            yield "loss", float((torch.linalg.vecdot(losses, counts, dim=0) / divisor(counts.sum(0))).sum())
        if is_main_process() or not self.together:
            yield from self.metrics.values()


def whole_nested(nested: Nested) -> Nested | None:
    """A copy of a sharded nesting with whole parameters, on the main process alone; all must call this.

    Elsewhere it is None, and no more than one parameter is whole at a time.
    """
    whole: dict[int, nn.Parameter] = {}
    parameters: list[Any] = list(nested.parameters())
    for each in parameters:
        value: Tensor = each.detach().full_tensor() if is_sharded(each) else each.detach()
        if is_main_process():
            whole[id(each)] = nn.Parameter(value, requires_grad=each.requires_grad)
    if not is_main_process():
        return None
    ta = deep_copy(nested.ta, dict(whole))
    students = [skeleton(student, keep_own=True) for student in nested.students]
    for made, student, plan in zip(students, nested.students, nested.plans, strict=True):
        for part in made.modules():
            own = {name: whole[id(each)] for name, each in part._parameters.items() if each is not None}
            part._parameters.update(own)
        frozen = [name for name, live in slices_of(student).items() if live.detach]
        bind(made, slices(ta, plan.placements, frozen))
    return Nested(ta, students, nested.plans)
