"""Objectives against torch.nn.functional and Transformers, with hard and soft labels, ignored ones and wrong ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from matta.errors import LabelError
from matta.objectives import (
    CTC,
    Binary,
    CausalLM,
    Classification,
    Listwise,
    Losses,
    Objective,
    Pairwise,
    SquaredError,
    TopK,
    Weighted,
    top_k,
)

BATCH, TIME, CLASSES = 4, 5, 6
OBJECTIVES: dict[str, tuple[Callable[[], Any], tuple[int, ...]]] = {
    "binary": (Binary, (BATCH,)),
    "binary-column": (Binary, (BATCH, 1)),
    "classes": (Classification, (BATCH, CLASSES)),
    "positions": (Classification, (BATCH, TIME, CLASSES)),
    "tokens": (CausalLM, (BATCH, TIME, CLASSES)),
}


def _randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def _labels(name: str, *, soft: bool, seed: int = 7) -> Tensor:
    shape = OBJECTIVES[name][1]
    if name.startswith("binary"):
        probs = _randn(*shape, seed=seed).sigmoid()
        return probs if soft else probs.round()
    probs = _randn(*shape, seed=seed).softmax(-1)
    return probs if soft else probs.argmax(-1)


def _reference(name: str, logits: Tensor, labels: Tensor, ignored: int = -100) -> Tensor:
    """Cross-entropy by torch, of the rows that are left after taking the ignored ones out by hand."""
    if name.startswith("binary"):
        kept = labels.ravel() != ignored
        return functional.binary_cross_entropy_with_logits(logits.ravel()[kept], labels.ravel()[kept].to(logits))
    if name == "tokens":
        logits, labels = logits[:, :-1], labels[:, 1:]
    rows = logits.reshape(-1, CLASSES)
    labels = labels.reshape(-1, CLASSES) if labels.is_floating_point() else labels.ravel()
    kept = (labels != ignored).reshape(len(rows), -1).any(-1)
    return functional.cross_entropy(rows[kept], labels[kept])


def _soft(name: str, logits: Tensor) -> Tensor:
    """The labels that a model's logits make: shifted so that CausalLM meets those of the same position."""
    if name.startswith("binary"):
        return logits.sigmoid()
    probs = logits.softmax(-1)
    return torch.cat([probs[:, :1], probs[:, :-1]], 1) if name == "tokens" else probs


@pytest.mark.parametrize("soft", [False, True], ids=["hard", "soft"])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_three_losses_are_torchs_cross_entropies(name: str, soft: bool) -> None:
    make, shape = OBJECTIVES[name]
    students, ta = [_randn(*shape, seed=1), _randn(*shape, seed=2)], _randn(*shape, seed=3)
    labels = _labels(name, soft=soft)
    found = make().losses(students, ta, labels)
    torch.testing.assert_close(found.ta, _reference(name, ta, labels))
    for index, student in enumerate(students):
        torch.testing.assert_close(found.students[index], _reference(name, student, labels))
        torch.testing.assert_close(found.distill[index], _reference(name, student, _soft(name, ta)))
        torch.testing.assert_close(make().cross_entropy(student, labels), found.students[index])


@pytest.mark.parametrize("soft", [False, True], ids=["hard", "soft"])
@pytest.mark.parametrize("ignored", [-100, -7])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_ignored_positions_are_left_out_of_all_three(name: str, ignored: int, soft: bool) -> None:
    make, shape = OBJECTIVES[name]
    student, ta, labels = _randn(*shape, seed=1), _randn(*shape, seed=2), _labels(name, soft=soft)
    labels[0], labels[-1, ...] = ignored, ignored
    found = make(ignore_index=ignored).losses([student], ta, labels)
    taught = _soft(name, ta).clone()
    taught[0], taught[-1] = ignored, ignored
    torch.testing.assert_close(found.students[0], _reference(name, student, labels, ignored))
    torch.testing.assert_close(found.ta, _reference(name, ta, labels, ignored))
    torch.testing.assert_close(found.distill[0], _reference(name, student, taught, ignored))


@pytest.mark.parametrize("soft", [False, True], ids=["hard", "soft"])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_batch_that_is_all_ignored_gives_zero_and_no_gradient(name: str, soft: bool) -> None:
    make, shape = OBJECTIVES[name]
    student, ta = _randn(*shape, seed=1).requires_grad_(), _randn(*shape, seed=2).requires_grad_()
    found = make().losses([student], ta, torch.full_like(_labels(name, soft=soft), -100))
    assert [each.item() for each in (*found.students, found.ta, *found.distill)] == [0.0, 0.0, 0.0]
    (found.students[0] + found.ta + found.distill[0]).backward()
    for logits in (student, ta):
        assert logits.grad is not None
        assert torch.count_nonzero(logits.grad) == 0


