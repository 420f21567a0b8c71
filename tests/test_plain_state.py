"""The state of a run comes back from its two files as it was, and nothing in them is code."""

from __future__ import annotations

import json
import math
from collections import Counter, OrderedDict
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from matta.errors import CheckpointError
from matta.training.plain_state import PackedState, read_state

PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.tuples(inner, inner) | st.dictionaries(st.integers() | st.text(), inner),
    max_leaves=12,
)


@given(state=st.dictionaries(st.text(), PLAIN))
def test_plain_values_come_back(state: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("state")
    PackedState(state).write(folder, "run")
    assert repr(read_state(folder, "run")) == repr(state)


def test_tensors_and_other_kinds_come_back(tmp_path: Path) -> None:
    shared = torch.arange(6.0)
    state = {
        "tensors": {0: shared[:3], 1: shared[3:], "t": torch.ones(2, 3).T, "empty": torch.zeros(0, 2)},
        "kinds": [torch.tensor(True), torch.tensor(3, dtype=torch.int16), torch.ones(2, dtype=torch.bfloat16)],
        "complex": torch.tensor([1 + 2j, 3 - 4j]),
        "counted": Counter([3, 3, 5]),
        "ordered": OrderedDict(b=1, a=2),
        "shape": torch.Size((2, 3)),
        "set": {1, 2},
        "odd": [math.inf, numpy.float64(1.5)],
        "$tensor": "a key like ours",
    }
    PackedState(state).write(tmp_path, "run")
    found = read_state(tmp_path, "run")
    assert repr(found) == repr({**state, "odd": [math.inf, 1.5]})
    assert {type(found[name]) for name in ("counted", "ordered", "shape", "set")} == {
        Counter,
        OrderedDict,
        torch.Size,
        set,
    }
    assert found["kinds"][2].dtype == torch.bfloat16


def test_a_packed_state_no_longer_changes(tmp_path: Path) -> None:
    weight = torch.zeros(3)
    packed = PackedState({"weight": weight, "list": [1]})
    weight.fill_(7)
    packed.write(tmp_path, "run")
    assert read_state(tmp_path, "run")["weight"].tolist() == [0, 0, 0]


def test_what_has_code_is_refused_by_its_place() -> None:
    with pytest.raises(
        CheckpointError, match=r"the state of the run has observers\[1\].model of type Linear; expected"
    ):
        PackedState({"observers": [{}, {"model": torch.nn.Linear(1, 1)}]})


@pytest.mark.parametrize(
    "text",
    ["", "[]", "3", '{"$tensor": "0"}', '{"a": {"$tensor": "9"}}', '{"a": {"$dict": 3}}', '{"a": {"$size": ["x"]}}',
     '{"a": {"$complex": "0"}}', '{"a": {"$other": []}}', "[" * 100_000, '{"a": {"$float": "x"}}'],
)  # fmt: skip
def test_other_files_are_refused(text: str, tmp_path: Path) -> None:
    PackedState({"a": torch.zeros(3)}).write(tmp_path, "run")
    (tmp_path / "run.json").write_text(text)
    with pytest.raises(CheckpointError, match="take another copy of the folder"):
        read_state(tmp_path, "run")


def test_files_are_plain(tmp_path: Path) -> None:
    PackedState({"a": torch.zeros(3), "b": math.nan}).write(tmp_path, "run")
    assert json.loads((tmp_path / "run.json").read_text(), parse_constant=pytest.fail) is not None
    assert sorted(each.name for each in tmp_path.iterdir()) == ["run.json", "run.safetensors"]
