"""The training step: the sum of the losses, its ramp, its Teacher, several Students and sampled sub-models."""

from __future__ import annotations

import copy
import gc
import weakref
from random import Random
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import matta
from matta.errors import LabelError, MattaError
from matta.objectives import Binary, CausalLM, Classification, Objective, TopK, top_k
from matta.training.known_step import KnownStep

X = torch.randn(6, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
Y = torch.tensor([0, 1, 1, 0, 1, 0])


def _tower(width: int, outputs: int = 2) -> nn.Sequential:
    torch.manual_seed(width)
    return nn.Sequential(nn.Linear(3, width), nn.Tanh(), nn.Dropout(0.0), nn.Linear(width, outputs)).double()


def _cotraining(nested: matta.Nested | None = None, **arguments: Any) -> matta.CoTraining:
    return matta.CoTraining(nested or matta.nest(_tower(4), _tower(7)), Classification(), **arguments).train()


def _grads(cotrain: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in cotrain.named_parameters() if p.grad is not None}


def test_the_loss_is_the_weighted_sum_of_its_parts() -> None:
    cotrain = _cotraining(weights=matta.Weights(student=0.7, ta=1.3, distill=0.3))
    out = cotrain((X, Y))
    student, ta = functional.cross_entropy(out.student_logits, Y), functional.cross_entropy(out.ta_logits, Y)
    distill = functional.cross_entropy(out.student_logits, out.ta_logits.softmax(-1))
    torch.testing.assert_close(out.loss.detach(), 0.7 * student + 1.3 * ta + 0.3 * distill, rtol=1e-14, atol=0)
    for found, expected in ((out.student_loss, student), (out.ta_loss, ta), (out.distill_loss, distill)):
        torch.testing.assert_close(found, expected)
    assert out.distill_weight.item() == 0.3
    torch.testing.assert_close(out.student_logits, cotrain.nested.student(X))
    torch.testing.assert_close(out.ta_logits, cotrain.nested.ta(X))


class Head(nn.Module):
    """Logits of (batch, time, classes) from a head that can be fused, or of (batch) from the first of its classes."""

    def __init__(self, width: int, outputs: int) -> None:
        super().__init__()
        torch.manual_seed(width)
        self.hidden, self.head = nn.Linear(3, width), nn.Linear(width, outputs)

    def forward(self, x: Tensor) -> Tensor:
        logits = self.head(self.hidden(x).tanh())
        return logits[:, 0, 0] if logits.shape[-1] == 1 else logits


@pytest.mark.parametrize("labels", ["hard", "soft", "top", "none"])
@pytest.mark.parametrize("objective", [Binary(), Classification(fused=False), Classification(fused=True), CausalLM()])
def test_the_parts_of_a_step_sum_to_the_whole(objective: Objective, labels: str) -> None:
    """With `num_labels`, whatever is ignored in which part: two Students, with and without a Teacher."""
    outputs = 1 if isinstance(objective, Binary) else 5
    if labels == "top" and outputs == 1:
        pytest.skip("a TopK is of several classes")
    students = [Head(4, outputs), Head(5, outputs)]
    teacher = Head(3, outputs).double() if labels == "none" else None
    cotrain = matta.CoTraining(matta.nest(students, Head(9, outputs)), objective, teacher=teacher).double()
    x = torch.randn(7, 4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    y = _some_labels(labels, x, outputs)
    parts = [slice(0, 2), slice(2, 3), slice(3, 7)]
    batches = [(x[part], y.at(part) if isinstance(y, TopK) else y if y is None else y[part]) for part in parts]
    expected = cotrain((x, y))
    expected.loss.backward()
    whole = _grads(cotrain)
    cotrain.zero_grad()
    num_labels = cotrain.num_labels(batches)
    assert num_labels == expected.num_labels
    made = [cotrain(batch, num_labels=num_labels) for batch in batches]
    torch.testing.assert_close(sum(out.loss for out in made), expected.loss)
    torch.testing.assert_close(sum(out.ta_loss * out.num_labels for out in made) / num_labels, expected.ta_loss)
    for out in made:
        out.loss.backward()
    torch.testing.assert_close(_grads(cotrain), whole)


def _some_labels(kind: str, x: Tensor, outputs: int) -> Tensor | TopK | None:
    """Labels of which the second example has none that count, and the first some."""
    if kind == "none":
        return None
    ignored = torch.zeros(7, 4, dtype=torch.bool)
    ignored[0, :3] = ignored[2] = ignored[5, 1] = True
    if outputs == 1:
        return (x[:, 0, 0].sigmoid() if kind == "soft" else (x[:, 0, 0] > 0).double()).where(~ignored[:, 1], -100)
    logits = Head(2, outputs).double()(x).detach()
    hard = logits.argmax(-1).where(~ignored, -100)
    soft = logits.softmax(-1).where(~ignored.unsqueeze(-1), -100)
    return {"hard": hard, "soft": soft, "top": top_k(logits, 2, hard)}[kind]


def test_a_step_of_equal_batches_keeps_its_bits() -> None:
    cotrain = _cotraining()
    plain, told = cotrain((X, Y)), cotrain((X, Y), num_labels=cotrain.num_labels([(X, Y)]))
    third = cotrain((X, Y), num_labels=cotrain.num_labels([(X, Y)] * 3))
    assert plain.loss == told.loss and third.loss == plain.loss / 3


def test_only_the_loss_carries_a_graph() -> None:
    out = _cotraining()((X, Y))
    assert out.loss.requires_grad
    rest = (out.student_loss, out.ta_loss, out.distill_loss, out.distill_weight, out.student_logits, out.ta_logits)
    assert not any(each.requires_grad for each in rest)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("ramp", [None, matta.Ramp(start=0, steps=3)])
def test_the_loss_is_of_the_type_of_the_model(dtype: torch.dtype, ramp: matta.Ramp | None) -> None:
    out = _cotraining(ramp=ramp).to(dtype)((X.to(dtype), Y))
    assert {out.loss.dtype, out.ta_loss.dtype, out.distill_weight.dtype} == {dtype}


def test_the_ramp_follows_the_optimizer_steps_in_training_alone() -> None:
    cotrain = _cotraining(ramp=matta.Ramp(start=1, steps=2), weights=matta.Weights(distill=0.5), accumulate=2)
    seen = []
    for _ in range(8):
        seen.append(cotrain((X, Y)).distill_weight.item())
        cotrain.eval()
        assert cotrain((X, Y)).distill_weight.item() == cotrain((X, Y)).distill_weight.item()
        cotrain.train()
    assert seen == [0.0, 0.0, 0.0, 0.0, 0.25, 0.25, 0.5, 0.5]
    assert cotrain.step.item() == 8


def test_before_the_ramp_nothing_is_distilled() -> None:
    late, never = _cotraining(ramp=matta.Ramp(start=5, steps=9)), _cotraining(weights=matta.Weights(distill=0))
    for cotrain in (late, never):
        cotrain((X, Y)).loss.backward()
    for name, gradient in _grads(late).items():
        assert torch.equal(gradient, _grads(never)[name])


def test_the_state_resumes_exactly() -> None:
    def train(cotrain: matta.CoTraining, steps: int) -> None:
        for _ in range(steps):
            cotrain.zero_grad()
            cotrain((X, Y)).loss.backward()
            with torch.no_grad():
                for parameter in cotrain.nested.parameters():
                    parameter -= 0.1 * parameter.grad

    def make() -> matta.CoTraining:
        nested = matta.nest(_tower(4), _tower(7), private=["3.bias"])
        return _cotraining(nested, ramp=matta.Ramp(start=1, steps=5), sample=matta.random_sub_model(nested))

    whole, first, second = make(), make(), make()
    train(whole, 6)
    train(first, 3)
    assert not any(name.startswith("nested.students.0.0") for name in first.state_dict())
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    assert second.step.item() == 3
    train(second, 3)
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, second.state_dict()[name]), name


@pytest.mark.parametrize("names", [True, False])
def test_batches_by_name_and_by_position_are_the_same(names: bool) -> None:
    class Named(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.tower = _tower(width)

        def forward(self, x: Tensor, scale: Tensor) -> dict[str, Tensor]:
            return {"logits": self.tower(x * scale), "other": x}

    cotrain = _cotraining(matta.nest(Named(4), Named(7)))
    scale = torch.tensor(2.0)
    batch = {"x": X, "scale": scale, "labels": Y} if names else ((X, scale), Y)
    torch.testing.assert_close(cotrain(batch).loss, _cotraining()((2 * X, Y)).loss)


# ------------------------------------------------------------------------ Teacher


def test_a_teacher_labels_on_the_fly_without_gradient_and_in_eval_mode() -> None:
    teacher = nn.Sequential(_tower(9), nn.Dropout(0.9)).train()
    cotrain = _cotraining(teacher=teacher)
    out = cotrain((X, None))
    labels = teacher.eval()(X).softmax(-1).detach()
    torch.testing.assert_close(out.loss, _cotraining()((X, labels)).loss)
    teacher.train()
    cotrain((X, None)).loss.backward()
    assert teacher.training
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert {*map(id, cotrain.parameters())}.isdisjoint(map(id, teacher.parameters()))
    assert cotrain.state_dict().keys() == _cotraining().state_dict().keys()


def test_a_teacher_keeps_the_modes_of_its_parts() -> None:
    teacher = nn.Sequential(nn.BatchNorm1d(3), _tower(9)).double().train()
    teacher[0].eval()
    _cotraining(teacher=teacher)((X, None))
    assert [part.training for part in (teacher, teacher[0], teacher[1])] == [True, False, True]


def test_a_teacher_leaves_out_what_the_labels_ignore() -> None:
    teacher, ignored = _tower(9), torch.tensor([0, -100, 1, 0, -100, 1])
    kept = ignored != -100
    found, expected = _cotraining(teacher=teacher)((X, ignored)), _cotraining(teacher=teacher)((X[kept], None))
    torch.testing.assert_close(found.loss, expected.loss)


def test_a_teacher_moves_with_the_pair() -> None:
    teacher = _tower(9)
    _cotraining(teacher=teacher).to(torch.float32)((X.float(), None))
    assert teacher[0].weight.dtype == torch.float32


def test_a_batch_of_names_without_labels_is_labelled_by_the_teacher() -> None:
    class Named(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x)

    pair = [Named(*_tower(width)) for width in (4, 7)]
    cotrain = _cotraining(matta.nest(*pair), teacher=Named(*_tower(9)))
    assert torch.isfinite(cotrain({"x": X}).loss)


# ------------------------------------------------------------------------ several Students, sampled sub-models


def test_several_students_each_have_their_losses() -> None:
    weights = matta.Weights(student=0.7, ta=1.3, distill=0.3)
    cotrain = _cotraining(matta.nest([_tower(2), _tower(4)], _tower(7)), weights=weights)
    out = cotrain((X, Y))
    assert [tuple(logits.shape) for logits in out.all_student_logits] == [(6, 2)] * 2
    expected = 1.3 * out.ta_loss
    for student, distill in zip(out.student_losses, out.distill_losses, strict=True):
        expected = expected + 0.7 * student + 0.3 * distill
    torch.testing.assert_close(out.loss.detach(), expected)
    one = _cotraining(matta.nest(_tower(4), _tower(7)), weights=weights)((X, Y))
    torch.testing.assert_close(out.student_losses[1], one.student_loss)


def test_a_sampled_sub_model_is_one_more_student_in_training() -> None:
    nested = matta.nest(_tower(4), _tower(7))
    plain = _cotraining(nested)((X, Y))
    narrow = _cotraining(nested, sample=lambda _: matta.narrow(nested))
    torch.testing.assert_close(narrow((X, Y)).loss, plain.loss + plain.student_loss + plain.distill_loss)
    wide = _cotraining(nested, sample=lambda _: matta.wide(nested))((X, Y))
    entropy = functional.cross_entropy(plain.ta_logits, plain.ta_logits.softmax(-1))
    torch.testing.assert_close(wide.loss, plain.loss + plain.ta_loss + entropy)
    assert len(wide.student_losses) == 1
    torch.testing.assert_close(narrow.eval()((X, Y)).loss, plain.loss)


def test_sampling_is_repeated_after_a_resume_and_varies() -> None:
    nested = matta.nest(_tower(4), _tower(7))
    draws: list[matta.SubModel] = []

    def sample(random: Random) -> matta.SubModel:
        draws.append(matta.random_sub_model(nested)(random))
        return draws[-1]

    cotrain = _cotraining(nested, sample=sample)
    for _ in range(12):
        cotrain((X, Y))
    first, draws[:] = list(draws), []
    cotrain.step.zero_()
    for _ in range(12):
        cotrain((X, Y))
    assert draws == first
    assert len(set(first)) == 2


def test_sub_models_that_were_sampled_do_not_pile_up(monkeypatch: pytest.MonkeyPatch) -> None:
    def deep(width: int) -> nn.Module:
        hidden = (nn.Linear(width, width, dtype=torch.float64) for _ in range(4))
        return nn.Sequential(*_tower(width, width), *hidden, nn.Linear(width, 2, dtype=torch.float64))

    made: list[weakref.ref[nn.Module]] = []

    def noted(nested: matta.Nested, spec: matta.SubModel) -> nn.Module:
        module = matta.live(nested, spec)
        made.append(weakref.ref(module))
        return module

    monkeypatch.setattr("matta.training.cotraining.live", noted)
    nested = matta.nest(deep(4), deep(7))
    cotrain = _cotraining(nested, sample=matta.random_sub_model(nested))
    for _ in range(80):
        cotrain((X, Y))
    gc.collect()
    assert len(made) > 30
    assert sum(each() is not None for each in made) <= 16


# ------------------------------------------------------------------------ turns


def _turned(chance: float, alone_steps: int = 0, **arguments: Any) -> matta.CoTraining:
    nested = matta.nest(_tower(4), _tower(7), warm_start=True)
    return _cotraining(nested, turns=matta.Turns(alone_steps=alone_steps, student_chance=chance), **arguments)


def test_at_first_the_student_is_trained_alone() -> None:
    cotrain = _turned(0.5, alone_steps=2, accumulate=2, weights=matta.Weights(student=0.7))
    for _ in range(4):
        out = cotrain((X, Y))
        assert (out.trains_ta, out.trains_students) == (False, True)
        torch.testing.assert_close(out.loss.detach(), 0.7 * functional.cross_entropy(out.student_logits, Y))
        assert out.ta_loss.isnan() and out.distill_loss.isnan()
        torch.testing.assert_close(out.student_loss, out.loss.detach() / 0.7)
        with pytest.raises(MattaError, match=r"has not run that model, as CoTraining\(turns=...\)"):
            _ = out.ta_logits
        torch.testing.assert_close(cotrain.nested.ta(X), cotrain.nested.student(X), rtol=1e-12, atol=1e-14)
    assert cotrain((X, Y)).trains_ta, "from the second optimizer step on"


def test_the_ta_that_waits_stays_as_good_as_the_student_that_learns() -> None:
    cotrain = _turned(0.5, alone_steps=20)
    optimizer = matta.Shampoo(cotrain.nested, lr=0.05)
    before = cotrain((X, Y)).student_loss
    for _ in range(15):
        optimizer.zero_grad()
        cotrain((X, Y)).loss.backward()
        optimizer.step()
    assert cotrain((X, Y)).student_loss < 0.7 * before
    torch.testing.assert_close(cotrain.nested.ta(X), cotrain.nested.student(X), rtol=1e-9, atol=1e-9)


def test_later_the_student_and_the_sample_take_turns_beside_the_ta() -> None:
    weights = matta.Weights(student=0.7, ta=1.3, distill=0.3)
    always, never = (
        _turned(chance, weights=weights, sample=lambda _: matta.SubModel({}, default="narrow")) for chance in (1, 0)
    )
    pair = _cotraining(always.nested, weights=weights)((X, Y))
    with_student, with_sample = always((X, Y)), never((X, Y))
    torch.testing.assert_close(with_student.loss, pair.loss)
    torch.testing.assert_close(with_sample.loss, pair.loss)  # the sample drawn is as wide as the Student
    assert (with_sample.trains_ta, with_sample.trains_students) == (True, False)
    assert with_sample.student_loss.isnan() and with_sample.distill_loss.isnan()
    torch.testing.assert_close(with_sample.ta_loss, pair.ta_loss)
    with pytest.raises(MattaError, match="has not run that model"):
        _ = with_sample.student_logits
    assert never.eval()((X, Y)).trains_students, "outside of training all are run"


def test_turns_come_by_chance_and_are_repeated_after_a_resume() -> None:
    cotrain = _turned(0.3, sample=lambda _: matta.SubModel({}, default="narrow"))
    turns: list[list[bool]] = []
    for _ in range(2):
        cotrain.step.zero_()
        turns.append([cotrain((X, Y)).trains_students for _ in range(200)])
    assert turns[0] == turns[1]
    assert 40 < sum(turns[0]) < 80
    without_sample = _turned(0.3)
    assert all(without_sample((X, Y)).trains_students for _ in range(20))


@pytest.mark.parametrize("alone_steps", [0, 1])
def test_every_parameter_has_a_gradient_in_every_turn(alone_steps: int) -> None:
    """DDP expects one; of what a step does not train it is zero."""

    class Deep(nn.Module):
        def __init__(self, blocks: int) -> None:
            super().__init__()
            torch.manual_seed(blocks)
            self.h = nn.ModuleList(nn.Linear(3, 3) for _ in range(blocks))
            self.head = nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            for block in self.h:
                x = block(x)
            return self.head(x)

    nested = matta.nest(Deep(1), Deep(2), private=["head.*"], layers={"h": "first"})
    turns = matta.Turns(alone_steps=alone_steps, student_chance=0.0)
    sample = matta.random_sub_model(nested, among=[matta.SubModel()])
    cotrain = matta.CoTraining(nested, Classification(), turns=turns, sample=sample).train()
    cotrain((X.float(), Y)).loss.backward()
    idle = ("ta.h.1", "ta.head") if alone_steps else ("students.0.head",)
    for name, parameter in nested.named_parameters():
        assert parameter.grad is not None
        assert bool(parameter.grad.count_nonzero()) != name.startswith(idle), name


def _deep_tower(width: int) -> nn.Sequential:
    torch.manual_seed(width)
    layers = nn.Linear(3, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 2)
    return nn.Sequential(*layers).double()


def test_fit_shows_the_losses_of_what_was_trained_alone() -> None:
    pytest.importorskip("accelerate")
    nested = matta.nest(_tower(4), _tower(7), warm_start=True)
    shown = {}
    for steps in (2, 4):
        cotrain = matta.CoTraining(nested, Classification(), turns=matta.Turns(alone_steps=3))
        optimizer = torch.optim.SGD(nested.parameters(), 0.0)
        shown[steps] = matta.fit(cotrain, [(X, Y)] * 4, optimizer, steps=steps, progress=False, log_every=1).losses
    student, ta = (functional.cross_entropy(module(X), Y).item() for module in (nested.student, nested.ta))
    assert shown[2] == pytest.approx({"student": student})
    assert shown[4].keys() == {"student", "ta", "distill"} and shown[4]["ta"] == pytest.approx(ta)


def test_a_family_is_trained_in_turns_with_the_sizes_wanted() -> None:
    nested = matta.nest(_deep_tower(4), _deep_tower(7), warm_start=True)
    between = {matta.SubModel({"0": "wide", "2": "narrow"}), matta.SubModel({"0": "narrow", "2": "wide"})}
    cotrain = matta.CoTraining.for_family(nested, Classification(), num_steps=10, alone=0.3, student_chance=0.2)
    assert cotrain.turns == matta.Turns(alone_steps=3, student_chance=0.2) and cotrain.sample is not None
    assert {cotrain.sample(Random(seed)) for seed in range(20)} == between, "neither the Student nor the TA"
    wanted = [matta.narrow(nested), matta.wide_narrow_wide(nested, 1), matta.wide(nested)]
    few = matta.CoTraining.for_family(nested, Classification(), num_steps=10, wanted=wanted)
    assert few.sample is not None and {few.sample(Random(seed)) for seed in range(9)} == {wanted[1]}
    assert matta.CoTraining.for_family(nested, Classification(), num_steps=9, wanted=wanted[::2]).sample is None
    assert matta.CoTraining.for_family(matta.nest(_tower(4), _tower(7)), Classification(), num_steps=9).sample is None
    with pytest.raises(MattaError, match="alone=1.5; expected a share"):
        matta.CoTraining.for_family(nested, Classification(), num_steps=10, alone=1.5)


def test_a_family_of_many_layers_is_drawn_at_random() -> None:
    def deep(width: int) -> nn.Sequential:
        hidden = [nn.Linear(width, width) for _ in range(8)]
        return nn.Sequential(nn.Linear(3, width), *hidden, nn.Linear(width, 2)).double()

    nested = matta.nest(deep(2), deep(3), warm_start=True)
    cotrain = matta.CoTraining.for_family(nested, Classification(), num_steps=2, alone=0.0, student_chance=0.0)
    assert cotrain.sample is not None and len({cotrain.sample(Random(seed)) for seed in range(40)}) > 30
    assert not cotrain.train()((X, Y)).trains_students


@pytest.mark.parametrize("wrong", [{"alone_steps": -1}, {"student_chance": 1.1}, {"student_chance": -0.1}])
def test_turns_out_of_range_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(MattaError, match=r"received Turns\(.*expected"):
        matta.Turns(**wrong)


# ------------------------------------------------------------------------ copies


def test_a_copy_is_independent() -> None:
    cotrain = _cotraining(sample=lambda _: matta.SubModel({}, default="wide"))
    before = cotrain((X, Y)).loss
    copied = copy.deepcopy(cotrain)
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter.zero_()
    assert torch.count_nonzero(copied.nested.student(X)) == 0
    assert torch.count_nonzero(copied((X, Y)).all_student_logits[0]) == 0
    torch.testing.assert_close(cotrain((X, Y)).loss, before)
    assert {*map(id, copied.parameters())}.isdisjoint(map(id, cotrain.parameters()))


# ------------------------------------------------------------------------ errors


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ((X, None), r"labels of the batch are NoneType; expected a tensor.*CoTraining\(teacher=...\)"),
        ({"input": X}, r"labels of the batch are NoneType"),
        ((X, [0, 1]), r"labels of the batch are list"),
        ((X, Y, Y), r"tuple of 3; expected a mapping"),
        (X, r"type Tensor; expected a mapping"),
        ((X, Y + 5), r"a label is 6; expected 0 to 1"),
        ((X, Y[:3]), r"shape \(3,\)"),
    ],
)
def test_a_batch_without_usable_labels_is_refused_and_is_no_step(batch: Any, message: str) -> None:
    cotrain = _cotraining()
    with pytest.raises(LabelError, match=message):
        cotrain(batch)
    assert cotrain.step.item() == 0