@pytest.mark.parametrize("name", OBJECTIVES)
def test_an_empty_batch_gives_zero(name: str) -> None:
    make, shape = OBJECTIVES[name]
    none, labels = torch.zeros(0, *shape[1:]), _labels(name, soft=False)[:0]
    found = make().losses([none], none, labels)
    assert [each.item() for each in (*found.students, found.ta, *found.distill)] == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("name", OBJECTIVES)
def test_distillation_moves_the_student_alone(name: str) -> None:
    make, shape = OBJECTIVES[name]
    student, ta = _randn(*shape, seed=1).requires_grad_(), _randn(*shape, seed=2).requires_grad_()
    make().losses([student], ta, _labels(name, soft=False)).distill[0].backward()
    assert ta.grad is None
    assert student.grad is not None
    assert torch.count_nonzero(student.grad) > 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("soft", [False, True], ids=["hard", "soft"])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_logits_of_half_precision_give_losses_of_float32(name: str, soft: bool, dtype: torch.dtype) -> None:
    make, shape = OBJECTIVES[name]
    student, ta = _randn(*shape, seed=1).to(dtype), _randn(*shape, seed=2).to(dtype)
    labels = _labels(name, soft=soft)
    found = make().losses([student], ta, labels)
    expected = make().losses([student.double()], ta.double(), labels)
    for one, other in zip((*found.students, found.ta, *found.distill), _all(expected), strict=True):
        assert one.dtype == torch.float32
        torch.testing.assert_close(one, other.float())


def _all(losses: Losses) -> tuple[Tensor, ...]:
    return *losses.students, losses.ta, *losses.distill


def test_a_causal_language_model_has_the_loss_of_transformers() -> None:
    import transformers

    torch.manual_seed(0)
    config = transformers.GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=CLASSES, n_positions=8)
    model = transformers.GPT2LMHeadModel(config).eval()
    tokens = torch.randint(CLASSES, (BATCH, TIME))
    labels = tokens.masked_fill(torch.rand(tokens.shape) < 0.3, -100)
    theirs = model(input_ids=tokens, labels=labels)
    ours = CausalLM().cross_entropy(theirs.logits, labels)
    torch.testing.assert_close(ours, theirs.loss)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_what_a_teacher_teaches_is_its_own_distribution(name: str) -> None:
    make, shape = OBJECTIVES[name]
    teacher, student = _randn(*shape, seed=3), _randn(*shape, seed=4)
    found = make().cross_entropy(student, make().teach(teacher, None))
    torch.testing.assert_close(found, make().losses([student], teacher, _labels(name, soft=False)).distill[0])


@pytest.mark.parametrize("soft", [False, True], ids=["hard", "soft"])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_what_the_labels_ignore_is_not_taught(name: str, soft: bool) -> None:
    make, shape = OBJECTIVES[name]
    teacher, student, labels = _randn(*shape, seed=3), _randn(*shape, seed=4), _labels(name, soft=soft)
    labels[1] = -100
    found = make().cross_entropy(student, make().teach(teacher, labels))
    expected = make().losses([student], teacher, labels).distill[0]
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("kind", [torch.bool, torch.uint8, torch.int32, torch.int64, torch.float32, torch.bfloat16])
def test_hard_labels_of_any_type(kind: torch.dtype) -> None:
    logits, labels = _randn(BATCH), torch.tensor([0, 1, 1, 0]).to(kind)
    expected = functional.binary_cross_entropy_with_logits(logits, labels.double())
    torch.testing.assert_close(Binary().cross_entropy(logits, labels), expected)
    if not kind.is_floating_point:
        two = _randn(BATCH, 2)
        expected = functional.cross_entropy(two, labels.long())
        torch.testing.assert_close(Classification().cross_entropy(two, labels), expected)


