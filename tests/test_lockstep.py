"""What a wider model makes of silent channels by design hides no layout, and is none itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import matta
from matta.errors import NestingError, ProbeError
from matta.nesting.channels import Steps
from matta.nesting.lockstep import Recording, recorded
from matta.sizes.submodels import sizes_between

X = torch.randn(4, 5, generator=torch.Generator().manual_seed(0))


class Through(nn.Module):
    """A function of so many channels between two layers."""

    def __init__(self, function: Callable[[Tensor], Tensor], size: int, outputs: int | None = None) -> None:
        super().__init__()
        self.function, self.up, self.down = function, nn.Linear(5, size), nn.Linear(outputs or size, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.function(self.up(x)))


WHOLE: dict[str, Callable[[Tensor], Tensor]] = {
    "softmax": lambda x: x.softmax(-1),
    "log softmax": lambda x: x.log_softmax(-1),
    "the best alone": lambda x: x * (x == x.amax(-1, keepdim=True)),
    "the best two": lambda x: torch.zeros_like(x).scatter(-1, *reversed(x.topk(2, -1))),
    "a norm without weights": lambda x: F.layer_norm(x, x.shape[-1:]),
    "groups": lambda x: F.group_norm(x, 2),
    "standardised": lambda x: (x - x.mean(-1, keepdim=True)) / (x.std(-1, keepdim=True) + 1),
    "ones of zeros": lambda x: x / (F.elu(x) + 1).sum(-1, keepdim=True),
    "in place": lambda x: x.clone().mul_(x.shape[-1] ** 0.5),
    "filled": lambda x: x * torch.full((), x.shape[-1] ** 0.5) + torch.full_like(x, x.shape[-1]).sigmoid(),
}


@pytest.mark.parametrize("name", WHOLE)
def test_the_silent_channels_are_out_of_sight(name: str) -> None:
    nested = matta.nest(Through(WHOLE[name], 4), Through(WHOLE[name], 8), example=(X, None))
    assert nested.plan.placements["up.weight"].axes[0].positions() == [0, 1, 2, 3]
    expected = Through(WHOLE[name], 4)
    expected.load_state_dict(matta.extract(nested).state_dict())
    torch.testing.assert_close(nested.student(X), expected(X), rtol=0, atol=0)


@pytest.mark.parametrize("name", ["softmax", "ones of zeros", "groups"])
def test_a_wrong_cut_is_found_all_the_same(name: str) -> None:
    with pytest.raises(ProbeError, match="the TA differs from the Student"):
        matta.nest(Through(WHOLE[name], 4), Through(WHOLE[name], 8), example=(X, None), layouts={"up.*": 2})


def test_places_among_the_students_are_places_among_all() -> None:
    """The index of the best channel picks a row of a table that grows as the channels do."""

    class Coded(nn.Module):
        def __init__(self, num_codes: int) -> None:
            super().__init__()
            self.score, self.codes = nn.Linear(5, num_codes), nn.Embedding(num_codes, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.codes(self.score(x).argmin(-1))

    nested = matta.nest(Coded(4), Coded(7), example=(X, None))
    assert matta.extract(nested).codes.weight.shape == (4, 3)


def test_steps_are_counted_by_module_and_call() -> None:
    steps = Steps()
    steps.enter("a")
    made = [steps.next(name) for name in ("mm", "clone", "mm")]
    assert made == [(("a", 0), "mm", 1), (("a", 0), "clone", 1), (("a", 0), "mm", 2)]
    assert steps.leave() == ("a", 0)
    steps.enter("a")
    assert steps.next("mm") == (("a", 1), "mm", 1)


class Standardised(nn.Module):
    """A layer whose weights are standardised over its inputs by the operator of a batch norm."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(5, width), nn.Linear(width, width)
        self.last = nn.Linear(width, 2)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.second.weight
        weight = F.batch_norm(weight[None], None, None, training=True, momentum=0.0)[0]
        return self.last(F.linear(self.first(x).relu(), weight, self.second.bias).relu())


def test_statistics_of_weights_are_the_students() -> None:
    assert matta.nest(Standardised(4), Standardised(7), example=(X, None)).plan.placements


class GatedBetweenNorms(nn.Module):
    """A softmax over all channels between two norms over them."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.gate, self.last = nn.Linear(5, width), nn.Linear(width, width), nn.Linear(width, 2)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.norms[0](self.first(x))
        return self.last(self.norms[1](x + self.gate(x).softmax(-1)))


def test_norms_and_operators_over_all_channels_go_together() -> None:
    assert matta.nest(GatedBetweenNorms(4), GatedBetweenNorms(7), example=(X, None)).plan.placements


class ChannelsSecond(nn.LayerNorm):
    """A layer norm of images, perhaps with an activation of its own."""

    def __init__(self, width: int, activation: Callable[[], nn.Module]) -> None:
        super().__init__(width)
        self.activation = activation()

    def forward(self, x: Tensor) -> Tensor:
        normed = F.layer_norm(x.movedim(1, -1), self.normalized_shape, self.weight, self.bias).movedim(-1, 1)
        return self.activation(normed) if self.activation else normed


@pytest.mark.parametrize("activation", [nn.ReLU, lambda: None])
def test_a_norm_sees_the_students_channels_beside_an_axis_that_is_as_long(activation: Any) -> None:
    def model(width: int) -> nn.Module:
        return nn.Sequential(nn.Conv2d(3, width, 1), ChannelsSecond(width, activation), nn.Conv2d(width, 2, 1))

    image = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(0))
    plan = matta.nest(model(4), model(6), example=(image, None)).plan
    assert {each.note for each in plan.placements.values()} == {""}


def test_a_run_is_recorded_without_being_changed() -> None:
    module = Through(WHOLE["softmax"], 4).eval()
    with torch.no_grad(), recorded(module) as made:
        found = module(X)
    assert isinstance(made, Recording)
    assert torch.equal(found, module(X))
    assert [name for name, _ in made.outputs] == ["up", "down"]


class RunFromOutside(nn.Module):
    """Blocks of layers that the model runs, and whose outputs it cuts by numbers of its own."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width
        self.blocks = nn.ModuleList(
            nn.ModuleDict({"up": nn.Linear(5, 2 * width), "down": nn.Linear(width, 5)}) for _ in range(2)
        )

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            gate, value = block["up"](x).split([self.width, self.width], -1)
            x = x + block["down"](gate.sigmoid() * value)
        return x


def test_blocks_that_code_outside_of_them_cuts_have_one_width() -> None:
    nested = matta.nest(RunFromOutside(3), RunFromOutside(5), example=(X, None))
    assert matta.layer_names(nested) == ("hidden",)
    assert sizes_between(nested) == []


def test_all_lists_of_other_lengths_are_named_at_once() -> None:
    def model(depth: int) -> nn.Module:
        return nn.ModuleDict(
            {name: nn.ModuleList(nn.Linear(2, 2) for _ in range(depth)) for name in ("encoder", "decoder")}
        )

    remedy = r"layers=\{'encoder': 'first', 'decoder': 'first'\}, or 'last'"
    with pytest.raises(NestingError, match=f"encoder has 1 blocks .* decoder has 1 blocks .*{remedy}"):
        matta.nest(model(1), model(2))
    assert matta.nest(model(1), model(2), layers={"encoder": "first", "decoder": "first"}).plan.layers


def test_a_live_student_runs_under_vmap() -> None:
    tower = Through(torch.relu, 4), Through(torch.relu, 6)
    student = matta.nest(*tower, example=(X, None)).student.eval()
    with torch.no_grad():
        torch.testing.assert_close(torch.vmap(student)(X), student(X))
