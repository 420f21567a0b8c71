"""`matta.Evaluation`: the values of every model, against torchmetrics and losses worked out by hand."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torchmetrics
from sklearn.metrics import average_precision_score, roc_auc_score
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import TensorDataset
from torchmetrics import MeanSquaredError
from torchmetrics.classification import (
    BinaryAccuracy,
    BinaryAUROC,
    BinaryAveragePrecision,
    MulticlassAccuracy,
    MulticlassAUROC,
)

import matta
from matta.errors import MattaError, RunError

NAN = float("nan")


def tower(width: int, outputs: int = 1) -> nn.Sequential:
    return nn.Sequential(nn.Linear(5, width), nn.ReLU(), nn.Dropout(0.5), nn.Linear(width, outputs))


def data(outputs: int = 1, sizes: tuple[int, ...] = (8, 8, 3)) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    labels = [torch.randint(max(outputs, 2), (size,), generator=generator) for size in sizes]
    inputs = [torch.randn(size, 5, generator=generator) for size in sizes]
    return [(x, y if outputs > 1 else y.float()) for x, y in zip(inputs, labels, strict=True)]


def nested(outputs: int = 1) -> matta.Nested:
    torch.manual_seed(0)
    return matta.nest([tower(3, outputs), tower(4, outputs)], tower(8, outputs))


def test_losses_and_metrics_of_every_model() -> None:
    pair = nested()
    judge = matta.Evaluation(data=data(), objective=matta.objectives.Binary(), metrics={"auroc": BinaryAUROC()},
                             models={"mixed": matta.wide(pair)})  # fmt: skip
    values = judge(pair)
    x, y = (torch.cat(each) for each in zip(*data(), strict=True))
    assert pair.training
    modules = {"student": matta.extract(pair), "student_1": pair.students[1], "ta": pair.ta, "mixed": pair.ta}
    assert values.keys() == {f"{model}_{name}" for model in modules for name in ("loss", "auroc")}
    for name, module in modules.items():
        logits = module.eval()(x).squeeze(-1).detach()
        loss = functional.binary_cross_entropy_with_logits(logits, y)
        assert values[f"{name}_loss"] == pytest.approx(loss.item(), rel=1e-6)
        assert values[f"{name}_auroc"] == pytest.approx(BinaryAUROC()(logits, y.long()).item())
    assert judge(pair) == values
    alone = judge(matta.extract(pair))
    assert alone == {"loss": pytest.approx(values["student_loss"]), "auroc": pytest.approx(values["student_auroc"])}


def test_classes() -> None:
    pair = nested(outputs=4)
    judge = matta.Evaluation(data=data(4), metrics={"accuracy": MulticlassAccuracy(4, average="micro")})
    x, y = (torch.cat(each) for each in zip(*data(4), strict=True))
    right = pair.eval().ta(x).argmax(-1) == y
    assert judge(pair)["ta_accuracy"] == pytest.approx(right.float().mean().item())


class Whole:
    """A metric of all rows at once."""

    def __init__(self, value: Callable[[Tensor, Tensor], Any]) -> None:
        self.value, self.rows = value, []

    def update(self, logits: Tensor, labels: Tensor) -> None:
        self.rows.append((logits, labels))

    def compute(self) -> Any:
        return self.value(*(torch.cat(each) for each in zip(*self.rows, strict=True)))

    def reset(self) -> None:
        self.rows = []


def given(logits: Tensor) -> nn.Module:
    """A module whose logits are its inputs."""
    layer = nn.Linear(logits.shape[-1], logits.shape[-1], bias=False)
    nn.init.eye_(layer.weight)
    return layer


@pytest.mark.parametrize("size", [64, 3, 1])
def test_metrics_are_those_of_all_rows_at_once_whatever_the_batches(size: int) -> None:
    """Torchmetrics would take a small batch whose logits lie between 0 and 1 for probabilities."""
    logits, uniform = torch.randn(64, 1, generator=torch.Generator().manual_seed(0)), torch.linspace(0, 1, 64)
    labels = (uniform.roll(7) < logits[:, 0].sigmoid()).float()  # floats, as Binary takes them
    batches = [(logits[i : i + size], labels[i : i + size]) for i in range(0, 64, size)]
    metrics = {"auc": BinaryAUROC(), "accuracy": BinaryAccuracy(), "precision": BinaryAveragePrecision()}
    found = matta.Evaluation(data=batches, objective=matta.objectives.Binary(), metrics=metrics)(given(logits))
    assert found["auc"] == pytest.approx(roc_auc_score(labels, logits))
    assert found["accuracy"] == pytest.approx(((logits[:, 0] > 0) == labels).float().mean().item())
    assert found["precision"] == pytest.approx(average_precision_score(labels, logits))


def test_metrics_of_classes_are_those_of_all_rows_at_once() -> None:
    logits = torch.randn(40, 3, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(40) % 3
    metrics = {"auc": MulticlassAUROC(3)}
    found = matta.Evaluation(data=list(zip(logits.split(1), labels.split(1), strict=True)), metrics=metrics)
    expected = roc_auc_score(labels, logits.softmax(-1), multi_class="ovr")
    assert found(given(logits))["auc"] == pytest.approx(expected)


def test_logits_that_a_sigmoid_in_float32_makes_alike_are_told_apart() -> None:
    logits, labels = torch.tensor([[20.0], [30.0], [25.0], [40.0]]), torch.tensor([0, 1, 0, 1])
    assert matta.Evaluation(data=[(logits, labels)], metrics={"auc": BinaryAUROC()})(given(logits))["auc"] == 1.0


def test_a_module_that_seems_to_return_probabilities_is_told_of() -> None:
    logits = torch.randn(128, 1, generator=torch.Generator().manual_seed(0))
    labels, metrics = (logits[:, 0] > 0).long(), {"accuracy": BinaryAccuracy()}
    with pytest.warns(UserWarning, match=r"all 128 outputs that the metric 'accuracy' was given lie between 0 and 1"):
        matta.Evaluation(data=[(logits.sigmoid(), labels)], metrics=metrics)(given(logits))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert matta.Evaluation(data=[(logits, labels)], metrics=metrics)(given(logits))["accuracy"] == 1


def test_metrics_do_not_see_labels_that_are_ignored() -> None:
    logits, labels = torch.tensor([[-2.0], [3.0], [1.0], [0.5]]), torch.tensor([0.0, -100, 1, 0])
    batches = [(logits, labels), (logits[:1], labels[1:2])]  # of the second batch nothing is left
    for metric in (BinaryAUROC(), Whole(lambda z, y: roc_auc_score(y, z))):
        evaluation = matta.Evaluation(data=batches, objective=matta.objectives.Binary(), metrics={"auc": metric})
        assert evaluation(given(logits))["auc"] == 1.0
    values = matta.objectives.SquaredError(ignore_index=NAN)
    data_of_values = [(logits, torch.tensor([[0.0], [NAN], [1.0], [0.5]]))]
    evaluation = matta.Evaluation(data=data_of_values, objective=values, metrics={"error": MeanSquaredError()})
    assert evaluation(given(logits)) == {"loss": pytest.approx(4 / 3), "error": pytest.approx(4 / 3)}
    classes = torch.tensor([[0.0, 1.0], [1.0, 0.0], [0.0, 1.0]]), torch.tensor([1, 1, -100])
    accuracy = {"accuracy": MulticlassAccuracy(2, average="micro")}
    evaluation = matta.Evaluation(data=[classes], objective=matta.objectives.Classification(), metrics=accuracy)
    assert evaluation(given(classes[0]))["accuracy"] == 0.5


def test_metrics_of_a_language_model_see_the_next_token() -> None:
    ids = torch.arange(12).view(2, 6) % 5
    follows = nn.Embedding.from_pretrained(9 * torch.eye(5).roll(1, 1))  # 0 is followed by 1, and so on
    accuracy = {"accuracy": MulticlassAccuracy(5, average="micro")}
    evaluation = matta.Evaluation(data=[(ids, ids)], objective=matta.objectives.CausalLM(), metrics=accuracy)
    assert evaluation(follows)["accuracy"] == 1.0


def test_metrics_of_several_heads_are_by_head() -> None:
    torch.manual_seed(0)
    objective = matta.objectives.Heads(
        {"click": (matta.objectives.Binary(), 1.0), "minutes": (matta.objectives.Huber(ignore_index=NAN), 0.5)}
    )
    x, module = torch.randn(9, 5), Watched(3)
    labels = {"click": torch.arange(9) % 2, "minutes": torch.randn(9).where(torch.arange(9) != 4, NAN)}
    batches = [({"x": x[part]}, {k: v[part] for k, v in labels.items()}) for part in (slice(6), slice(6, None))]
    metrics = {"click": {"auc": BinaryAUROC()}, "minutes": {"error": MeanSquaredError()}}
    found = matta.Evaluation(data=batches, objective=objective, metrics=metrics)(module)
    out, kept = module(x), torch.arange(9) != 4
    assert found["click_auc"] == pytest.approx(roc_auc_score(labels["click"], out["click"].detach()))
    error = functional.mse_loss(out["minutes"].squeeze(1)[kept], labels["minutes"][kept])
    assert found["minutes_error"] == pytest.approx(error.item())
    told = r"as metrics; expected them by head and name, such as \{'click': \{'auc': AUROC"
    for wrong in ({"auc": BinaryAUROC()}, {"clicks": {"auc": BinaryAUROC()}}):
        with pytest.raises(RunError, match=told):
            matta.Evaluation(data=batches, objective=objective, metrics=wrong)


@pytest.mark.parametrize(
    ("label", "told"),
    [(0.3, "and the labels are probabilities"), (-100.0, "and a label is -100; expected such a metric")],
)
def test_metrics_of_classes_refuse_labels_that_they_would_take_for_0(label: float, told: str) -> None:
    data = [(torch.tensor([[-1.0], [1.0], [2.0]]), torch.tensor([0, 1, label]))]
    with pytest.raises(RunError, match=f"'auc' of torchmetrics takes classes, {told}"):
        matta.Evaluation(data=data, metrics={"auc": BinaryAUROC()})(given(torch.zeros(1, 1)))
    if label < 0:
        masked = {"auc": BinaryAUROC(ignore_index=-100)}
        assert matta.Evaluation(data=data, metrics=masked)(given(torch.zeros(1, 1)))["auc"] == 1.0


def test_a_metric_of_transcripts_gets_frames_and_symbols() -> None:
    frames, symbols = torch.randn(2, 5, 4), torch.tensor([[1, 2, -100], [3, 1, 2]])
    seen = Whole(lambda z, y: float(torch.equal(z, frames) and torch.equal(y, symbols)))
    evaluation = matta.Evaluation(data=[(frames, symbols)], objective=matta.objectives.CTC(), metrics={"same": seen})
    assert evaluation(given(frames))["same"] == 1.0


@pytest.mark.parametrize("soft", [True, False])
@pytest.mark.parametrize("objective", [matta.objectives.Binary(), matta.objectives.Classification()])
def test_labels_that_are_ignored_have_no_weight(objective: matta.objectives.Objective, soft: bool) -> None:
    outputs = 1 if isinstance(objective, matta.objectives.Binary) else 4
    pair = nested(outputs)
    (x, y), (other, _), (last, z) = data(outputs)
    if soft:
        y, z = (each if outputs == 1 else functional.one_hot(each, 4).float() for each in (y, z))
    y[3:], ignored = -100, torch.full_like(y, -100)
    judged = matta.Evaluation(data=[(x, y), (other, ignored), (last, z)], objective=objective)(pair)
    kept = torch.cat([x[:3], last]), torch.cat([y[:3], z])
    assert judged == pytest.approx(matta.Evaluation(data=[kept], objective=objective)(pair), rel=1e-6)
    with pytest.raises(RunError, match="all labels of the evaluation data are ignored"):
        matta.Evaluation(data=[(other, ignored)], objective=objective)(pair)


class Watched(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.body, self.click, self.minutes = nn.Linear(5, width), nn.Linear(width, 1), nn.Linear(width, 1)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        hidden = self.body(x).relu()
        return {"click": self.click(hidden), "minutes": self.minutes(hidden)}


@pytest.mark.parametrize("turns", [None, matta.Turns(alone_steps=2)])
def test_a_run_logs_the_losses_that_an_evaluation_gives(turns: matta.Turns | None) -> None:
    """Also of heads with few labels, or none in a batch, and with weights that add up to little."""
    torch.manual_seed(0)
    heads = {"click": (matta.objectives.Binary(), 1.0), "minutes": (matta.objectives.Huber(ignore_index=NAN), 0.5)}
    objective = matta.objectives.Heads(heads, weights="importance")
    pair = matta.nest(Watched(3), Watched(6))
    batches = []
    for x, click in data(sizes=(8, 2, 8, 3)):
        minutes = torch.randn(len(x)).where(torch.arange(len(x)) < len(x) - 3, NAN)  # two batches have none
        labels = {"click": click, "minutes": minutes}
        batches.append({"x": x, "importance": torch.rand(len(x)) / 100, "labels": labels})
    cotrain = matta.CoTraining(pair, objective, turns=turns)
    optimizer = torch.optim.SGD(pair.parameters(), lr=0.0)
    logged = matta.fit(cotrain, batches, optimizer, accumulate=2, progress=False).losses
    expected = matta.Evaluation(data=batches, objective=objective)(pair)
    assert logged["student"] == pytest.approx(expected["student_loss"], rel=1e-5)
    if turns is None:
        assert logged["ta"] == pytest.approx(expected["ta_loss"], rel=1e-5)
    else:
        assert logged.keys() == {"student"}


def test_texts_of_different_lengths_count_by_their_tokens() -> None:
    torch.manual_seed(0)
    pair = matta.nest(*(nn.Sequential(nn.Embedding(7, width), nn.Linear(width, 7)) for width in (3, 4)))
    texts = [torch.randint(7, (1, length)) for length in (3, 9)]
    whole = matta.Evaluation(data=[(each, each) for each in texts], objective=matta.objectives.CausalLM())(pair)
    losses = [functional.cross_entropy(pair.ta(each)[0, :-1], each[0, 1:], reduction="sum") for each in texts]
    assert whole["ta_loss"] == pytest.approx(torch.stack(losses).sum().item() / (2 + 8), rel=1e-6)


def test_what_cannot_be_evaluated_is_refused() -> None:
    with pytest.raises(RunError, match="neither an objective nor metrics; expected at least one"):
        matta.Evaluation(data=data())
    with pytest.raises(RunError, match="type list_iterator, which can be passed over only once; expected a DataLoader"):
        matta.Evaluation(data=iter(data()), objective=matta.objectives.Binary())
    with pytest.raises(RunError, match="the evaluation data gave no batch"):
        matta.Evaluation(data=[], objective=matta.objectives.Binary())(nested())
    objective = matta.objectives.Binary()
    with pytest.raises(RunError, match="type TensorDataset; expected batches: a DataLoader of it"):
        matta.Evaluation(data=TensorDataset(torch.ones(3)), objective=objective)
    with pytest.raises(MattaError, match="received the class Binary as objective"):
        matta.Evaluation(data=data(), objective=matta.objectives.Binary)  # type: ignore[arg-type]
    for metric, told in ((max, "max"), (torchmetrics.AUROC, "AUROC"), (5, "int")):
        with pytest.raises(RunError, match=f"received {told} as the metric 'auc'; expected an object with update"):
            matta.Evaluation(data=data(), metrics={"auc": metric})  # type: ignore[dict-item]
    with pytest.raises(RunError, match=r"received \[\] as metrics; expected them by name"):
        matta.Evaluation(data=data(), objective=objective, metrics=[])  # type: ignore[arg-type]
    with pytest.raises(RunError, match=r"the metric 'all' computes tensor\(.* expected one number"):
        matta.Evaluation(data=data(), metrics={"all": torchmetrics.ConfusionMatrix(task="binary")})(nested())
    with pytest.raises(RunError, match=r"the metric 'auc' fails on logits of shape .* and labels of shape .*preds"):
        matta.Evaluation(data=data(), metrics={"auc": torchmetrics.AUROC(task="multiclass", num_classes=3)})(nested())
    with pytest.raises(RunError, match="received a metric named 'loss', which the objective gives; expected another"):
        matta.Evaluation(data=data(), objective=objective, metrics={"loss": BinaryAUROC()})
    for name in ("ta", "student", "student_1"):
        with pytest.raises(RunError, match=f"received a sub-model named '{name}' in models=, which is a name of the"):
            matta.Evaluation(data=data(), objective=objective, models={name: matta.SubModel()})
        with pytest.raises(RunError, match=f"received a sub-model named '{name}' in watch=, which is a name of the"):
            matta.ProgressiveValidation(watch={name: matta.SubModel()})
    with pytest.raises(MattaError, match="received int as module; expected what matta.nest gives, or a plain module"):
        matta.Evaluation(data=data(), objective=matta.objectives.Binary())(5)  # type: ignore[arg-type]