def test_no_label_is_ignored_that_is_ignore_index_only_in_bytes() -> None:
    labels = torch.tensor([156, 3, 156, 7], dtype=torch.uint8)  # where torch compares bytes, 156 is -100
    logits, wide = _randn(BATCH, 200), labels.long()
    assert Classification().num_counted(labels) == BATCH
    assert Classification().num_counted(Weighted(labels, torch.ones(BATCH))) == BATCH
    torch.testing.assert_close(Classification().teach(logits, labels), logits.softmax(-1))
    assert CausalLM().num_counted(labels.view(1, -1)) == BATCH - 1
    assert Classification().num_counted(TopK(*top_k(logits, 2)[:2], labels)) == BATCH
    for elementwise in (Listwise(), Pairwise(), SquaredError(ignore_index=-100)):
        scores = _randn(1, BATCH)
        expected = elementwise.cross_entropy(scores, wide.view(1, -1))
        torch.testing.assert_close(elementwise.cross_entropy(scores, labels.view(1, -1)), expected)
    frames, symbols = _randn(2, 5, 4), torch.tensor([[2, 156], [1, 3]], dtype=torch.uint8)
    expected = CTC(ignore_index=156).cross_entropy(frames, symbols.long())
    torch.testing.assert_close(CTC(ignore_index=156).cross_entropy(frames, symbols), expected)


def test_a_loss_of_ones_own_needs_three_methods() -> None:
    with pytest.raises(TypeError, match="abstract"):
        Objective()  # type: ignore[abstract]


L, B = (BATCH, CLASSES), (BATCH,)


@pytest.mark.parametrize(
    ("objective", "logits", "labels", "message"),
    [
        (Binary(), B, torch.tensor([0, 1, 2, 0]), r"between 0 and 2; expected 0 or 1, or probabilities.*clip"),
        (Binary(), B, torch.tensor([0.1, -0.2, 0.3, 1]), r"between -0.2 and 1; expected"),
        (Binary(), B, torch.full(B, float("nan")), r"between nan and nan.*look for NaN"),
        (Binary(), B, torch.zeros(3), r"shape \(3,\) and the logits \(4,\); expected one label for each"),
        (Binary(), B, torch.zeros(2, 2, 1), r"\(2, 2, 1\).*expected one label for each"),
        (Binary(), L, torch.zeros(B), r"\(4, 6\); expected \(batch\) or \(batch, 1\).*use Classification"),
        (Classification(), L, torch.tensor([0, 6, 1, 2]), r"a label is 6; expected 0 to 5.*or the ignore_index"),
        (Classification(), L, torch.tensor([0, -1, 1, 2]), r"a label is -1; expected 0 to 5"),
        (
            Classification(),
            L,
            torch.zeros(3, dtype=torch.long),
            r"shape \(3,\).*expected integers or a TopK of shape \(4,\), or",
        ),
        (Classification(), L, torch.zeros(BATCH), r"torch.float32 of shape \(4,\).*or probabilities of shape \(4, 6\)"),
        (Classification(), L, torch.randn(L), r"between -.*; expected 0 or 1, or probabilities"),
        (Classification(), L, torch.rand(L) / CLASSES / 2, r"sums to 1 with an error of 0\.\d+; expected.*softmax"),
        (Classification(), L, torch.full(L, float("nan")), r"nan.*look for NaN"),
        (Classification(), B, torch.zeros((), dtype=torch.long), r"the logits of shape \(4,\)"),
        (CausalLM(), (2, 3, 4), torch.zeros(2, 4, dtype=torch.long), r"\(2, 4\) and the logits \(2, 3, 4\); expected"),
        (CausalLM(), L, torch.zeros(L, dtype=torch.long), r"expected \(batch, time\) and \(batch, time, vocabulary\)"),
        (CausalLM(), (2, 3, 4), torch.full((2, 3), 4), r"a label is 4; expected 0 to 3"),
    ],
)
def test_labels_that_do_not_fit_are_refused(objective: Any, logits: Any, labels: Tensor, message: str) -> None:
    ta = torch.zeros(logits)
    with pytest.raises(LabelError, match=message):
        objective.cross_entropy(ta, labels)
    with pytest.raises(LabelError, match=message):
        objective.losses([ta], ta, labels)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_logits_of_different_shapes_are_refused(name: str) -> None:
    make, shape = OBJECTIVES[name]
    more = (shape[0] + 1, *shape[1:])
    with pytest.raises(LabelError, match=r"Student's logits have shape .* and the TA's .*; expected the same"):
        make().losses([torch.zeros(shape), torch.zeros(more)], torch.zeros(shape), _labels(name, soft=False))


# ------------------------------------------------------------------------ a Teacher's top k


