from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchmetrics.functional.classification import binary_auroc

import matta
import matta.training.progressive_validation
from matta.errors import LabelError, RunError
from matta.streams import EventBatch

DAY_S = 86400.0


def tower(width: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, width), nn.ReLU(), nn.Linear(width, 1))


def made_batches(count: int, size: int = 32) -> list[EventBatch]:
    torch.manual_seed(1)
    batches = []
    for index in range(count):
        x = torch.randn(size, 3)
        batch = EventBatch(input=x, labels=(x.sum(1) + torch.randn(size) > 1).float())
        batch.times = 1.7e9 + DAY_S / 10 * (index + torch.arange(size) / size).double()
        batches.append(batch)
    return batches


class Seen:
    """What the models say before each step, the plain way."""

    def __init__(self, spec: matta.SubModel) -> None:
        self.spec, self.logits, self.labels = spec, [], []  # type: ignore[var-annotated]

    def before_step(self, cotrain: matta.CoTraining, batch: Any, out: Any) -> None:
        nested = cotrain.nested
        models = (nested.student, nested.ta, matta.live(nested, self.spec))
        with torch.no_grad():
            self.logits.append(torch.stack([model(batch["input"]).squeeze(-1) for model in models]))
        self.labels.append(batch["labels"])

    def after_step(self, cotrain: matta.CoTraining) -> None: ...

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


def fitted(batches: list[EventBatch], **settings: Any) -> tuple[matta.ProgressiveValidation, Tensor, Tensor]:
    torch.manual_seed(0)
    nested = matta.nest(tower(4), tower(8))
    spec = matta.wide(nested)
    validation = matta.ProgressiveValidation(watch={"wide": spec}, **settings)
    seen = Seen(spec)
    optimizer = torch.optim.Adagrad(nested.parameters(), lr=0.1)
    cotrain = matta.CoTraining(nested, matta.objectives.Binary())
    matta.fit(cotrain, batches, optimizer, observers=[seen, validation], progress=False)
    return validation, torch.cat(seen.logits, 1), torch.cat(seen.labels)


def check(found: dict[str, float], logits: Tensor, labels: Tensor, error: float) -> None:
    exact = 1 - float(binary_auroc(torch.sigmoid(logits.double()), labels.long()))
    assert abs(found["auc_loss"] - exact) <= error
    loss = nn.functional.binary_cross_entropy_with_logits(logits.double(), labels.double())
    assert found["log_loss"] == pytest.approx(float(loss), rel=1e-6)
    ratio = torch.sigmoid(logits.double()).mean() / labels.double().mean()
    assert found["calibration"] == pytest.approx(float(ratio), rel=1e-6)


def test_all_models_are_judged_before_they_learn() -> None:
    validation, logits, labels = fitted(made_batches(30), window=500)
    assert validation.names == ("student", "ta", "wide")
    assert validation.num_events == 30 * 32
    for index, name in enumerate(validation.names):
        whole = validation.values()[name]
        assert whole["auc_loss_error"] < 1e-3
        check(whole, logits[index], labels, whole["auc_loss_error"] + 1e-6)
        check(validation.window()[name], logits[index, -500:], labels[-500:], 1e-6)
    assert validation.values()["wide"] == validation.values()["ta"]


def test_days_add_up_to_the_whole() -> None:
    batches = made_batches(35)
    validation, logits, labels = fitted(batches)
    times = torch.cat([batch.times for batch in batches if batch.times is not None])
    days = torch.div(times, DAY_S, rounding_mode="floor")
    found = validation.by_day()
    assert [each["day"] for each in found] == ["2023-11-14", "2023-11-15", "2023-11-16", "2023-11-17", "2023-11-18"]
    assert sum(each["events"] for each in found) == len(labels)
    for each, day in zip(found, days.unique(), strict=True):
        of_day = each["values"]["student"]
        check(of_day, logits[0, days == day], labels[days == day], of_day["auc_loss_error"] + 1e-6)


