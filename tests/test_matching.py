"""One traced model over another: heads, groups and parts where the two are split into different factors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import matta
from matta.sizes.submodels import layer_names, sizes_between


class Fused(nn.Module):
    """Attention from one matrix, whose biases are apart: the heads of a Student may be one, those of its TA several."""

    def __init__(self, dim: int, heads: int, *, splits_first: bool = False, scaled: bool = True) -> None:
        super().__init__()
        self.heads, self.splits_first, self.scaled = heads, splits_first, scaled
        self.enter, self.qkv = nn.Linear(5, dim), nn.Linear(dim, 3 * dim, bias=False)
        self.q_bias, self.v_bias = nn.Parameter(torch.randn(dim)), nn.Parameter(torch.randn(dim))
        self.register_buffer("k_bias", torch.zeros(dim))
        self.out, self.head = nn.Linear(dim, dim), nn.Linear(dim, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        size, length, dim = x.shape
        made = F.linear(x, self.qkv.weight, torch.cat([self.q_bias, self.k_bias, self.v_bias]))
        if self.splits_first:
            q, k, v = (each.view(size, length, self.heads, -1).transpose(1, 2) for each in made.split(dim, 2))
        else:
            q, k, v = made.view(size, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        scores = (q @ k.mT) * (q.shape[-1] ** -0.5 if self.scaled else 1.0)
        return self.head(x + self.out((scores.softmax(-1) @ v).transpose(1, 2).reshape(size, length, dim)))


@pytest.mark.parametrize("splits_first", [False, True])
@pytest.mark.parametrize(
    ("student", "ta", "rows"),
    [
        ((4, 1), (8, 2), [0, 1, 2, 3]),
        ((4, 1), (16, 2), [0, 1, 2, 3]),
        ((4, 2), (16, 4), [0, 1, 4, 5]),
        ((4, 2), (8, 2), [0, 1, 4, 5]),
        ((4, 1), (8, 1), [0, 1, 2, 3]),
    ],
)
def test_heads_of_one_matrix_lie_in_those_of_the_ta(
    student: tuple[int, int], ta: tuple[int, int], rows: list[int], splits_first: bool
) -> None:
    example = torch.randn(2, 4, 5, generator=torch.Generator().manual_seed(0)), None
    for probe in (True, False):
        pair = [Fused(*sizes, splits_first=splits_first) for sizes in (student, ta)]
        plan = matta.nest(*pair, example=example, probe=probe).plan
        fused = [part * ta[0] + row for part in range(3) for row in rows]
        assert plan.placements["qkv.weight"].axes[0].positions() == fused
        assert plan.placements["q_bias"].axes[0].positions() == rows
        assert plan.placements["out.weight"].axes[1].positions() == rows


class FusedGroups(nn.Module):
    """Attention of groups of query heads, each with one key head, from one matrix; heads of two channels."""

    def __init__(self, groups: int, queries: int) -> None:
        super().__init__()
        self.groups, self.queries = groups, queries
        self.sizes = [2 * groups * queries, 2 * groups, 2 * groups]
        self.qkv, self.out = nn.Linear(5, sum(self.sizes), bias=False), nn.Linear(self.sizes[0], 3)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (each.unflatten(-1, (-1, 2)).transpose(1, 2) for each in self.qkv(x).split(self.sizes, -1))
        k, v = (each.repeat_interleave(self.queries, 1) for each in (k, v))
        return self.out(((q @ k.mT).softmax(-1) @ v).transpose(1, 2).flatten(2))


@pytest.mark.parametrize(
    ("student", "ta", "heads"),
    [
        ((1, 2), (2, 2), [0, 1]),
        ((1, 2), (2, 4), [0, 1]),
        ((1, 2), (1, 4), [0, 1]),
        ((1, 3), (3, 3), [0, 1, 2]),
        ((2, 2), (4, 2), [0, 1, 2, 3]),
        ((2, 2), (2, 3), [0, 1, 3, 4]),
    ],
)
def test_query_heads_of_one_matrix_stay_with_their_key_head(
    student: tuple[int, int], ta: tuple[int, int], heads: list[int]
) -> None:
    torch.manual_seed(0)
    plan = matta.nest(FusedGroups(*student), FusedGroups(*ta), example=(torch.randn(2, 4, 5), None)).plan
    queries = [2 * head + i for head in heads for i in range(2)]
    keys, width = [*range(2 * student[0])], 2 * ta[0] * ta[1]
    fused = [*queries, *(width + each for each in keys), *(width + 2 * ta[0] + each for each in keys)]
    assert plan.placements["qkv.weight"].axes[0].positions() == fused
    assert plan.placements["out.weight"].axes[1].positions() == queries


def test_a_head_of_images_that_code_picks_from_three_parts_is_followed() -> None:
    class Images(nn.Module):
        def __init__(self, channels: int, heads: int) -> None:
            super().__init__()
            self.heads, self.enter = heads, nn.Conv2d(3, channels, 1)
            self.qkv, self.head = nn.Conv2d(channels, 3 * channels, 1), nn.Conv2d(channels, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            x = self.enter(x)
            q, k, v = self.qkv(x).flatten(2).unflatten(1, (3 * self.heads, -1)).unflatten(1, (3, -1)).unbind(1)
            made = v @ (q.mT @ k).softmax(-1).mT
            return self.head(x + made.reshape(x.shape))

    plan = matta.nest(Images(4, 1), Images(8, 2), example=(torch.randn(2, 3, 3, 3), None)).plan
    assert plan.placements["qkv.weight"].axes[0].positions() == [0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19]


def test_single_channels_of_groups_lie_in_wider_groups() -> None:
    def model(width: int) -> nn.Module:
        return nn.Sequential(
            nn.Conv1d(3, 4 * width, 1), nn.Conv1d(4 * width, 4 * width, 1, groups=4), nn.Conv1d(4 * width, 2, 1)
        )

    plan = matta.nest(model(1), model(3), example=(torch.randn(2, 3, 5), None)).plan
    assert plan.placements["0.weight"].axes[0].positions() == [0, 3, 6, 9]
    assert plan.placements["2.weight"].axes[1].positions() == [0, 3, 6, 9]


class Timed(nn.Module):
    """A layer over sines and cosines of times, whose frequencies are made in the forward, or kept in an attribute."""

    def __init__(self, dim: int, *, keeps: bool) -> None:
        super().__init__()
        self.dim = dim
        self.kept = self.speeds() if keeps else None
        self.up, self.down = nn.Linear(dim, 3 * dim), nn.Linear(3 * dim, 2)

    def speeds(self) -> Tensor:
        return torch.exp(-torch.arange(self.dim // 2) * 9.0 / (self.dim // 2))

    def forward(self, times: Tensor) -> Tensor:
        angles = times[:, None] * (self.speeds() if self.kept is None else self.kept)
        return self.down(self.up(torch.cat([angles.sin(), angles.cos()], -1)).relu())


@pytest.mark.parametrize("keeps", [False, True])
def test_sines_and_cosines_of_one_frequency_are_parts_of_an_axis(keeps: bool) -> None:
    nested = matta.nest(Timed(4, keeps=keeps), Timed(8, keeps=keeps), example=(torch.tensor([1.0, 5.0, 30.0]), None))
    assert nested.plan.placements["up.weight"].axes[1].positions() == [0, 1, 4, 5]
    assert sizes_between(nested) == []  # how many frequencies there are is a number of the class


def test_an_input_beside_what_grows_is_no_width_of_its_own() -> None:
    class Ranker(nn.Module):
        def __init__(self, dim: int, width: int) -> None:
            super().__init__()
            self.items = nn.Embedding(7, dim)
            self.mlp = nn.Sequential(nn.Linear(dim + 3, width), nn.ReLU(), nn.Linear(width, 1))

        def forward(self, ids: Tensor, context: Tensor) -> Tensor:
            return self.mlp(torch.cat([self.items(ids), context], -1))

    example = (torch.arange(4), torch.randn(4, 3)), None
    assert layer_names(matta.nest(Ranker(4, 8), Ranker(6, 12), example=example)) == ("items", "mlp.0")


class Placed(nn.Module):
    """Positions in a table of sines among the attributes, for one or several widths."""

    def __init__(self, dim: int, kind: type[list[Tensor]] | None) -> None:
        super().__init__()
        self.embedding, self.norm, self.head = nn.Embedding(7, dim), nn.LayerNorm(dim), nn.Linear(dim, 2)
        angles = torch.arange(9)[:, None] / 100 ** (torch.arange(dim) / dim)
        self.table = angles.sin() if kind is None else kind([angles.sin()])

    def forward(self, ids: Tensor) -> Tensor:
        table = self.table if isinstance(self.table, Tensor) else self.table[0]
        return self.head(self.norm(self.embedding(ids) + table[: ids.shape[1]]))


@pytest.mark.parametrize("kind", [None, list, tuple])
def test_tables_among_the_attributes_are_the_students(kind: Any) -> None:
    example = torch.arange(6).view(2, 3), None
    nested = matta.nest(Placed(4, kind), Placed(6, kind), example=example)
    assert torch.equal(matta.extract(nested).eval()(example[0]), nested.student.eval()(example[0]))
    found = matta.find_order(Placed(6, kind), example=example, importance="magnitude")
    assert any(each.reason.startswith("the buffer table") for each in found.left)


def test_what_ranges_alone_go_through_is_not_lost() -> None:
    class Turned(nn.Module):
        """Complex rotations that an operator makes of a range which the trace has no rule for."""

        def __init__(self, dim: int) -> None:
            super().__init__()
            self.enter, self.head = nn.Linear(5, dim), nn.Linear(dim, 2)

        def forward(self, x: Tensor) -> Tensor:
            x = self.enter(x)
            angle = torch.arange(x.shape[-1] // 2) / 7.0
            turned = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous()) * torch.polar(torch.ones(()), angle)
            return self.head(torch.view_as_real(turned).flatten(-2).abs())

    plan = matta.nest(Turned(4), Turned(8), example=(torch.ones(2, 5), None)).plan
    assert {each.note for each in plan.placements.values()} == {""}