def _top(name: str, k: int = 3, seed: int = 11) -> tuple[TopK, Tensor]:
    """The top k of a Teacher beside what was observed, and all of its probabilities."""
    shape = OBJECTIVES[name][1]
    logits = 2 * _randn(*shape, seed=seed)
    observed = torch.randint(CLASSES, shape[:-1], generator=torch.Generator().manual_seed(seed))
    return top_k(logits, k, observed), logits.softmax(-1)


def _written_out(logits: Tensor, probs: Tensor, labels: TopK) -> Tensor:
    """The loss of each position: of the k classes and one bin for the others, and of what was observed in that bin."""
    listed = torch.zeros_like(probs, dtype=torch.bool).scatter(-1, labels.indices, True)
    ours = logits.softmax(-1)
    rest = ours.where(~listed, 0.0).sum(-1)
    rows = -(probs * ours.log()).where(listed, 0.0).sum(-1) - probs.where(~listed, 0.0).sum(-1) * rest.log()
    observed = labels.observed.clamp(min=0).unsqueeze(-1)
    given = -(ours.gather(-1, observed).squeeze(-1) / rest).log()
    return rows + given.where(~listed.gather(-1, observed).squeeze(-1), 0.0)


SEVERAL = ["classes", "positions", "tokens"]


@pytest.mark.parametrize("k", [1, 3, CLASSES - 1])
@pytest.mark.parametrize("name", SEVERAL)
def test_the_top_k_and_the_rest_are_one_distribution(name: str, k: int) -> None:
    make, shape = OBJECTIVES[name]
    labels, probs = _top(name, k)
    labels.observed[1] = -100
    student, ta = _randn(*shape, seed=1).requires_grad_(), _randn(*shape, seed=2).requires_grad_()
    found = make().losses([student], ta, labels)
    for logits, loss in ((student, found.students[0]), (ta, found.ta)):
        if name == "tokens":
            rows = _written_out(logits[:, :-1], probs[:, 1:], labels.at((slice(None), slice(1, None))))
        else:
            rows = _written_out(logits, probs, labels)
        expected = rows[[0, 2, 3]].mean()
        torch.testing.assert_close(loss, expected)
        gradient = torch.autograd.grad(loss, logits, retain_graph=True)[0]
        torch.testing.assert_close(gradient, torch.autograd.grad(expected, logits)[0])
        assert gradient.sum(-1).abs().max() < 1e-14  # the labels of each row sum to 1
        torch.testing.assert_close(make().cross_entropy(logits, labels), loss)
    soft = make().teach(_randn(*shape, seed=2), labels)
    taught = torch.full(shape[:-1], True) if name != "tokens" else (torch.arange(TIME) > 0).expand(shape[:-1]).clone()
    taught[1] = False
    assert torch.equal((soft != -100).any(-1), taught)


def test_on_average_the_top_k_and_what_is_observed_are_all_of_the_teachers_probabilities() -> None:
    """The mean over what may be observed, each weighed by the Teacher's probability of it: in loss and gradient."""
    _, probs = _top("classes")
    student = _randn(BATCH, CLASSES, seed=1).requires_grad_()
    expected = -(probs * student.log_softmax(-1)).sum(-1)
    wanted = torch.autograd.grad(expected.sum(), student)[0]
    for k in (1, 3, 5):
        loss, gradient = torch.zeros(BATCH, dtype=torch.float64), torch.zeros_like(student)
        for observed in range(CLASSES):
            labels = top_k(probs.log(), k, torch.full((BATCH,), observed))
            for row in range(BATCH):
                one = Classification().cross_entropy(student[[row]], labels.at([row]))
                loss[row] += probs[row, observed] * one.detach()
                gradient += probs[row, observed] * torch.autograd.grad(one, student)[0]
        torch.testing.assert_close(loss, expected.detach())
        torch.testing.assert_close(gradient, wanted)


@pytest.mark.parametrize("name", SEVERAL)
def test_a_model_that_agrees_with_the_top_k_has_the_least_loss(name: str) -> None:
    """Whatever it does with the rest, of which nothing was observed: its gradient is zero."""
    labels, probs = _top(name)
    labels = labels._replace(observed=labels.indices[..., 0])
    shuffled = probs.log()
    others = torch.ones_like(probs, dtype=torch.bool).scatter(-1, labels.indices, False)
    uneven = (_randn(*probs.shape).masked_fill(~others, -torch.inf)).softmax(-1) * probs.where(others, 0.0).sum(
        -1, keepdim=True
    )
    for logits in (shuffled, probs.where(~others, uneven).log()):
        if name == "tokens":  # position t predicts label t + 1
            logits = torch.cat([logits[:, 1:], logits[:, :1]], 1)
        logits = logits.clone().requires_grad_()
        gradient = torch.autograd.grad(OBJECTIVES[name][0]().cross_entropy(logits, labels), logits)[0]
        assert gradient.abs().max() < 1e-12