def test_a_module_that_returns_no_logits_is_refused() -> None:
    class Pair(nn.Linear):
        def forward(self, input: Tensor) -> Any:
            return super().forward(input), None

    cotrain = matta.CoTraining(matta.nest(Pair(3, 1), Pair(3, 1)), Binary())
    with pytest.raises(LabelError, match="returned tuple without logits"):
        cotrain((X.float(), Y))


def test_models_of_different_classes_are_refused() -> None:
    nested = matta.nest(_tower(4, 2), _tower(7, 3), layouts={"3.*": 1})
    with pytest.raises(LabelError, match=r"\(6, 2\) and the TA's \(6, 3\)"):
        _cotraining(nested)((X, Y))


def test_a_nesting_is_not_called() -> None:
    with pytest.raises(matta.MattaError, match=r"a nesting is not called; expected .* nested.student"):
        matta.nest(_tower(4), _tower(7))(X)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"nested": _tower(4)}, r"received Sequential as nested; expected what matta.nest gives"),
        (
            {"objective": Binary},
            r"received the class Binary as objective; expected such as matta.obj",
        ),
        ({"accumulate": 0}, r"received accumulate=0; expected a whole number from 1 up"),
    ],
)
def test_what_cannot_be_trained_is_refused_before_the_first_step(wrong: dict[str, Any], message: str) -> None:
    arguments = {"nested": matta.nest(_tower(4), _tower(7)), "objective": Classification(), **wrong}
    with pytest.raises(matta.MattaError, match=message):
        matta.CoTraining(**arguments)


