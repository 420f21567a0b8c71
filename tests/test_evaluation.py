"""`matta.Evaluation`: the values of every model, against torchmetrics and losses worked out by hand."""

from __future__ import annotations

import pytest
import torch
import torchmetrics
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import TensorDataset
from torchmetrics.classification import BinaryAUROC, MulticlassAccuracy

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
    with pytest.raises(MattaError, match="received int as module; expected what matta.nest gives, or a plain module"):
        matta.Evaluation(data=data(), objective=matta.objectives.Binary())(5)  # type: ignore[arg-type]
