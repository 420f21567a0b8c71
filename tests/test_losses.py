"""Eq. 1-3 against the sums written out, and against torch."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from matta.objectives import Classification
from matta.objectives.losses import (
    at_least_float32,
    binary_cross_entropy,
    hard_cross_entropy,
    log_probabilities,
    soft_cross_entropy,
)

ROWS, CLASSES = 5, 4


def _logits(seed: int) -> Tensor:
    return torch.randn(ROWS, CLASSES, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) * 3


def _by_hand(probs: Tensor, logits: Tensor) -> float:
    """Eq. 1: minus the sum of y_i log p_i, averaged over the rows; nothing of torch's losses in it."""
    total = 0.0
    for label, row in zip(probs.tolist(), logits.tolist(), strict=True):
        exponentials = [math.exp(z) for z in row]
        total -= sum(y * math.log(e / sum(exponentials)) for y, e in zip(label, exponentials, strict=True))
    return total / len(probs)


def _distilled(student: Tensor, ta: Tensor) -> Tensor:
    """L_D (Eq. 3) of one Student."""
    (loss,) = Classification().losses([student], ta, torch.zeros(len(ta), dtype=torch.int64)).distill
    return loss


def test_equations_1_and_2_written_out() -> None:
    logits, soft = _logits(0), _logits(1).softmax(-1)
    labels = torch.tensor([3, 0, 2, 1, 1])
    hard = functional.one_hot(labels, CLASSES).double()
    assert soft_cross_entropy(log_probabilities(logits), soft).item() == pytest.approx(_by_hand(soft, logits))
    assert hard_cross_entropy(log_probabilities(logits), labels, -100).item() == pytest.approx(_by_hand(hard, logits))


def test_equation_3_written_out_and_its_gradient_goes_to_the_student_alone() -> None:
    student, ta = _logits(0).requires_grad_(), _logits(1).requires_grad_()
    loss = _distilled(student, ta)
    assert loss.item() == pytest.approx(_by_hand(ta.detach().softmax(-1), student.detach()))
    loss.backward()
    assert ta.grad is None
    torch.testing.assert_close(student.grad, (student.softmax(-1) - ta.softmax(-1)).detach() / ROWS)


def test_hard_labels_are_soft_labels_of_certainty() -> None:
    log_probs, labels = log_probabilities(_logits(2)), torch.tensor([0, 1, 2, 3, 0])
    one_hot = functional.one_hot(labels, CLASSES).double()
    torch.testing.assert_close(hard_cross_entropy(log_probs, labels, -100), soft_cross_entropy(log_probs, one_hot))


def test_cross_entropy_is_least_where_the_models_agree() -> None:
    ta = _logits(3)
    entropy = _distilled(ta, ta)
    assert all(_distilled(_logits(seed), ta) > entropy for seed in range(4, 9))


def test_ignored_rows_count_neither_above_nor_below() -> None:
    logits, soft = _logits(0), _logits(1).softmax(-1)
    labels, kept = torch.tensor([3, -1, 2, -1, 1]), torch.tensor([True, False, True, False, True])
    expected = functional.cross_entropy(logits[kept], labels[kept])
    torch.testing.assert_close(hard_cross_entropy(log_probabilities(logits), labels, -1), expected)
    expected = functional.cross_entropy(logits[kept], soft[kept])
    torch.testing.assert_close(soft_cross_entropy(log_probabilities(logits), soft, kept), expected)


def test_all_rows_ignored_give_zero_and_a_gradient_of_zero() -> None:
    logits = _logits(0).requires_grad_()
    none = torch.zeros(ROWS, dtype=torch.bool)
    loss = hard_cross_entropy(log_probabilities(logits), torch.full((ROWS,), -100), -100)
    loss = loss + soft_cross_entropy(log_probabilities(logits), _logits(1).softmax(-1), none)
    loss = loss + binary_cross_entropy(logits[:, 0], torch.ones(ROWS).double(), torch.zeros(ROWS).double())
    loss.backward()
    assert loss.item() == 0.0
    assert logits.grad is not None
    assert torch.count_nonzero(logits.grad) == 0


def test_one_logit_is_two_of_which_the_other_is_zero() -> None:
    logits, probs = _logits(0)[:, 0], torch.rand(ROWS, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    two = torch.stack([torch.zeros_like(logits), logits], -1)
    expected = soft_cross_entropy(log_probabilities(two), torch.stack([1 - probs, probs], -1))
    found = binary_cross_entropy(logits, probs, torch.full_like(probs, 1 / ROWS))
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_losses_are_computed_in_float32_at_least(dtype: torch.dtype) -> None:
    logits = _logits(0).to(dtype)
    expected = torch.float64 if dtype == torch.float64 else torch.float32
    assert at_least_float32(logits).dtype == log_probabilities(logits).dtype == expected
    torch.testing.assert_close(log_probabilities(logits), logits.to(expected).log_softmax(-1))


def test_large_logits_stay_finite() -> None:
    logits = torch.tensor([[3e4, -3e4, 0.0, 1.0]])
    assert torch.isfinite(_distilled(logits, -logits))


def test_a_class_masked_out_by_a_logit_of_minus_infinity_adds_nothing() -> None:
    student = torch.tensor([[0.3, -0.1, -torch.inf]], requires_grad=True)
    ta = torch.tensor([[0.2, 0.5, -torch.inf]])
    loss = _distilled(student, ta)
    torch.testing.assert_close(loss, _distilled(student[:, :2], ta[:, :2]))
    (gradient,) = torch.autograd.grad(loss, student)
    assert bool(gradient.isfinite().all())