@pytest.mark.parametrize("num_bins", [2, 16, 256, 1 << 14])
@pytest.mark.parametrize("scale", [0.01, 1.0, 30.0])
def test_the_error_of_the_histogram_is_bounded(num_bins: int, scale: float) -> None:
    torch.manual_seed(0)
    labels = (torch.rand(2000) < 0.2).float()
    logits = scale * (torch.randn(2000) + labels)
    validation = matta.ProgressiveValidation(num_bins=num_bins)
    feed(validation, logits, labels)
    found = validation.values()["student"]
    exact = 1 - float(binary_auroc(logits.double(), labels.long()))
    assert abs(found["auc_loss"] - exact) <= found["auc_loss_error"] + 1e-6
    if num_bins == 1 << 14 and scale == 1:
        assert found["auc_loss_error"] < 5e-4 and abs(found["auc_loss"] - exact) < 2e-5


def feed(validation: matta.ProgressiveValidation, logits: Tensor, labels: Tensor) -> None:
    """One model alone."""
    out = SimpleNamespace(all_student_logits=(logits,), ta_logits=logits)
    cotrain = SimpleNamespace(nested=None, objective=matta.objectives.Binary())
    validation.before_step(cotrain, (logits, labels), out)  # type: ignore[arg-type]


def test_ignored_labels_and_logits_that_are_not_finite_are_left_out() -> None:
    validation = matta.ProgressiveValidation(window=3)
    nan = float("nan")
    feed(validation, torch.tensor([1.0, 2.0, nan, -1.0, 5.0]), torch.tensor([1.0, 0.0, 1.0, 0.0, -100.0]))
    assert (validation.num_events, validation.num_nonfinite) == (3, 1)
    assert validation.values()["ta"]["auc_loss"] == validation.window()["ta"]["auc_loss"] == 0.5


def test_a_class_alone_has_no_auc() -> None:
    validation = matta.ProgressiveValidation()
    assert validation.values() == validation.window() == {}
    feed(validation, torch.ones(4), torch.zeros(4))
    values = validation.values()["student"]
    assert values["auc_loss"] != values["auc_loss"] and values["log_loss"] > 1


@pytest.mark.parametrize("num_batches", [1, 20, 59])
def test_a_state_goes_on(num_batches: int) -> None:
    torch.manual_seed(0)
    logits, labels = torch.randn(60, 7), torch.randint(2, (60, 7)).float()
    whole, begun, resumed = (matta.ProgressiveValidation(window=50, every=20) for _ in range(3))
    for index in range(60):
        feed(whole, logits[index], labels[index])
        feed(begun if index < num_batches else resumed, logits[index], labels[index])
        if index + 1 == num_batches:
            resumed.load_state_dict(begun.state_dict())
    assert resumed.values() == whole.values() and resumed.window() == whole.window()
    assert resumed.points == whole.points and len(whole.points) == 20
    with pytest.raises(RunError, match="expected the same"):
        matta.ProgressiveValidation(window=51).load_state_dict(whole.state_dict())


def test_points_stay_few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matta.training.progressive_validation, "_MOST_POINTS", 20)
    validation = matta.ProgressiveValidation(window=2, num_bins=2)
    for _ in range(60):
        feed(validation, torch.tensor([0.0, 1.0]), torch.tensor([0.0, 1.0]))
    events = [each["events"] for each in validation.points]
    assert 10 <= len(events) < 20
    assert events == sorted(set(events)) and events[-1] >= 112
    json.dumps(validation.points)


def test_the_curves_are_drawn(tmp_path: Path) -> None:
    validation, _, _ = fitted(made_batches(20), window=100)
    validation.draw(tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(RunError, match="the first point is at"):
        matta.ProgressiveValidation().draw(tmp_path / "none.png")


def test_what_cannot_be_judged_is_refused() -> None:
    with pytest.raises(LabelError, match="expected one logit to a label"):
        feed(matta.ProgressiveValidation(), torch.zeros(4, 3), torch.zeros(4))
    with pytest.raises(LabelError, match="has no labels"):
        feed(matta.ProgressiveValidation(), torch.zeros(4), None)  # type: ignore[arg-type]
    with pytest.raises(RunError, match="expected at least 1, 1 and 2"):
        matta.ProgressiveValidation(window=0)
