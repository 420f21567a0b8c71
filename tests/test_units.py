"""Which layers of a nesting can be wide or narrow each for itself, in models of many shapes."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import matta
from matta.sizes.units import HIDDEN, block_lists, find_units


def _tower(width: int, *, depth: int = 2, norm: bool = False) -> nn.Sequential:
    def layers() -> Iterator[nn.Module]:
        yield nn.Linear(3, width)
        for _ in range(depth):
            if norm:
                yield nn.LayerNorm(width)
            yield nn.ReLU()
            yield nn.Linear(width, width)
        yield nn.Linear(width, 2)

    return nn.Sequential(*layers())


class Ranker(nn.Module):
    def __init__(self, width: int, embedding: int) -> None:
        super().__init__()
        self.user, self.item = nn.Embedding(7, embedding), nn.Embedding(9, embedding)
        self.mlp = nn.Sequential(nn.Linear(2 * embedding, width), nn.ReLU(), nn.Linear(width, 1))


class Inner(nn.Module):
    def __init__(self, hidden: int, width: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(hidden, width), nn.Linear(width, hidden)


class Model(nn.Module):
    def __init__(self, hidden: int, width: int, depth: int) -> None:
        super().__init__()
        self.table = nn.Embedding(7, hidden)
        self.blocks = nn.ModuleList(Inner(hidden, width) for _ in range(depth))
        self.head = nn.Linear(hidden, 7)


class Masked(nn.Module):
    mask: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.tower = _tower(width)
        self.register_buffer("mask", torch.ones(width))


def _named(width: int) -> nn.Sequential:
    tower = _tower(width)
    return nn.Sequential(OrderedDict((f"step_{9 - i}", part) for i, part in enumerate(tower)))


def _looped(width: int) -> nn.Sequential:
    layer = nn.Linear(width, width)
    return nn.Sequential(nn.Linear(3, width), layer, layer, nn.Linear(width, 2))


JOINED = {"mlp.0.weight": matta.Layout.equal(2, axis=1)}
FOUND: dict[str, tuple[Callable[[], matta.Nested], list[str]]] = {
    "each layer of a tower": (lambda: matta.nest(_tower(4), _tower(6)), ["0", "2", "4"]),
    "each layer of a tower with names": (lambda: matta.nest(_named(4), _named(6)), ["step_9", "step_7", "step_5"]),
    "norms go with what they normalize": (
        lambda: matta.nest(_tower(4, norm=True), _tower(6, norm=True)),
        ["0", "3", "6"],
    ),
    "embeddings and hidden layers": (
        lambda: matta.nest(Ranker(4, 2), Ranker(6, 5), layouts=JOINED),
        ["user", "mlp.0"],
    ),
    "only what grows": (lambda: matta.nest(Ranker(4, 2), Ranker(6, 2)), ["mlp.0"]),
    "blocks": (lambda: matta.nest(Model(4, 5, 2), Model(4, 8, 2)), ["blocks.0", "blocks.1"]),
    "blocks of a deeper TA": (
        lambda: matta.nest(Model(4, 5, 1), Model(4, 5, 3), layers={"blocks": "last"}),
        ["blocks.0", "blocks.1", "blocks.2"],
    ),
    "a width through all blocks": (lambda: matta.nest(Model(4, 5, 2), Model(6, 8, 2)), [HIDDEN]),
    "a width through all of more blocks": (
        lambda: matta.nest(Model(4, 5, 1), Model(6, 8, 2), layers={"blocks": "first"}),
        [HIDDEN, "blocks.0", "blocks.1"],
    ),
    "a module in two places": (lambda: matta.nest(_looped(4), _looped(6)), ["0"]),
    "a buffer as long as a width": (lambda: matta.nest(Masked(4), Masked(6)), [HIDDEN]),
    "a module that cannot be cut": (
        lambda: matta.nest(*(nn.Sequential(nn.GRU(3, w)) for w in (4, 6))),
        [HIDDEN],
    ),
    "nothing grows": (lambda: matta.nest(_tower(4), _tower(4)), []),
}


@pytest.mark.parametrize("name", FOUND)
def test_the_layers_are_found(name: str) -> None:
    make, expected = FOUND[name]
    assert list(matta.layer_names(make())) == expected


@pytest.mark.parametrize("name", FOUND)
def test_every_growing_axis_belongs_to_one_layer(name: str) -> None:
    nested = FOUND[name][0]()
    units = find_units(nested.student, nested.ta, nested.plan)
    assert len({unit.name for unit in units}) == len(units)
    spots = [spot for unit in units for spot in unit.spots]
    assert len(spots) == len(set(spots))
    if any(unit.name == HIDDEN for unit in units):
        return
    prefixes = tuple(f"{each.student}." for each in block_lists(nested.student, nested.plan))
    for parameter, placement in nested.plan.placements.items():
        for axis, found in enumerate(placement.axes):
            inside = bool(prefixes) and parameter.startswith(prefixes)
            assert not found.grows or inside or any(spot[:2] == (parameter, axis) for spot in spots)


def test_lists_within_blocks_are_no_layers() -> None:
    class Stages(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.stages = nn.ModuleList(Model(4, width, 2) for _ in range(2))

    nested = matta.nest(Stages(5), Stages(8))
    assert matta.layer_names(nested) == ("stages.0", "stages.1")


def test_layers_are_named_after_what_puts_the_width_out() -> None:
    nested: Any = FOUND["embeddings and hidden layers"][0]()
    units = {unit.name: unit for unit in find_units(nested.student, nested.ta, nested.plan)}
    assert {spot[0] for spot in units["user"].spots} == {"user.weight", "item.weight", "mlp.0.weight"}
    assert {spot[0] for spot in units["mlp.0"].spots} == {"mlp.0.weight", "mlp.0.bias", "mlp.2.weight"}
    assert not any(unit.is_block for unit in units.values())


class TwoTowers(nn.Module):
    """The last layer of one tower is as wide as the table of the other, with whose rows it is multiplied."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.user, self.item = nn.Embedding(7, width), nn.Embedding(9, width)
        self.tower = nn.Sequential(nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, width))

    def forward(self, user: Tensor, item: Tensor) -> Tensor:
        return (self.tower(self.user(user)) * self.item(item)).sum(-1)


def test_widths_that_a_run_shows_as_one_are_one_layer(tmp_path: Path) -> None:
    torch.manual_seed(0)
    inputs = torch.arange(4), torch.arange(4)
    nested = matta.nest(TwoTowers(2, 6), TwoTowers(5, 8), example=(inputs, torch.ones(4)))
    assert matta.layer_names(nested) == ("user", "tower.0")
    again = matta.load(matta.save(nested, tmp_path / "saved"), TwoTowers(2, 6), TwoTowers(5, 8))
    assert matta.layer_names(again) == ("user", "tower.0")
    for name in matta.layer_names(nested):
        assert matta.extract(again, matta.SubModel({name: "wide"}))(*inputs).shape == (4,)


def test_equal_widths_one_after_the_other_stay_apart_with_an_example() -> None:
    nested = matta.nest(_tower(4), _tower(6), example=(torch.randn(2, 3), torch.zeros(2)))
    assert matta.layer_names(nested) == ("0", "2", "4")
