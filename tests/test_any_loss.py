"""The objectives beside classification against the formulas of torch, with masks, weights, heads and Teachers."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import matta
from matta.errors import LabelError, MattaError, RunError
from matta.objectives import (
    CTC,
    Binary,
    CausalLM,
    Classification,
    Custom,
    Heads,
    Huber,
    Listwise,
    Losses,
    MultiLabel,
    Objective,
    Pairwise,
    Quantiles,
    SquaredError,
    Weighted,
    top_k,
)

BATCH, ITEMS = 4, 5
LEVELS = [0.1, 0.5, 0.9]
NAN = float("nan")
Rows = Callable[[Tensor, Tensor], Tensor]  # the loss of each example, from its logits and labels


def _randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def _all(losses: Losses) -> tuple[Tensor, ...]:
    return *losses.students, losses.ta, *losses.distill


def _pinball(z: Tensor, y: Tensor) -> Tensor:
    y = y if y.ndim == z.ndim else y.unsqueeze(-1)
    q = torch.tensor(LEVELS, dtype=z.dtype)
    return torch.where(y > z, q * (y - z), (1 - q) * (z - y)).mean(-1)


def _listnet(z: Tensor, y: Tensor) -> Tensor:
    return functional.cross_entropy(z, y / y.sum(-1, keepdim=True), reduction="none")


def _ranknet(z: Tensor, y: Tensor) -> Tensor:
    rows = []
    for scores, gains in zip(z, y, strict=True):
        pairs = [(i, j) for i in range(ITEMS) for j in range(ITEMS) if gains[i] > gains[j]]
        rows.append(torch.stack([functional.softplus(scores[j] - scores[i]) for i, j in pairs]).mean())
    return torch.stack(rows)


def _rows_of(loss: Any, **options: Any) -> Rows:
    return lambda z, y: loss(z, y, reduction="none", **options)


CASES: dict[str, tuple[Callable[..., Objective], tuple[int, ...], Tensor, Rows, Callable[[Tensor], Tensor]]] = {
    "squared": (SquaredError, (BATCH,), _randn(BATCH, seed=7), _rows_of(functional.mse_loss), lambda z: z),
    "huber": (
        lambda **o: Huber(0.3, **o),
        (BATCH,),
        _randn(BATCH, seed=7),
        _rows_of(functional.huber_loss, delta=0.3),
        lambda z: z,
    ),
    "quantiles": (lambda **o: Quantiles(LEVELS, **o), (BATCH, 3), _randn(BATCH, seed=7), _pinball, lambda z: z),
    "multi-label": (
        MultiLabel,
        (BATCH, ITEMS),
        _randn(BATCH, ITEMS, seed=7).sigmoid().round(),
        lambda z, y: functional.binary_cross_entropy_with_logits(z, y, reduction="none").mean(-1),
        Tensor.sigmoid,
    ),
    "listwise": (Listwise, (BATCH, ITEMS), _randn(BATCH, ITEMS, seed=7).abs(), _listnet, lambda z: z.softmax(-1)),
}
BINARY = (
    Binary,
    (BATCH,),
    _randn(BATCH, seed=7).sigmoid(),
    _rows_of(functional.binary_cross_entropy_with_logits),
    Tensor.sigmoid,
)
CLASSES = (
    Classification,
    (BATCH, ITEMS),
    torch.tensor([0, 4, 2, 2]),
    _rows_of(functional.cross_entropy),
    lambda z: z.softmax(-1),
)
ALL = {**CASES, "binary": BINARY, "classes": CLASSES}


@pytest.mark.parametrize("name", CASES)
def test_the_three_losses_are_the_plain_formulas(name: str) -> None:
    make, shape, labels, rows, soft = CASES[name]
    students, ta = [_randn(*shape, seed=1), _randn(*shape, seed=2)], _randn(*shape, seed=3)
    found = make().losses(students, ta, labels)
    torch.testing.assert_close(found.ta, rows(ta, labels).mean())
    for index, student in enumerate(students):
        torch.testing.assert_close(found.students[index], rows(student, labels).mean())
        torch.testing.assert_close(found.distill[index], rows(student, soft(ta)).mean())
        torch.testing.assert_close(make().cross_entropy(student, labels), found.students[index])
        torch.testing.assert_close(make().cross_entropy(student, make().teach(ta, None)), found.distill[index])


@pytest.mark.parametrize("name", [*CASES, "pairwise"])
def test_distillation_moves_the_student_alone(name: str) -> None:
    make, shape, labels = (Pairwise, (BATCH, ITEMS), CASES["listwise"][2]) if name == "pairwise" else CASES[name][:3]
    student, ta = _randn(*shape, seed=1).requires_grad_(), _randn(*shape, seed=2).requires_grad_()
    make().losses([student], ta, labels).distill[0].backward()
    assert ta.grad is None
    assert student.grad is not None
    assert torch.count_nonzero(student.grad) > 0
    same = ta.detach().clone().requires_grad_()
    if name != "quantiles":  # whose loss has a kink there
        gradient = torch.autograd.grad(make().losses([same], ta, labels).distill[0], same)[0]
        assert gradient.abs().max() < 1e-12  # it is least where the Student is the TA


def test_pairs_are_those_of_different_gain() -> None:
    student, ta = _randn(BATCH, ITEMS, seed=1), _randn(BATCH, ITEMS, seed=2)
    gains = torch.randint(3, (BATCH, ITEMS), generator=torch.Generator().manual_seed(0)).double()
    found = Pairwise().losses([student], ta, gains)
    torch.testing.assert_close(found.students[0], _ranknet(student, gains).mean())
    by_hand = []
    for z, t, y in zip(student, ta, gains, strict=True):
        pairs = [(z[i] - z[j], (t[i] - t[j]).sigmoid()) for i in range(ITEMS) for j in range(ITEMS) if y[i] > y[j]]
        ours, theirs = torch.stack([each[0] for each in pairs]), torch.stack([each[1] for each in pairs])
        by_hand.append(functional.binary_cross_entropy_with_logits(ours, theirs))
    torch.testing.assert_close(found.distill[0], torch.stack(by_hand).mean())


@pytest.mark.parametrize("make", [Listwise, Pairwise])
def test_padding_and_lists_without_gain_take_no_part(make: Any) -> None:
    student, ta = _randn(3, ITEMS, seed=1), _randn(3, ITEMS, seed=2)
    gains = torch.tensor([[2.0, 0, 1, 0, 1], [1, 0, 3, -100, -100], [0, 0, 0, -100, -100]], dtype=torch.float64)
    student[1:, 3:], ta[1:, 3:] = float("inf"), -torch.inf
    student.requires_grad_()
    found = make().losses([student], ta, gains)
    whole = make().losses([student[:1]], ta[:1], gains[:1])
    short = make().losses([student[1:2, :3]], ta[1:2, :3], gains[1:2, :3])
    for name in ("students", "distill"):
        torch.testing.assert_close(getattr(found, name)[0], (getattr(whole, name)[0] + getattr(short, name)[0]) / 2)
    torch.testing.assert_close(found.ta, (whole.ta + short.ta) / 2)
    gradient = torch.autograd.grad(found.students[0] + found.distill[0], student)[0]
    assert torch.isfinite(gradient).all()
    assert torch.count_nonzero(gradient[1, 3:]) == torch.count_nonzero(gradient[2]) == 0
    assert make().num_counted(gains) == 2
    taught = make().teach(_randn(3, ITEMS, seed=5).abs(), gains)
    assert torch.equal(taught == -100, torch.tensor([[False] * 5, [False] * 3 + [True] * 2, [True] * 5]))


def test_a_pick_by_its_index_is_a_class_and_padding_a_score_of_minus_infinity() -> None:
    scores = _randn(2, ITEMS)
    scores[1, 3:] = -torch.inf
    gains = torch.tensor([[0.0, 0, 0, 0, 1], [0, 1, 0, -100, -100]])
    found = Classification().losses([scores], scores, torch.tensor([4, 1]))
    expected = Listwise().losses([scores], scores, gains)
    torch.testing.assert_close(_all(found), _all(expected))


@pytest.mark.parametrize("ignored", [NAN, -1.0])
@pytest.mark.parametrize("name", ["squared", "huber", "quantiles"])
def test_values_that_are_missing_are_left_out(name: str, ignored: float) -> None:
    make, shape, labels, rows, soft = CASES[name]
    student, ta, kept = _randn(*shape, seed=1), _randn(*shape, seed=2), torch.tensor([True, False, True, False])
    found = make(ignore_index=ignored).losses([student], ta, labels.masked_fill(~kept, ignored))
    torch.testing.assert_close(found.students[0], rows(student, labels)[kept].mean())
    torch.testing.assert_close(found.distill[0], rows(student, soft(ta))[kept].mean())
    none = make(ignore_index=ignored).losses([student], ta, torch.full_like(labels, ignored))
    assert (none.students[0], none.ta, none.distill[0]) == (0, 0, 0)


def test_a_label_of_several_that_is_not_known_is_left_out_alone() -> None:
    logits, labels = _randn(BATCH, ITEMS), torch.randint(2, (BATCH, ITEMS))
    labels[1, 2] = labels[3] = -100
    kept = labels != -100
    expected = functional.binary_cross_entropy_with_logits(logits[kept], labels[kept].double())
    torch.testing.assert_close(MultiLabel().cross_entropy(logits, labels), expected)


@pytest.mark.parametrize("name", ALL)
def test_weights_weigh_the_mean(name: str) -> None:
    make, shape, labels, rows, soft = ALL[name]
    students, ta = [_randn(*shape, seed=1)], _randn(*shape, seed=3)
    weights = torch.tensor([1.0, 0.0, 0.25, 0.05])
    found = make().losses(students, ta, Weighted(labels, weights))
    shares = weights.double() / weights.sum().double()
    torch.testing.assert_close(found.ta, rows(ta, labels) @ shares)
    torch.testing.assert_close(found.students[0], rows(students[0], labels) @ shares)
    torch.testing.assert_close(found.distill[0], rows(students[0], soft(ta)) @ shares)
    torch.testing.assert_close(make().cross_entropy(ta, Weighted(labels, weights)), found.ta)
    even = make().losses(students, ta, Weighted(labels, torch.ones(BATCH)))
    torch.testing.assert_close(_all(even), _all(make().losses(students, ta, labels)))


@pytest.mark.parametrize("of_tokens", [False, True])
def test_weights_of_tokens_are_shifted_with_them(of_tokens: bool) -> None:
    logits, tokens = _randn(2, 4, ITEMS), torch.tensor([[0, 1, 2, 3], [4, 3, -100, 1]])
    weights = torch.tensor([[9.0, 1, 2, 3], [9.0, 0.5, 1, 0]]) if of_tokens else torch.tensor([2.0, 1.0])
    rows = functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten(), reduction="none")
    of_rows = (weights[:, 1:] if of_tokens else weights.unsqueeze(1).expand(2, 3)).flatten().double()
    of_rows = of_rows * (tokens[:, 1:].flatten() != -100)
    labels = Weighted(tokens, weights)
    torch.testing.assert_close(CausalLM().cross_entropy(logits, labels), (rows * of_rows).sum() / of_rows.sum())
    torch.testing.assert_close(CausalLM().num_counted(labels).double(), of_rows.sum())


def test_weights_with_the_heads_fused_and_with_a_top_k() -> None:
    torch.manual_seed(0)
    nested = matta.nest(nn.Sequential(nn.Linear(3, ITEMS)), nn.Sequential(nn.Linear(3, ITEMS)))
    observed = torch.tensor([0, 4, -100, 2])
    for labels in (observed, top_k(torch.randn(BATCH, ITEMS), 2, observed)):
        grads = []
        for fused in (False, True):
            cotrain = matta.CoTraining(nested, Classification(fused=fused, chunk=3))
            nested.zero_grad()
            loss = cotrain((torch.ones(BATCH, 3), Weighted(labels, torch.tensor([1.0, 0.5, 3, 0.1])))).loss
            loss.backward()
            grads.append([loss.detach(), *(each.grad.clone() for each in nested.parameters())])  # type: ignore[union-attr]
        torch.testing.assert_close(*grads)


# ------------------------------------------------------------------------ in training


def _model(width: int, outputs: int) -> nn.Module:
    return nn.Sequential(nn.Linear(3, width), nn.ReLU(), nn.Linear(width, outputs))


def _nested(outputs: int) -> matta.Nested:
    torch.manual_seed(0)
    return matta.nest(_model(4, outputs), _model(8, outputs))


class TwoHeads(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.body, self.click, self.watch = nn.Linear(3, width), nn.Linear(width, 1), nn.Linear(width, 1)

    def forward(self, *, x: Tensor) -> dict[str, Tensor]:
        hidden = self.body(x).relu()
        return {"click": self.click(hidden), "watch": self.watch(hidden)}


def _heads(**options: Any) -> Heads:
    return Heads({"click": (Binary(), 1.0), "watch": (Huber(ignore_index=NAN), 0.3)}, **options)


def _head_batch(size: int = 6) -> dict[str, Any]:
    labels = {"click": torch.tensor([1.0, 0, -100, 1, 0, 0])[:size], "watch": torch.tensor([NAN, 2, NAN, NAN, 1, 3.0])}
    return {"x": _randn(6, 3, seed=4).float()[:size], "labels": {name: each[:size] for name, each in labels.items()}}


TRAINED: dict[str, tuple[Callable[..., Objective], int, Tensor]] = {
    "squared": (SquaredError, 1, torch.randn(6, generator=torch.Generator().manual_seed(1))),
    "huber": (Huber, 1, torch.randn(6, generator=torch.Generator().manual_seed(1))),
    "quantiles": (lambda **o: Quantiles(LEVELS, **o), 3, torch.randn(6, generator=torch.Generator().manual_seed(1))),
    "multi-label": (MultiLabel, 5, torch.tensor([[1, 0, -100, 1, 0]] * 6)),
    "listwise": (Listwise, 5, torch.tensor([[1, 0, 2, -100, -100], [0, 0, 0, 0, 0], [3, 1, 0, 1, 1]] * 2)),
    "pairwise": (Pairwise, 5, torch.tensor([[1, 0, 2, -100, -100], [0, 0, 0, 0, 0], [3, 1, 0, 1, 1]] * 2)),
    "custom": (
        lambda **o: Custom(lambda z, y: (z.squeeze(1) - y).abs(), lambda z, ta: (z - ta).square().squeeze(1), **o),
        1,
        torch.randn(6, generator=torch.Generator().manual_seed(1)),
    ),
    "classes": (Classification, 5, torch.tensor([0, 1, -100, 3, 4, 0])),
    "binary": (Binary, 1, torch.tensor([0, 1, -100, 1, 0, 0])),
}
WEIGHTS = torch.tensor([0.3, 0.01, 2.0, 0.0, 0.05, 0.2])


def _gradients(cotrain: matta.CoTraining, batches: list[Any]) -> list[Tensor]:
    cotrain.nested.zero_grad()
    num_labels = cotrain.num_labels(batches)
    for batch in batches:
        cotrain(batch, num_labels=num_labels).loss.backward()
    return [each.grad for each in cotrain.nested.parameters()]  # type: ignore[misc]


@pytest.mark.parametrize("weights", [None, "importance"])
@pytest.mark.parametrize("name", TRAINED)
def test_two_batches_of_a_step_are_one(name: str, weights: str | None) -> None:
    make, outputs, labels = TRAINED[name]
    cotrain = matta.CoTraining(_nested(outputs), make(weights=weights))
    batch = {"input": torch.randn(6, 3, generator=torch.Generator().manual_seed(2)), "labels": labels}
    batch |= {"importance": WEIGHTS} if weights else {}
    parts = [{key: value[part] for key, value in batch.items()} for part in (slice(5), slice(5, 6))]
    torch.testing.assert_close(_gradients(cotrain, parts), _gradients(cotrain, [batch]))
    optimizer = torch.optim.SGD(cotrain.nested.parameters(), lr=0.1)
    result = matta.fit(cotrain, [batch] * 2, optimizer, steps=2, progress=False)
    assert all(value == value for value in result.losses.values())
    assert matta.extract(cotrain.nested)(batch["input"]).shape == (6, outputs)


@pytest.mark.parametrize("weights", [None, "importance"])
def test_several_heads_are_the_sum_of_each(weights: str | None) -> None:
    torch.manual_seed(0)
    nested = matta.nest(TwoHeads(4), TwoHeads(8), example=_head_batch())
    batch = {**_head_batch(), **({"importance": WEIGHTS} if weights else {})}
    cotrain = matta.CoTraining(nested, _heads(weights=weights))
    parts = [
        {**{key: value[part] for key, value in batch.items() if key != "labels"}, "labels": labels}
        for part in (slice(5), slice(5, 6))
        for labels in [{key: value[part] for key, value in batch["labels"].items()}]
    ]
    whole = _gradients(cotrain, [batch])
    torch.testing.assert_close(_gradients(cotrain, parts), whole)
    alone = {
        "click": matta.CoTraining(nested, Binary(), logits=lambda out: out["click"]),
        "watch": matta.CoTraining(nested, Huber(ignore_index=NAN), logits="watch"),
    }
    nested.zero_grad()
    for name, weight in (("click", 1.0), ("watch", 0.3)):
        own = batch["labels"][name]
        labels = own if weights is None else Weighted(own, WEIGHTS)
        (weight * alone[name]({"x": batch["x"], "labels": labels}).loss).backward()
    torch.testing.assert_close([each.grad for each in nested.parameters()], whole)
    out = cotrain(batch)
    assert set(out.student_logits) == {"click", "watch"}
    found = matta.Evaluation(data=parts, objective=_heads(weights=weights))(nested)
    expected = matta.Evaluation(data=[batch], objective=_heads(weights=weights))(nested)
    assert found == pytest.approx(expected)
    optimizer = torch.optim.SGD(nested.parameters(), lr=0.1)
    result = matta.fit(cotrain, parts, optimizer, epochs=1, accumulate=2, progress=False)
    assert result.steps == 1


def test_heads_have_a_teacher_and_a_turn_of_the_student_alone() -> None:
    torch.manual_seed(0)
    nested, teacher = matta.nest(TwoHeads(4), TwoHeads(8)), TwoHeads(8)
    batch = _head_batch()
    cotrain = matta.CoTraining(nested, _heads(), teacher=teacher, turns=matta.Turns(alone_steps=1))
    out = cotrain(batch, num_labels=cotrain.num_labels([batch]))
    taught = {name: each.detach() for name, each in teacher(x=batch["x"]).items()}
    labels = _heads().teach(taught, batch["labels"])
    torch.testing.assert_close(out.student_loss, _heads().cross_entropy(nested.student(x=batch["x"]), labels))
    out.loss.backward()


def test_what_a_model_returns_is_read_as_logits_says() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 1)

        def forward(self, x: Tensor) -> Any:
            return SimpleNamespace(prediction_logits=self.layer(x), hidden=x, count=3)

    nested, batch = matta.nest(Named(), Named()), (torch.ones(2, 3), torch.ones(2))
    with pytest.raises(
        LabelError, match=r"without logits; its tensors are: prediction_logits, hidden; .*logits=\.\.\."
    ):
        matta.CoTraining(nested, Binary())(batch)
    with pytest.raises(LabelError, match="without logit; its tensors are: prediction_logits, hidden"):
        matta.CoTraining(nested, Binary(), logits="logit")(batch)
    named = matta.CoTraining(nested, Binary(), logits="prediction_logits")(batch)
    called = matta.CoTraining(nested, Binary(), logits=lambda out: out.prediction_logits)(batch)
    assert named.loss == called.loss
    data = matta.Evaluation(data=[batch], objective=Binary(), logits="prediction_logits")
    assert data(nested)["ta_loss"] == pytest.approx(named.ta_loss.item())


def test_a_time_series_model_of_transformers_trains() -> None:
    import transformers

    def make(width: int) -> nn.Module:
        config = transformers.PatchTSTConfig(
            num_input_channels=2, context_length=8, patch_length=4, patch_stride=4, num_hidden_layers=1, d_model=8,
            num_attention_heads=2, ffn_dim=width, num_targets=3, use_cls_token=True,
        )  # fmt: skip
        return transformers.PatchTSTForClassification(config)

    torch.manual_seed(0)
    nested = matta.nest(make(8), make(16))
    cotrain = matta.CoTraining(nested, Classification(), logits="prediction_logits")
    batch = {"past_values": torch.randn(4, 8, 2), "labels": torch.tensor([0, 1, 2, 0])}
    optimizer = torch.optim.AdamW(nested.parameters())
    assert matta.fit(cotrain, [batch], optimizer, steps=2, progress=False).steps == 2


# ------------------------------------------------------------------------ Teachers


def test_the_labels_of_several_teachers_are_their_mean() -> None:
    teachers = [_model(4, ITEMS), _model(6, ITEMS)]
    cotrain = matta.CoTraining(_nested(ITEMS), Classification(), teacher=teachers, temperature=2.0)
    x, hard = torch.randn(3, 3, generator=torch.Generator().manual_seed(0)), torch.tensor([1, -100, 2])
    out = cotrain((x, hard))
    probs = torch.stack([(each(x) / 2).softmax(-1) for each in teachers]).mean(0).detach()
    kept = [0, 2]
    torch.testing.assert_close(out.ta_loss, functional.cross_entropy(out.ta_logits[kept], probs[kept]))
    values = matta.CoTraining(_nested(1), SquaredError(), teacher=[_model(4, 1), (last := _model(4, 1))])
    taught = torch.stack([each(x) for each in (values.teachers.modules[0], last)]).mean(0).detach()
    out = values((x, torch.zeros(3)))
    torch.testing.assert_close(out.student_loss, functional.mse_loss(out.student_logits, taught))


@pytest.mark.parametrize("name", ["binary", "classes", "causal", "squared", "listwise"])
def test_labels_are_mixed_with_the_teachers(name: str) -> None:
    objectives: dict[str, tuple[Objective, Tensor, tuple[int, ...]]] = {
        "binary": (Binary(), torch.tensor([1, -100, 0]), (3, 1)),
        "classes": (Classification(), torch.tensor([1, -100, 0]), (3, ITEMS)),
        "causal": (CausalLM(), torch.tensor([[1, 2, 3], [1, -100, 0]]), (2, 3, ITEMS)),
        "squared": (SquaredError(), torch.tensor([1.0, 2, 3]), (3, 1)),
        "listwise": (Listwise(), torch.tensor([[0, 60.0, 0, 20, -100], [0] * 4 + [-100]]), (2, ITEMS)),  # seconds, say
    }
    objective, labels, shape = objectives[name]
    logits, teacher = _randn(*shape, seed=1).requires_grad_(), _randn(*shape, seed=2)
    taught = objective.teach(teacher, labels)
    found = objective.cross_entropy(logits, objective.mixed(labels, taught, 0.3))
    apart = 0.3 * objective.cross_entropy(logits, labels) + 0.7 * objective.cross_entropy(logits, taught)
    if name != "squared":  # whose losses differ by a constant
        torch.testing.assert_close(found, apart)
    torch.testing.assert_close(torch.autograd.grad(found, logits), torch.autograd.grad(apart, logits))


def test_a_class_that_the_teacher_rules_out_keeps_the_share_of_the_label() -> None:
    objective, labels = Classification(ignore_index=0), torch.tensor([2, 0])
    taught = objective.teach(torch.tensor([[0.0, 0, -200, 3], [1, 1, 1, 1]]), labels)
    assert taught[0, 2] == objective.ignore_index  # which is a probability too
    expected = 0.5 * functional.one_hot(labels, 4)[0] + 0.5 * taught[0]
    torch.testing.assert_close(objective.mixed(labels, taught, 0.5), torch.stack([expected, torch.zeros(4)]))


def test_weights_of_half_precision_are_added_up_in_float32() -> None:
    labels = Weighted(torch.zeros(4096), torch.full((4096,), 40.0, dtype=torch.float16))
    assert Custom(loss=lambda z, y: z - y, weights="w").num_counted(labels) == 4096 * 40  # float16 ends at 65,504


def test_labels_of_the_batch_and_of_the_teacher_train_together() -> None:
    teacher, x, hard = _model(4, ITEMS), torch.randn(3, 3), torch.tensor([1, 0, 2])
    nested = _nested(ITEMS)
    losses = [
        matta.CoTraining(nested, Classification(), teacher=teacher, labels=share)((x, hard)).ta_loss
        for share in (0.0, 0.25, 1.0)
    ]
    torch.testing.assert_close(losses[1], 0.75 * losses[0] + 0.25 * losses[2])
    torch.testing.assert_close(losses[2], matta.CoTraining(nested, Classification())((x, hard)).ta_loss)


# ------------------------------------------------------------------------ refusals


V = torch.zeros(BATCH)


@pytest.mark.parametrize(
    ("objective", "shape", "labels", "message"),
    [
        (
            SquaredError(),
            (BATCH,),
            torch.zeros(3),
            r"shape \(3,\) and the logits \(4,\); expected one label for each v",
        ),
        (SquaredError(), (BATCH,), torch.full((BATCH,), NAN), "NaN or infinite; .*ignore_index"),
        (MultiLabel(), (2, 3), torch.zeros(3, 2), r"\(3, 2\) and the logits \(2, 3\)"),
        (MultiLabel(), (2, 3), torch.full((2, 3), 2), "between 2 and 2; expected 0 or 1"),
        (Quantiles(LEVELS), (BATCH, 2), V, r"\(4, 2\); expected \(..., 3\), one for each level"),
        (Quantiles(LEVELS), (BATCH, 3), torch.zeros(3), "one label for each row of logits, or for each level"),
        (Listwise(), (BATCH,), V, r"the scores have shape \(4,\); expected \(batch, items\)"),
        (Listwise(), (2, 3), torch.full((2, 3), -1.0), "gains lie between -1 and -1; expected .*padding"),
        (Pairwise(), (2, 3), torch.zeros(2, 2), "one label for each item of a list"),
        (Binary(), (BATCH,), Weighted(V, torch.zeros(3)), r"weights have shape \(3,\), and the labels \(4,\)"),
        (Binary(), (BATCH,), Weighted(V, torch.full((BATCH,), -1.0)), "weights lie between -1 and -1; expected"),
        (Custom(lambda z, y: z.mean()), (BATCH,), Weighted(V, V), r"shape \(\); expected one .*since they have"),
        (Custom(functional.cross_entropy), (2, 3), torch.tensor([0, 2]), r"Custom without distill, which .* expected"),
        (
            Custom(lambda z, y: z, lambda z, ta: z),
            (2, 3),
            torch.zeros(2),
            r"Custom\(loss=...\) returned a tensor of shape \(2, 3\)",
        ),
    ],
)
def test_labels_that_do_not_fit_are_refused(objective: Any, shape: Any, labels: Any, message: str) -> None:
    with pytest.raises(LabelError, match=message):
        objective.losses([torch.zeros(shape)], torch.zeros(shape), labels)


def test_settings_that_make_no_sense_are_refused() -> None:
    for make, message in (
        (lambda: Huber(0.0), "delta=0.0; expected a number over 0"),
        (lambda: Quantiles([0.5, 1.0]), "expected numbers between 0 and 1"),
        (
            lambda: Quantiles(0.5).levels and Quantiles(1.5),
            r"received levels=\[1.5\]; expected numbers between 0 and 1",
        ),
        (lambda: Heads({}), "no heads"),
        (lambda: Heads({"a": Binary()}), r"received Binary\(.* for the head 'a'; expected an objective and its weight"),
        (lambda: Heads({"a": (Binary(), -1.0)}), "weight -1.0 for the head 'a'"),
        (lambda: Heads({"a": (Binary(weights="w"), 1.0)}), r"expected Heads\(..., weights='w'\)"),
        (lambda: _heads().cross_entropy({}, {"click": V}), "the labels are click; expected .*: click, watch"),
    ):
        with pytest.raises(LabelError, match=message):
            make()
    nested = _nested(1)
    for options, message in (
        ({"temperature": 2.0}, "without a Teacher"),
        ({"labels": 0.5}, "without a Teacher"),
        ({"teacher": "large"}, "received str as teacher; expected a module, or a list of modules"),
        ({"teacher": [_model(4, 1), None]}, "received NoneType as teacher; expected a module"),
        ({"objective": Binary(weights=torch.ones(3))}, "received Tensor as weights; expected the name of the field"),
        ({"labels": 1.5, "teacher": _model(4, 1)}, "labels=1.5; expected .*from 0 to 1"),
        ({"temperature": 0.0, "teacher": _model(4, 1)}, "temperature=0.0; expected"),
        ({"temperature": 2.0, "teacher": _model(4, 1), "objective": SquaredError()}, "gives no probabilities"),
    ):
        objective = options.pop("objective", Binary())  # type: ignore[attr-defined]
        with pytest.raises(MattaError, match=message):
            matta.CoTraining(nested, objective, **options)  # type: ignore[arg-type]
    with pytest.raises(LabelError, match="has weights='w', and the batch has: input, labels; expected a mapping"):
        matta.CoTraining(nested, Binary(weights="w"))({"input": torch.zeros(2, 3), "labels": torch.zeros(2)})
    mixed = matta.CoTraining(nested, Binary(), teacher=_model(4, 1), labels=0.5)
    with pytest.raises(LabelError, match=r"NoneType; .*CoTraining\(labels=0.0\)"):
        mixed({"input": torch.zeros(2, 3)})
    with pytest.raises(LabelError, match="received a TopK as labels to be mixed"):
        Classification().mixed(top_k(_randn(2, 3), 1), torch.zeros(2, 3), 0.5)
    with pytest.raises(LabelError, match="received labels=0.5 for Pairwise, whose labels are an order"):
        Pairwise().mixed(torch.ones(2, 3), torch.zeros(2, 3), 0.5)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"objective": Huber(0.5)}, "objective.delta=1.0, and now it is 0.5"),
        ({"objective": Huber(1.0, weights="importance")}, "objective.weights=None, and now it is 'importance'"),
        ({"objective": SquaredError(ignore_index=NAN)}, "objective='Huber'"),
        ({"teacher": _model(4, 1), "labels": 0.5}, "labels=not given, and now it is 0.5"),
        ({"logits": "output"}, "logits=not given, and now it is 'output'"),
    ],
)
def test_another_setting_does_not_resume_a_run(tmp_path: Any, other: dict[str, Any], message: str) -> None:
    def run(**options: Any) -> None:
        cotrain = matta.CoTraining(_nested(1), **{"objective": Huber(1.0, ignore_index=NAN), **options})
        optimizer = torch.optim.SGD(cotrain.nested.parameters(), lr=0.1)
        data = [(torch.ones(2, 3), torch.ones(2))] * 2
        resume = (tmp_path / "run").exists()
        matta.fit(cotrain, data, optimizer, steps=4, run=tmp_path / "run", resume=resume, tensorboard=False)

    run()
    run()
    with pytest.raises(RunError, match=message):
        run(**other)


def test_transcriptions_have_the_loss_of_torch() -> None:
    student, ta = _randn(3, 6, 4, seed=1).requires_grad_(), _randn(3, 6, 4, seed=2)
    labels = torch.tensor([[1, 2, 2], [3, -100, -100], [-100, -100, -100]])
    found = CTC().losses([student], ta, labels)
    for logits, loss in ((student, found.students[0]), (ta, found.ta)):
        log_probs, lengths = logits[:2].log_softmax(-1).transpose(0, 1), torch.tensor([3, 1])
        expected = nn.CTCLoss()(log_probs, labels[:2].clamp(min=0), torch.tensor([6, 6]), lengths)
        torch.testing.assert_close(loss, expected)
    frames = functional.cross_entropy(student[:2].flatten(0, 1), ta[:2].softmax(-1).flatten(0, 1))
    torch.testing.assert_close(found.distill[0], frames)
    assert torch.isfinite(torch.autograd.grad(found.students[0], student)[0]).all()
    weighed = CTC().losses([student], ta, Weighted(labels, torch.tensor([0.0, 0.3, 1.0])))
    torch.testing.assert_close(weighed.ta, CTC().cross_entropy(ta[1:2], labels[1:2]))
    with pytest.raises(LabelError, match="a label is 0, the blank of CTC; expected symbols alone, padded by -100"):
        CTC().cross_entropy(ta[:1], torch.tensor([[2, 0, 0]]))
    with pytest.raises(LabelError, match="a Teacher makes no labels for CTC"):
        CTC().cross_entropy(ta, CTC().teach(ta, None))
