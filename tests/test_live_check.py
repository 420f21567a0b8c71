"""A live Student computes what a plain one with its weights computes, gradients included, or is refused."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import matta
from matta.errors import NestingError
from matta.nesting.copying import contents

X = torch.randn(4, 5, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """Two layers that `first` may read in ways of its own."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.entry, self.head = nn.Linear(5, width), nn.Linear(width, 3)

    def first(self, x: Tensor) -> Tensor:
        return self.entry(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.first(x).relu())


class InAnObject(Net):
    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.kept = SimpleNamespace(inside=[{"weight": self.entry.weight}])

    def first(self, x: Tensor) -> Tensor:
        return F.linear(x, self.kept.inside[0]["weight"])


class InAClosure(Net):
    def __init__(self, width: int) -> None:
        super().__init__(width)
        weight = self.entry.weight
        self.kept = lambda x: F.linear(x, weight)

    def first(self, x: Tensor) -> Tensor:
        return self.kept(x)


class PastTheAttribute(Net):
    def first(self, x: Tensor) -> Tensor:
        return F.linear(x, self.entry.weight, self.entry._parameters["bias"])


class PastTheAttributeAndFails(Net):
    def first(self, x: Tensor) -> Tensor:
        return x @ self.entry._parameters["weight"].T  # type: ignore[union-attr]


class AsksForItsKind(Net):
    def first(self, x: Tensor) -> Tensor:
        return x @ self.entry.weight.T * (2 if isinstance(self.entry.weight, nn.Parameter) else 1)


class WritesToItsWeights(Net):
    def first(self, x: Tensor) -> Tensor:
        self.entry.weight.data = F.normalize(self.entry.weight.data)
        return self.entry(x)


class Penalised(Net):
    """As rankers that keep parameters for a penalty; `share` of it is in what training returns."""

    share = 0.0

    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.penalised = [([("entry", self.entry.weight)], 0.1), ([self.head.weight], 0.2)]
        self.optimizer = torch.optim.SGD(self.parameters(), 0.1)

    def forward(self, x: Tensor) -> Tensor:
        penalty = self.penalised[0][0][0][1].square().sum() if self.training else 0.0  # type: ignore[index, union-attr]
        return super().forward(x) + self.share * penalty


class PenalisedInTraining(Penalised):
    share = 1.0


@pytest.mark.parametrize("kind", [InAnObject, InAClosure, PenalisedInTraining])
def test_weights_that_are_read_from_elsewhere_are_refused(kind: type[Net]) -> None:
    with pytest.raises(NestingError, match="the Student keeps .*weight in '.*' too.* pass example=batch"):
        matta.nest(kind(4), kind(7))
    with pytest.raises(
        NestingError, match=r"something else than a plain one .*entry.weight is kept elsewhere too \(in"
    ):
        matta.nest(kind(4), kind(7), example=(X, None))


def test_weights_that_are_kept_elsewhere_and_not_read_are_nested_with_an_example() -> None:
    nested = matta.nest(Penalised(4), Penalised(7), example=(X, None))
    expected = Penalised(4)
    expected.load_state_dict(matta.extract(nested).state_dict())
    torch.testing.assert_close(nested.student(X), expected(X), rtol=0, atol=0)


def test_a_module_that_has_its_optimizer_is_nested_without_an_example() -> None:
    student, ta = Net(4), Net(7)
    student.optimizer = torch.optim.SGD(student.parameters(), 0.1)
    assert matta.nest(student, ta).student.entry.weight.shape == (4, 5)


@pytest.mark.parametrize("kind", [PastTheAttribute, AsksForItsKind, WritesToItsWeights])
@pytest.mark.parametrize("probe", [True, False])
def test_a_live_student_that_computes_something_else_is_refused(kind: type[Net], probe: bool) -> None:
    torch.manual_seed(0)
    with pytest.raises(
        NestingError, match=r"computes something else than a plain one .*expected a forward that reads par"
    ):
        matta.nest(kind(4), kind(7), example=(X, None), probe=probe)


def test_a_live_student_that_fails_is_refused() -> None:
    kind = PastTheAttributeAndFails
    with pytest.raises(
        NestingError, match=r"the live Student fails on the example with AttributeError.*where a plain one"
    ):
        matta.nest(kind(4), kind(7), example=(X, None))


class OwnState(Net):
    def __getstate__(self) -> dict[str, Any]:
        state = {**self.__dict__, "cache": None}
        if type(self) is not OwnState:
            raise AttributeError("not a class of a module")
        return state


def test_a_live_student_that_cannot_be_copied_is_refused() -> None:
    with pytest.raises(NestingError, match=r"a live OwnState cannot be copied, so that nothing could be extracted"):
        matta.nest(OwnState(4), OwnState(7), example=(X, None))


