"""Modules that draw random numbers in eval mode too are nested, started and ordered as any others."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, distributions, nn
from torch.nn import functional as F

import matta
from matta.errors import ProbeError
from matta.nesting.draws import WithoutChance

X, Y = torch.randn(6, 5, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 0, 1, 1, 0])


class Latent(nn.Module):
    """A code drawn from two halves of what one layer returns, which declare themselves by what is drawn."""

    def __init__(self, draw: Callable[[Tensor, Tensor], Tensor], size: int) -> None:
        super().__init__()
        self.draw, self.up, self.both, self.down = draw, nn.Linear(5, 4), nn.Linear(4, 2 * size), nn.Linear(size, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.draw(*self.both(self.up(x).tanh()).chunk(2, -1)))


DRAWS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "like": lambda a, b: a + torch.randn_like(b) * (b / 2).exp(),
    "of a shape": lambda a, b: a + torch.randn(a.shape) * (b / 2).exp(),
    "uniform": lambda a, b: a + torch.rand_like(b) * b + torch.empty_like(b).uniform_(-1, 3) * b,
    "normal": lambda a, b: torch.normal(a, (b / 2).exp()),
    "in place": lambda a, b: a + torch.empty_like(b).normal_(1, 2) * b,
    "a distribution": lambda a, b: distributions.Normal(a, (b / 2).exp()).rsample(),
    "Bernoulli": lambda a, b: distributions.Bernoulli(logits=a).sample() * b,
    "Poisson": lambda a, b: torch.poisson(a.exp()) + b,
    "Gumbel": lambda a, b: F.gumbel_softmax(a) * b,
    "dropout that stays on": lambda a, b: F.dropout(a * b, 0.3, training=True),
    "in some order": lambda a, b: a[torch.randperm(len(a))] + b,
    "a sample of rows": lambda a, b: (a + b)[torch.multinomial(torch.ones(len(a)), 3)].mean(0, keepdim=True),
}


@pytest.mark.parametrize("name", DRAWS)
def test_a_module_that_draws_is_nested(name: str) -> None:
    torch.manual_seed(0)
    student, ta = Latent(DRAWS[name], 3), Latent(DRAWS[name], 7)
    nested = matta.nest(student, ta, example=(X, None))
    assert nested.plan.placements["both.weight"].axes[0].positions() == [0, 1, 2, 7, 8, 9]


@pytest.mark.parametrize("name", ["like", "normal", "Bernoulli", "Gumbel"])
def test_a_wrong_cut_is_found_all_the_same(name: str) -> None:
    torch.manual_seed(0)
    student, ta = Latent(DRAWS[name], 3), Latent(DRAWS[name], 7)
    with pytest.raises(ProbeError, match="the TA differs from the Student"):
        matta.nest(student, ta, example=(X, None), layouts={"both.*": 1})


def noisy(size: int) -> nn.Module:
    class Noise(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + torch.randn_like(x)

    return nn.Sequential(nn.Linear(5, size), Noise(), nn.Linear(size, 2))


def test_a_module_that_draws_is_ordered_and_starts_a_larger_one() -> None:
    torch.manual_seed(0)
    student = noisy(4)
    with torch.no_grad():
        student[2].weight[:, 0] = 0  # the first channel matters least
    ordered = matta.order(student, example=(X, Y), importance="magnitude")
    nested = matta.nest(ordered, noisy(8), example=(X, Y), warm_start=True)
    assert not torch.equal(ordered[0].weight, student[0].weight)
    with WithoutChance():
        torch.testing.assert_close(ordered(X), student(X))
        torch.testing.assert_close(nested.ta(X), student(X))


def test_no_generator_moves_on() -> None:
    own = torch.Generator().manual_seed(1)
    states = torch.get_rng_state(), own.get_state()
    with WithoutChance():
        first = torch.randn(3, generator=own), torch.randint(9, (4,)), torch.rand(2)
        assert torch.equal(torch.randint(9, (4,)), first[1])
    assert first[0].tolist() == [*first[2].tolist(), 0.5]
    assert torch.equal(torch.get_rng_state(), states[0])
    assert torch.equal(own.get_state(), states[1])
