"""What a batch may be, how a module is called on it, and where its logits are."""

from __future__ import annotations

from collections import OrderedDict, UserDict
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from matta.errors import LabelError
from matta.nesting.batches import call, logits_of, outputs_of, split_labels

X, Y = torch.ones(2, 3), torch.zeros(2)


class Pair(NamedTuple):
    inputs: Tensor
    labels: Tensor


@dataclass
class Output:
    logits: Tensor
    hidden: Any = None


@dataclass
class Scored:
    score: Tensor
    more: Any = None


class Scaled(nn.Module):
    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        return x * scale


@pytest.mark.parametrize("kind", [dict, OrderedDict, UserDict])
def test_a_mapping_gives_its_labels_and_keeps_the_rest(kind: Any) -> None:
    batch = kind({"x": X, "scale": 2.0, "labels": Y})
    inputs, labels = split_labels(batch)
    assert labels is Y
    assert torch.equal(call(Scaled(), inputs), 2 * X)
    assert set(batch) == {"x", "scale", "labels"}


@pytest.mark.parametrize("batch", [(X, Y), [X, Y], Pair(X, Y)])
def test_a_pair_is_inputs_and_labels(batch: Any) -> None:
    inputs, labels = split_labels(batch)
    assert inputs is X
    assert labels is Y


def test_labels_may_be_missing_in_a_mapping() -> None:
    assert split_labels({"x": X}) == ({"x": X}, None)


@pytest.mark.parametrize("inputs", [X, (X,), [X], (X, 1.0), {"x": X}, {"x": X, "scale": 1.0}])
def test_a_module_is_called_by_position_or_by_name(inputs: Any) -> None:
    assert torch.equal(call(Scaled(), inputs), X)


@pytest.mark.parametrize("output", [X, {"logits": X, "loss": None}, Output(X), Output(logits=X, hidden=Y)])
def test_logits_are_the_tensor_or_called_so(output: Any) -> None:
    assert logits_of(output) is X


@pytest.mark.parametrize(
    ("batch", "what"), [((X, Y, Y), "tuple of 3"), ([X], "list of 1"), (X, "Tensor"), (None, "None")]
)
def test_what_is_no_batch_is_refused(batch: Any, what: str) -> None:
    with pytest.raises(LabelError, match=rf"received a batch of type .*{what}.*; expected a mapping .*or a pair"):
        split_labels(batch)


@pytest.mark.parametrize(
    "output",
    [
        Scored(X),
        {"a": Scored(score=torch.ones(1, dtype=torch.long), more=[Scored(X)])},
        torch.distributions.Independent(torch.distributions.Laplace(X, 1), 1),
    ],
)
def test_outputs_are_found_in_objects(output: Any) -> None:
    assert any(each is X or torch.equal(each, X) for each in outputs_of(output))


def test_an_object_beside_a_tensor_is_no_output() -> None:
    assert outputs_of({"hidden": X, "cache": Scored(Y)}) == [X]


def test_objects_that_hold_themselves_come_to_an_end() -> None:
    output = Scored(X)
    output.more = [output]
    assert outputs_of(output) == [X]


def test_fields_without_a_name_are_told_by_number() -> None:
    with pytest.raises(LabelError, match=r"its tensors are: 7, 9"):
        logits_of({7: X, 9: X})


@pytest.mark.parametrize("output", [(X, None), None, {"scores": X}, Output(None)])  # type: ignore[arg-type]
def test_an_output_without_logits_is_refused(output: Any) -> None:
    kind = type(output).__name__
    with pytest.raises(LabelError, match=rf"returned {kind} without logits; .*expected a tensor.*wrap the module"):
        logits_of(output)