@pytest.mark.parametrize("name", SEVERAL)
def test_the_top_k_of_all_classes_are_soft_labels(name: str) -> None:
    make, shape = OBJECTIVES[name]
    labels, probs = _top(name, CLASSES)
    logits = _randn(*shape, seed=1)
    torch.testing.assert_close(make().cross_entropy(logits, labels), make().cross_entropy(logits, probs))
    half = labels._replace(log_probs=labels.log_probs.half())
    torch.testing.assert_close(
        make().cross_entropy(logits, half), make().cross_entropy(logits, probs), rtol=2e-3, atol=0
    )


def test_labels_that_rounding_has_made_too_likely_still_sum_to_one() -> None:
    labels = TopK(torch.tensor([[0, 1]]), torch.tensor([[0.6, 0.404]]).log(), torch.tensor([1]))
    logits = torch.zeros(1, CLASSES, dtype=torch.float64).requires_grad_()
    Classification().cross_entropy(logits, labels).backward()
    assert logits.grad is not None
    assert abs(float(logits.grad.sum())) < 1e-12
    torch.testing.assert_close(logits.grad[0, 2:], torch.full((CLASSES - 2,), 1 / CLASSES, dtype=torch.float64))


def test_top_k_labels_travel_as_tuples_do() -> None:
    from accelerate.utils import send_to_device
    from torch.utils.data import DataLoader

    labels = _top("positions")[0]
    moved = send_to_device({"labels": labels}, "meta")["labels"]
    assert isinstance(moved, TopK)
    assert moved.indices.device.type == "meta"
    rows = [(torch.zeros(1), labels.at(index)) for index in range(BATCH)]
    collated = next(iter(DataLoader(rows, batch_size=BATCH)))[1]
    assert isinstance(collated, TopK)
    assert torch.equal(collated.indices, labels.indices)
    assert collated.shape == (BATCH, TIME)


def _bad(**changes: Any) -> TopK:
    labels = TopK(torch.tensor([[0, 1], [2, 3]]), torch.full((2, 2), 0.25).log(), torch.tensor([0, 5]))
    return labels._replace(**changes)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (_bad(indices=torch.tensor([[0, 1], [3, 3]])), "class 3 is listed twice at a position; expected each"),
        (_bad(indices=torch.tensor([[0, 6], [2, 3]])), "a label is 6; expected 0 to 5"),
        (_bad(indices=torch.tensor([[0, -100], [2, 3]])), "a label is -100; expected 0 to 5"),
        (_bad(log_probs=torch.randn(2, 2) + 2), "reach .*; expected logarithms of probabilities.*log-softmax"),
        (_bad(log_probs=torch.full((2, 2), 0.7).log()), "sum to 1.4 at most; expected"),
        (_bad(log_probs=torch.full((2, 2), torch.nan)), "reach nan.*NaN"),
        (_bad(log_probs=torch.zeros(2, 3)), r"of shapes \(2, 2\), \(2, 3\) and \(2,\); expected \(..., k\), the same"),
        (_bad(indices=torch.zeros(3, 2)), r"of shapes \(3, 2\), \(2, 2\) and \(2,\); expected"),
        (_bad(observed=torch.zeros(3)), r"a TopK of shape \(3,\) and the logits of shape \(2, 6\); expected"),
        (_bad(observed=torch.tensor([0, 6])), "a label is 6; expected 0 to 5"),
    ],
)
def test_top_k_labels_that_do_not_fit_are_refused(labels: TopK, message: str) -> None:
    with pytest.raises(LabelError, match=message):
        Classification().cross_entropy(torch.zeros(2, CLASSES), labels)


def test_one_logit_and_no_classes_have_no_top_k() -> None:
    with pytest.raises(LabelError, match="a TopK as labels of Binary; expected a tensor"):
        Binary().cross_entropy(torch.zeros(2), _bad())
    for k in (0, CLASSES + 1):
        with pytest.raises(LabelError, match=f"received k={k}; expected 1 to {CLASSES}, the number of classes"):
            top_k(torch.zeros(2, CLASSES), k)
