"""Axes that sizes alone cannot place are refused, with a declaration that mends it."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import matta
from matta.errors import NestingError
from matta.nesting.ambiguity import growths
from matta.nesting.layout import Axis, Layout


class Fused(nn.Module):
    """Query, key and value in one matrix."""

    def __init__(self, width: int, heads: int | None = None) -> None:
        super().__init__()
        if heads is not None:
            self.num_heads = heads
        self.qkv, self.out = nn.Linear(5, 3 * width), nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        return self.out((q @ k.mT).softmax(-1) @ v)


class Halves(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(5, 2 * width), nn.Linear(width, 5)


class Joined(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.one, self.two, self.head = nn.Linear(5, width), nn.Linear(5, width), nn.Linear(2 * width + 3, 1)


class Flattened(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.convolution, self.head = nn.Conv1d(1, width, 3), nn.Linear(width * 3, 1)


AMBIGUOUS = {
    "qkv": (Fused, "qkv.weight", "output axis 0", {"qkv.weight": 3}),
    "glu": (Halves, "up.weight", "output axis 0", {"up.weight": 2}),
    "concat": (
        Joined,
        "one.weight",
        "output axis 0",
        {"*.weight": 1, "head.weight": matta.Layout.concat([(4, 6), (4, 6), (3, 3)], axis=1)},
    ),
    "flatten": (Flattened, "convolution.weight", "output axis 0", {"convolution.weight": 1, "head.weight": 1}),
}


@pytest.mark.parametrize("name", AMBIGUOUS)
def test_an_axis_that_nothing_explains_is_refused_with_what_to_declare(name: str) -> None:
    make, parameter, where, _ = AMBIGUOUS[name]
    message = rf"{parameter} grows from \d+ to \d+ on its {where}, but no .*; declare .*layouts=\{{.*or 1 .*example="
    with pytest.raises(NestingError, match=message):
        matta.nest(make(4), make(6))


@pytest.mark.parametrize("name", AMBIGUOUS)
def test_a_declaration_is_taken(name: str) -> None:
    make, _, _, layouts = AMBIGUOUS[name]
    declared = dict(reversed(layouts.items())) if isinstance(layouts, dict) else layouts
    assert matta.nest(make(4), make(6), layouts=declared).plan.placements


def test_the_suggestion_runs_as_it_stands() -> None:
    with pytest.raises(NestingError) as caught:
        matta.nest(Fused(4), Fused(6))
    found = re.search(r"layouts=(\{.*?\})", str(caught.value))
    assert found
    nested = matta.nest(Fused(4), Fused(6), layouts=eval(found[1], {"matta": matta}))
    matta.probe(nested, (torch.randn(2, 3, 5), None))


@pytest.mark.parametrize("make", [Fused, Halves, Joined])
def test_the_input_is_named_where_it_is_the_input(make: Any) -> None:
    class Only(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.head = nn.Linear(width, 1)

    message = r"head.weight grows from 4 to 6 on its input axis 1, but no output .*Layout.concat\(\[\(student, ta\)"
    with pytest.raises(NestingError, match=message):
        matta.nest(Only(4), Only(6))


def test_plain_towers_and_equal_sizes_need_nothing() -> None:
    tower = [nn.Sequential(nn.Linear(5, w), nn.Linear(w, 2 * w), nn.Linear(2 * w, 3)) for w in (4, 6)]
    assert matta.nest(*tower).plan.placements
    assert matta.nest(Fused(4), Fused(4)).plan.placements


class Attention(nn.Module):
    """Separate projections; only the number of heads says how they are split."""

    def __init__(self, heads: int, dim: int) -> None:
        super().__init__()
        self.num_heads = heads
        for name in ("query", "key", "value"):
            self.add_module(name, nn.Linear(5, heads * dim))
        self.out = nn.Linear(heads * dim, 5)


def test_wider_heads_are_refused_and_more_heads_are_not() -> None:
    assert matta.nest(Attention(2, 3), Attention(4, 3)).plan.placements
    with pytest.raises(NestingError, match=r"query.weight grows from 6 to 10 on axis 0, in a module with 2 heads"):
        matta.nest(Attention(2, 3), Attention(2, 5))


def test_the_suggestion_for_wider_heads_runs_as_it_stands() -> None:
    with pytest.raises(NestingError) as caught:
        matta.nest(Attention(2, 3), Attention(2, 5))
    found = re.search(r"layouts=(\{.*?\)\})", str(caught.value))
    assert found
    layouts = eval(found[1].replace("query", "*"), {"matta": matta})
    out = {"out.weight": matta.Layout.factors([(2, 2), (3, 5)], axis=1), "out.bias": 1}
    nested = matta.nest(Attention(2, 3), Attention(2, 5), layouts={**out, **layouts})
    expected = torch.arange(10).reshape(2, 5)[:, :3].ravel().tolist()
    assert nested.plan.placements["query.weight"].axes[0].positions() == expected
    assert nested.plan.placements["query.bias"].axes[0].positions() == expected
    assert nested.plan.placements["out.weight"].axes[1].positions() == expected


class Grouped(nn.Module):
    def __init__(self, width: int, groups: int) -> None:
        super().__init__()
        self.first, self.second = nn.Conv1d(5, width, 1), nn.Conv1d(width, width, 1, groups=groups)
        self.head = nn.Linear(width, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(self.first(x)).mean(2))


def test_wider_groups_are_refused_and_more_groups_are_not() -> None:
    example = torch.randn(2, 5, 3), None
    of_head = {"head.weight": matta.Layout.factors([(2, 2), (2, 4)], axis=1), "head.bias": 1}
    for groups in (2, 1):
        with pytest.raises(NestingError, match=r"second.weight is of a convolution of 2 groups, from 2 channels"):
            matta.nest(Grouped(4, 2), Grouped(8, groups))
    matta.probe(matta.nest(Grouped(4, 2), Grouped(8, 2), layouts={**of_head, "*": 2}), example)
    matta.probe(matta.nest(Grouped(4, 2), Grouped(8, 4)), example)
    matta.probe(matta.nest(Grouped(4, 1), Grouped(8, 2)), example)


def test_growths_are_what_grows_in_each_segment() -> None:
    assert growths(Axis.plain(3, 3)) == []
    assert growths(Axis.plain(3, 5)) == [((3, 5),)]
    assert growths(Layout.equal(3).resolve(0, 6, 9)) == [((2, 3),)]
    assert growths(Layout.concat([(2, 4), (5, 5), (2, 3)]).resolve(0, 9, 12)) == [((2, 4),), ((2, 3),)]


def tower(width: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, width), nn.ReLU(), nn.Linear(width, 1))


def test_a_private_head_still_tells_what_its_input_is() -> None:
    nested = matta.nest(tower(4), tower(6), private=["2.*"])
    torch.testing.assert_close(nested.student[0].weight, nested.ta[0].weight[:4], rtol=0, atol=0)
    assert nested.plan.private == ("2.weight", "2.bias")


def test_a_private_parameter_is_no_witness_for_a_fused_one() -> None:
    with pytest.raises(NestingError, match="qkv.weight grows from 12 to 18 on its output axis 0"):
        matta.nest(Fused(4), Fused(6), private=["out.*"])