class Restored(Net):
    """A module that leaves a part of its state out of copies and makes it again."""

    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.act: Callable[[Tensor], Tensor] = lambda x: 2 * x

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "act"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.act = lambda x: 2 * x

    def first(self, x: Tensor) -> Tensor:
        return self.act(self.entry(x))


class Renormalised(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(9, width, max_norm=1.0), nn.Linear(width, 3)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.table(ids))


class Adjoint(torch.autograd.Function):
    """Steps of an equation; the backward runs the module again and asks for gradients by what it was given."""

    @staticmethod
    def forward(ctx: Any, module: nn.Module, x: Tensor, *parameters: Tensor) -> Tensor:
        ctx.module = module
        ctx.save_for_backward(x, *parameters)
        return module(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        x, *parameters = ctx.saved_tensors
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            made = torch.autograd.grad(ctx.module(x), (x, *parameters), gradient, allow_unused=True)
        return None, *made


class WithAdjoint(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.entry, self.field, self.head = nn.Linear(5, width), nn.Linear(width, width), nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(Adjoint.apply(self.field, self.entry(x), *self.field.parameters()).tanh())


class InnerStep(nn.Module):
    """A gradient step within the forward, on weights collected by `named_parameters`."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(5, width), nn.Tanh(), nn.Linear(width, 3))

    def forward(self, x: Tensor) -> Tensor:
        weights = dict(self.net.named_parameters())
        with torch.enable_grad():
            loss = torch.func.functional_call(self.net, weights, (x,)).pow(2).mean()
            slopes = torch.autograd.grad(loss, list(weights.values()), create_graph=self.training)
        moved = {name: each - 0.1 * slope for (name, each), slope in zip(weights.items(), slopes, strict=True)}
        return torch.func.functional_call(self.net, moved, (x,))


@pytest.mark.parametrize("kind", [Net, Restored, WithAdjoint, InnerStep])
def test_gradients_of_a_live_student_are_those_of_a_plain_one(kind: Callable[[int], nn.Module]) -> None:
    torch.manual_seed(0)
    nested = matta.nest(kind(4), kind(7), example=(X, None))
    plain = matta.extract(nested)
    for module in (nested.student.train(), plain.train()):
        module(X).pow(2).mean().backward()
    sources, compared = nested.sources(), 0
    for name, parameter in plain.named_parameters():
        owner = nested.ta.get_parameter(nested.plan.placements[name].ta)
        found = owner.grad
        for dim, axis in enumerate(sources[name].axes):
            found = found.index_select(dim, torch.tensor(axis.positions()))  # type: ignore[union-attr]
        torch.testing.assert_close(found, parameter.grad)
        compared += 1
    assert compared >= 4


class Endless(tuple[int, ...]):
    def __len__(self) -> int:
        raise NotImplementedError


class WithASequence(Net):
    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.kinds = Endless((1, 2))


@pytest.mark.parametrize("kind", [Restored, InnerStep, WithASequence])
def test_what_is_extracted_computes_the_same_without_gradients(kind: Callable[[int], nn.Module]) -> None:
    nested = matta.nest(kind(4), kind(7), example=(X, None))
    with torch.no_grad():
        torch.testing.assert_close(matta.extract(nested).eval()(X), nested.student.eval()(X))


def test_a_table_that_renormalises_what_it_looks_up_is_no_difference() -> None:
    assert matta.nest(Renormalised(4), Renormalised(7), example=(torch.arange(5), None)).plan.placements


class DrawsAGamma(Net):
    def first(self, x: Tensor) -> Tensor:
        return self.entry(x) * torch.distributions.Beta(2.0, 3.0).sample()


class DrawsElsewhere(Net):
    def first(self, x: Tensor) -> Tensor:
        return self.entry(x) * random.random()


@pytest.mark.parametrize("kind", [DrawsAGamma, DrawsElsewhere])
def test_random_numbers_are_no_difference(kind: type[Net]) -> None:
    state = torch.get_rng_state()
    assert matta.nest(kind(4), kind(7), example=(X, None), probe=False).plan.placements
    torch.set_rng_state(state)
    kind(4), kind(7)
    expected = torch.rand(1)
    torch.set_rng_state(state)
    matta.nest(kind(4), kind(7), example=(X, None), probe=False)
    assert torch.equal(torch.rand(1), expected)


def test_a_student_on_the_meta_device_is_not_run() -> None:
    with torch.device("meta"):
        pair = Net(4), Net(7)
    assert matta.nest(*pair, example=(X.to("meta"), None), probe=False).plan.placements


def test_contents_that_hold_themselves_come_to_an_end() -> None:
    value: list[Any] = [1]
    value.append({"again": value})
    found: Iterable[Any] = contents(value)
    assert list(found) == [1]