def test_the_step_is_read_anew_after_anything_but_a_forward() -> None:
    counter, known = torch.zeros((), dtype=torch.int64), KnownStep()
    assert known.read(counter) == 0
    known.advance(counter)
    assert known.read(counter) == counter.item() == 1
    counter.mul_(7)
    assert known.read(counter) == 7
    twin, counter_of_twin = copy.deepcopy((known, counter))
    counter_of_twin.fill_(3)
    assert twin.read(counter_of_twin) == 3
    known.advance(counter)
    assert (known.read(counter), known.read(counter_of_twin)) == (8, 3)


@pytest.mark.parametrize("wrong", [0, -1, float("nan")])
def test_a_number_of_labels_that_is_none_is_refused(wrong: float) -> None:
    cotrain = _cotraining()
    with pytest.raises(MattaError, match=f"received num_labels={wrong}; expected a number over 0"):
        cotrain((X, Y), num_labels=wrong)
    assert cotrain.step == 0


@pytest.mark.parametrize("wrong", [lambda: matta.Turns(alone_steps=0.5), lambda: matta.Ramp(start=0.1, steps=0.5)])  # type: ignore[arg-type]
def test_shares_of_a_run_are_no_numbers_of_steps(wrong: Any) -> None:
    with pytest.raises(MattaError, match="expected optimizer steps, not shares of a run"):
        wrong()


@pytest.mark.parametrize("wrong", [{"weights": (1, 1, 1)}, {"ramp": 3}, {"turns": matta.Turns}])
def test_settings_of_another_kind_are_refused(wrong: dict[str, Any]) -> None:
    name = next(iter(wrong))
    with pytest.raises(MattaError, match=f"received .* as {name}; expected a matta.{name.title()}, or None"):
        _cotraining(**wrong)


@pytest.mark.parametrize("wrong", [{"start": -1}, {"steps": float("nan")}, {"start": float("inf")}])
def test_a_ramp_of_no_number_of_steps_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(MattaError, match="expected start and steps of zero or more"):
        matta.Ramp(**wrong)
