"""Depth M-nesting: which blocks of the TA are the Student's, for every rule and every number of blocks."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from matta.errors import NestingError
from matta.nesting.declarations import LayerMap, is_module_list, map_layers, place_layers, translate

DEPTHS = st.tuples(st.integers(0, 12), st.integers(0, 12)).map(lambda pair: (pair[0], pair[0] + pair[1]))
RULES = ["first", "last", "even", "ends"]


@given(DEPTHS, st.sampled_from(RULES))
def test_every_rule_takes_that_many_blocks_in_their_order(depths: tuple[int, int], rule: str) -> None:
    small, large = depths
    found = place_layers(rule, small, large)
    assert len(found) == small
    assert list(found) == sorted(set(found))
    assert all(0 <= index < large for index in found)
    assert place_layers(list(found), small, large) == found


@given(DEPTHS)
def test_the_rules_take_what_their_names_say(depths: tuple[int, int]) -> None:
    small, large = depths
    blocks = list(range(large))
    assert list(place_layers("first", small, large)) == blocks[:small]
    assert list(place_layers("last", small, large)) == blocks[large - small :]
    low = (small + 1) // 2
    assert list(place_layers("ends", small, large)) == blocks[:low] + blocks[large - (small - low) :]
    even = place_layers("even", small, large)
    gaps = {b - a for a, b in pairwise(even)}
    assert not gaps or max(gaps) - min(gaps) <= 1
    assert small < 2 or (even[0], even[-1]) == (0, large - 1)


@given(st.integers(0, 6), st.sampled_from(RULES))
def test_equal_depths_are_the_identity(depth: int, rule: str) -> None:
    assert place_layers(rule, depth, depth) == tuple(range(depth))


@pytest.mark.parametrize(
    ("rule", "depths", "message"),
    [
        ("first", (3, 2), r"Student has 3 blocks and the TA only 2; give the TA more"),
        ("middle", (2, 3), r"received 'middle'; expected 'first', 'last', 'even', 'ends', or a list of indices"),
        (1, (1, 3), r"received 1; expected 'first'"),
        ([0, 1, 2], (2, 3), r"received the indices \[0, 1, 2\]; expected 2 of 0 to 2, each once, rising"),
        ([1, 0], (2, 3), r"received the indices \[1, 0\]; expected 2 of 0 to 2"),
        ([1, 1], (2, 3), r"received the indices \[1, 1\]"),
        ([0, 3], (2, 3), r"received the indices \[0, 3\]"),
        ([-1, 0], (2, 3), r"received the indices \[-1, 0\]"),
    ],
)
def test_a_rule_that_does_not_fit_is_refused(rule: Any, depths: tuple[int, int], message: str) -> None:
    with pytest.raises(NestingError, match=message):
        place_layers(rule, *depths)


def _tree(outer: int, inner: int) -> nn.Module:
    stages = (nn.ModuleDict({"layers": nn.ModuleList(nn.Linear(2, 2) for _ in range(inner))}) for _ in range(outer))
    return nn.ModuleDict({"stages": nn.ModuleList(stages)})


def test_lists_within_lists_are_each_mapped() -> None:
    student, ta = _tree(2, 1), _tree(3, 2)
    names = [name for name, _ in student.named_parameters()]
    maps, matched = map_layers(student, ta, {"stages": "last", "stages.*.layers": "last"}, names)
    assert matched == {"stages", "stages.*.layers"}
    assert translate("stages.0.layers.0.weight", maps) == "stages.1.layers.1.weight"
    assert [each.indices for each in maps] == [(1, 2), (1,), (1,)]
    for name, parameter in student.named_parameters():
        assert ta.get_parameter(translate(name, maps)).shape == parameter.shape


@pytest.mark.parametrize("name", ["", "head.weight", "h", "hh.0.weight", "x.h.0.weight", "h.weight"])
def test_other_names_stay_as_they_are(name: str) -> None:
    assert translate(name, [LayerMap("h", "h", (2, 3), 4)]) == name


def test_the_module_itself_may_be_the_list() -> None:
    maps, _ = map_layers(
        nn.Sequential(nn.Linear(2, 2)), nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), {"": "last"}, ["0.weight"]
    )
    assert translate("0.weight", maps) == "1.weight"


def test_lists_that_are_not_shared_need_no_rule() -> None:
    assert map_layers(_tree(2, 1), _tree(3, 2), {}, ["head.weight"]) == ([], set())


@pytest.mark.parametrize(
    ("module", "expected"),
    [
        (nn.ModuleList([nn.ReLU()] * 3), True),
        (nn.Sequential(nn.ReLU(), nn.ReLU()), True),
        (nn.ModuleList(), True),
        (nn.ModuleDict({"0": nn.ReLU()}), False),
        (nn.Linear(2, 2), False),
        (nn.utils.parametrizations.weight_norm(nn.Linear(2, 2)).parametrizations.weight, False),
    ],
)
def test_what_a_list_of_blocks_is(module: nn.Module, expected: bool) -> None:
    assert is_module_list(module) is expected


def test_different_lengths_without_a_rule_are_refused() -> None:
    student, ta = _tree(2, 1), _tree(3, 1)
    names = [name for name, _ in student.named_parameters()]
    with pytest.raises(NestingError, match=r"stages has 2 blocks in the Student and 3 in the TA.*\{'stages': 'first'"):
        map_layers(student, ta, {}, names)
    with pytest.raises(NestingError, match=r"layers=\{'stages': 'middle'\}: received 'middle'; expected"):
        map_layers(student, ta, {"stages": "middle"}, names)
