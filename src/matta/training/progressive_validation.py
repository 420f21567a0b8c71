"""Progressive validation: each event is predicted before it is learned from, and judged by that.

AucLoss = 1 − AUROC (section 4.1), log loss in nats, and calibration, the mean prediction over the mean label.
Over the whole stream and by day, AUROC comes from histograms of the logits: constant memory, and an error
that is known, at most half of the pairs that share a bin. Over the sliding window it is exact.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any, Final, final

import torch
from jaxtyping import Float
from torch import Tensor, nn

from matta.errors import LabelError, RunError
from matta.nesting.batches import Batch, call
from matta.objectives.labels import unweighted
from matta.sizes.extraction import running_statistics, warn_of_statistics
from matta.sizes.submodels import SubModel, live
from matta.training.cotraining import CoTraining
from matta.training.metrics import require_other_names
from matta.training.processes import gathered
from matta.training.step_labels import weighted_batch
from matta.training.step_output import CoTrainingOutput

Values = dict[str, dict[str, float]]
METRICS: Final = {"auc_loss": "AucLoss", "log_loss": "log loss (nats)", "calibration": "mean prediction / mean label"}
_LIMIT: Final = 16.0
_MOST_POINTS: Final = 2000
_DAY_S: Final = 86400


@final
class ProgressiveValidation:
    """An observer for `matta.fit` with one logit: metrics of Student, TA and sub-models, before each step.

    Student and TA are judged by the logits of the training step's own forward; sub-models are run in eval mode.
    Times, for the values by day, are those of a `matta.streams.Stream`'s batches. In several processes the events of
    all count, in the order in which the batches were shared out. Each counts once, whatever its weight in the loss.

    Args:
        watch: Sub-models to be judged too, by name.
        window: Events in the sliding window.
        every: Events between the points of the curve; by default the window. When there are 2000 points, every
            second one is dropped, and from then on they are twice as far apart.
        num_bins: Bins of the logit from -16 to 16.
        ignore_index: Marks the labels that do not count.

    Raises:
        RunError: settings that cannot work.

    Example:
        >>> import matta
        >>> nested = matta.nest(nn.Linear(2, 1), nn.Linear(2, 1))
        >>> cotrain = matta.CoTraining(nested, matta.objectives.Binary())
        >>> data = [(torch.eye(2), torch.tensor([0.0, 1.0]))]
        >>> validation = ProgressiveValidation()
        >>> optimizer = torch.optim.SGD(nested.parameters(), lr=0.1)
        >>> done = matta.fit(cotrain, data, optimizer, steps=5, observers=[validation], progress=False)
        >>> validation.num_events, sorted(validation.values()["student"])
        (10, ['auc_loss', 'auc_loss_error', 'calibration', 'log_loss'])
    """

    def __init__(
        self,
        *,
        watch: Mapping[str, SubModel] | None = None,
        window: int = 10_000,
        every: int | None = None,
        num_bins: int = 1 << 14,
        ignore_index: int = -100,
    ) -> None:
        if window < 1 or num_bins < 2 or (every is not None and every < 1):
            raise RunError(
                f"received window={window}, every={every} and num_bins={num_bins}; expected at least 1, 1 and 2"
            )
        require_other_names(watch or (), "watch")
        self.num_events, self.num_nonfinite = 0, 0
        self.points: list[dict[str, Any]] = []
        self.days: list[dict[str, Any]] = []
        self._watch = dict(watch or {})
        self._live: dict[str, nn.Module] = {}
        self._every = every or window
        self._window, self._num_bins, self._ignore_index = window, num_bins, ignore_index
        self._names: list[str] = []
        self._day: int | None = None
        self._last_time: float | None = None
        self._next_point = self._every

    @property
    def names(self) -> tuple[str, ...]:
        """The models that are judged."""
        return tuple(self._names)

    @torch.no_grad()
    def before_step(self, cotrain: CoTraining, batch: Batch, out: CoTrainingOutput) -> None:
        """Take in the predictions for a batch."""
        inputs, labels = weighted_batch(batch, cotrain.objective)
        labels, _ = unweighted(labels)
        if not isinstance(labels, Tensor):
            raise LabelError("the batch has no labels; expected them for progressive validation, with a Teacher too")
        logits = self._logits(cotrain, inputs, out)
        targets = labels.reshape(-1).double().cpu()
        stacked = torch.stack([_one_logit(each, targets, name) for name, each in logits.items()])
        if not self._names:
            self._begin(list(logits))
        for part in gathered((stacked, targets, getattr(batch, "times", None))):
            self._add(*part)

    def after_step(self, cotrain: CoTraining) -> None:
        """Nothing: what counts is before the step."""

    def _logits(self, cotrain: CoTraining, inputs: Any, out: CoTrainingOutput) -> dict[str, Tensor]:
        nested = cotrain.nested
        if not self._live:
            warn_of_statistics(nested, self._watch, "what it predicts is judged by these")
        if not self._live or running_statistics(nested.ta):  # a live sub-model follows the weights, not the statistics
            self._live = {name: live(nested, spec).eval() for name, spec in self._watch.items()}
        students = {f"student_{i}" if i else "student": each for i, each in enumerate(out.all_student_logits)}
        mixed = {name: cotrain.read(call(module, inputs)) for name, module in self._live.items()}
        return {**students, "ta": out.ta_logits, **mixed}

    def _begin(self, names: list[str]) -> None:
        self._names = names
        self._total, self._today = (_Tally(len(names), self._num_bins) for _ in range(2))
        self._recent = torch.zeros(len(names) + 1, self._window, dtype=torch.float64)

    def _add(self, logits: Tensor, labels: Tensor, times: Tensor | None) -> None:
        if not bool(torch.isfinite(logits.sum())) or bool((labels == self._ignore_index).any()):
            finite = torch.isfinite(logits).all(0)
            kept = finite & (labels != self._ignore_index)
            self.num_nonfinite += int((~finite).sum())
            logits, labels = logits[:, kept], labels[kept]
            times = None if times is None else times[kept]
        if times is None or not len(labels):
            self._add_part(logits, labels)
            return
        days = torch.div(times, _DAY_S, rounding_mode="floor")
        first, last = days.min().item(), days.max().item()
        for day in [first] if first == last else sorted(days.unique().tolist()):
            of_day = slice(None) if first == last else days == day
            self._turn_to(int(day))
            self._last_time = float(times[of_day][-1])
            self._add_part(logits[:, of_day], labels[of_day])

    def _add_part(self, logits: Float[Tensor, "models batch"], labels: Float[Tensor, " batch"]) -> None:
        self._today.add(logits, labels)
        count = min(len(labels), self._window)
        places = torch.arange(self.num_events + len(labels) - count, self.num_events + len(labels)) % self._window
        self._recent[:-1, places], self._recent[-1, places] = logits[:, -count:], labels[-count:]
        self.num_events += len(labels)
        if self.num_events >= self._next_point:
            self._add_point()

    def _add_point(self) -> None:
        self.points.append({"events": self.num_events, "time_s": self._last_time, "values": self.window()})
        if len(self.points) >= _MOST_POINTS:
            self.points, self._every = self.points[1::2], 2 * self._every
        self._next_point = self.num_events + self._every

    def _turn_to(self, day: int) -> None:
        """Close the day before; events that come late count for the day that is open."""
        if self._day is not None and day <= self._day:
            return
        if self._day is not None and self._today.count:
            self.days.append(self._open_day())
            self._total.merge(self._today)
            self._today = _Tally(len(self._names), self._num_bins)
        self._day = day

    def _open_day(self) -> dict[str, Any]:
        assert self._day is not None
        date = (datetime(1970, 1, 1, tzinfo=UTC) + timedelta(days=self._day)).date().isoformat()
        return {"day": date, "events": self._today.count, "values": self._today.values(self._names)}

    def values(self) -> Values:
        """The metrics of each model over all events, with `auc_loss_error`, the most that AucLoss can be off."""
        if not self._names:
            return {}
        tally = _Tally(len(self._names), self._num_bins)
        tally.merge(self._total)
        tally.merge(self._today)
        return tally.values(self._names)

    def window(self) -> Values:
        """The metrics of each model over the last events, exact."""
        if not self._names:
            return {}
        recent = self._recent[:, : min(self.num_events, self._window)]
        labels = recent[-1]
        return {name: _exact(recent[index], labels) for index, name in enumerate(self._names)}

    def by_day(self) -> list[dict[str, Any]]:
        """The metrics of each day, in UTC; the last may not be over."""
        is_open = self._day is not None and self._names and self._today.count
        return [*self.days, *([self._open_day()] if is_open else [])]

    def draw(self, path: str | os.PathLike[str]) -> None:
        """Draw the curves of the sliding window, and write them as a picture.

        Raises:
            RunError: there is no point yet, or matplotlib is not installed.
        """
        if not self.points:
            raise RunError(f"there were {self.num_events} events, and the first point is at {self._next_point}")
        try:
            from matplotlib.figure import Figure
        except ModuleNotFoundError:
            raise RunError("drawing needs matplotlib, which is not installed; pip install 'matta[study]'") from None
        figure = Figure(figsize=(8, 8), layout="constrained")
        panels = figure.subplots(len(METRICS), 1, sharex=True)
        across = [each["events"] for each in self.points]
        for panel, (metric, title) in zip(panels, METRICS.items(), strict=True):
            for name in self._names:
                panel.plot(across, [each["values"][name][metric] for each in self.points], label=name)
            panel.set_ylabel(title)
            panel.grid(alpha=0.3)
        panels[0].legend()
        panels[0].set_title(f"Before learning, over the last {self._window:,} events")
        panels[-1].set_xlabel("events")
        figure.savefig(path)

    def state_dict(self) -> dict[str, Any]:
        """What has been seen."""
        state = {name: getattr(self, f"_{name}") for name in ("names", "day", "last_time", "every", "next_point")}
        state |= {"num_events": self.num_events, "num_nonfinite": self.num_nonfinite}
        state |= {"points": self.points, "days": self.days}
        state["shape"] = [self._window, self._num_bins, list(self._watch)]
        if self._names:
            state |= {"total": self._total.state(), "today": self._today.state(), "recent": self._recent}
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state.

        Raises:
            RunError: it is that of another validation.
        """
        shape = [self._window, self._num_bins, list(self._watch)]
        if state["shape"] != shape:
            raise RunError(
                f"the run was begun with window, num_bins and watch {state['shape']}, and now they are {shape}; "
                f"expected the same"
            )
        if state["names"]:
            self._begin(state["names"])
            self._total.load(state["total"])
            self._today.load(state["today"])
            self._recent = state["recent"].clone()
        for name in ("day", "last_time", "every", "next_point"):
            setattr(self, f"_{name}", state[name])
        self.num_events, self.num_nonfinite = state["num_events"], state["num_nonfinite"]
        self.points, self.days = list(state["points"]), list(state["days"])


def _one_logit(logits: Tensor, labels: Tensor, name: str) -> Tensor:
    if logits.numel() != labels.numel():
        raise LabelError(
            f"the logits of {name} have shape {tuple(logits.shape)} for {labels.numel()} labels; expected one logit "
            f"to a label"
        )
    return logits.reshape(-1).double().cpu()


@final
class _Tally:
    """Sums over events: histograms of the logits of positives and negatives, and what the means need."""

    def __init__(self, num_models: int, num_bins: int) -> None:
        self.counts = torch.zeros(2, num_models, num_bins, dtype=torch.float64)
        self.sums = torch.zeros(2, num_models, dtype=torch.float64)
        self.labels, self.count = 0.0, 0
        self._offsets = torch.arange(num_models).unsqueeze(-1) * num_bins

    def add(self, logits: Float[Tensor, "models batch"], labels: Float[Tensor, " batch"]) -> None:
        num_bins = self.counts.shape[-1]
        scaled = (logits + _LIMIT) * (num_bins / (2 * _LIMIT))
        bins = (scaled.clamp_(0, num_bins - 1).long() + self._offsets).flatten()
        for counts, weights in zip(self.counts, (labels, 1 - labels), strict=True):
            counts.view(-1).index_add_(0, bins, weights.expand_as(logits).flatten())
        losses = nn.functional.softplus(logits).sum(1) - logits @ labels
        self.sums += torch.stack([losses, torch.sigmoid(logits).sum(1)])
        self.labels += float(labels.sum())
        self.count += len(labels)

    def merge(self, other: _Tally) -> None:
        self.counts += other.counts
        self.sums += other.sums
        self.labels += other.labels
        self.count += other.count

    def values(self, names: Sequence[str]) -> Values:
        found = {}
        for index, name in enumerate(names):
            loss, predicted = self.sums[:, index].tolist()
            auc_loss, error = _auc_loss(self.counts[0, index], self.counts[1, index])
            means = _means(loss, predicted, self.labels, self.count)
            found[name] = {"auc_loss": auc_loss, "auc_loss_error": error, **means}
        return found

    def state(self) -> dict[str, Any]:
        return {"counts": self.counts, "sums": self.sums, "labels": self.labels, "count": self.count}

    def load(self, state: dict[str, Any]) -> None:
        self.counts.copy_(state["counts"])
        self.sums.copy_(state["sums"])
        self.labels, self.count = state["labels"], state["count"]


def _auc_loss(positives: Float[Tensor, " bins"], negatives: Float[Tensor, " bins"]) -> tuple[float, float]:
    """AucLoss with pairs of one bin counted half, and by how much it can be off."""
    pairs = float(positives.sum() * negatives.sum())
    if not pairs:
        return float("nan"), float("nan")
    shared = float(positives @ negatives) / 2
    below = negatives.cumsum(0) - negatives
    return 1 - (float(positives @ below) + shared) / pairs, shared / pairs


def _exact(logits: Float[Tensor, " batch"], labels: Float[Tensor, " batch"]) -> dict[str, float]:
    distinct, where = logits.unique(return_inverse=True)
    positives, negatives = (
        torch.zeros_like(distinct).index_add_(0, where, weights) for weights in (labels, 1 - labels)
    )
    loss = float((nn.functional.softplus(logits) - labels * logits).sum())
    means = _means(loss, float(torch.sigmoid(logits).sum()), float(labels.sum()), len(labels))
    return {"auc_loss": _auc_loss(positives, negatives)[0], **means}


def _means(loss: float, predicted: float, labels: float, count: int) -> dict[str, float]:
    nan = float("nan")
    return {"log_loss": loss / count if count else nan, "calibration": predicted / labels if labels else nan}
