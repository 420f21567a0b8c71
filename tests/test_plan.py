"""The plan that `print(nested)` shows: each parameter, where it lives, and the counts."""

from __future__ import annotations

import re

import torch
from torch import nn

import matta


class Net(nn.Module):
    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.0))
        self.table = nn.Embedding(7, 4)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(4, 2 * width), nn.GLU(), nn.Linear(width, 4)) for _ in range(depth)
        )
        self.norm = nn.LayerNorm(4)
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.table.weight


EXPECTED = """
Student parameter  shape   lives in the TA
------------------------------------------------------------
scale              scalar  scale
table.weight       7x4     table.weight[:, :]
blocks.0.0.weight  6x4     blocks.2.0.weight[(2x:3 of 5), :]
blocks.0.0.bias    6       blocks.2.0.bias[(2x:3 of 5)]
blocks.0.2.weight  4x3     blocks.2.2.weight[:, :3]
blocks.0.2.bias    4       blocks.2.2.bias[:]
norm.weight        4       norm.weight[:]
head.weight        7x4     table.weight[:, :]  (tied to table.weight)
norm.bias          4       private: the Student's own

Student: 83 parameters, 79 shared with the TA, 4 private
TA: 259 parameters, 180 beyond the Student's; 3.12x the Student
blocks: 1 blocks in the TA's 3: [2]
"""


def _nested() -> matta.Nested:
    return matta.nest(
        Net(3, 1), Net(5, 3), layers={"blocks": "last"}, layouts={"blocks.*.0.*": 2}, private=["norm.bias"]
    )


def test_the_plan_is_a_table_that_a_person_can_check() -> None:
    nested = _nested()
    assert [line.rstrip("-") for line in str(nested).splitlines()] == EXPECTED.strip().replace("-" * 60, "").split("\n")
    assert repr(nested) == str(nested)


def test_the_counts_are_those_of_the_modules() -> None:
    nested = _nested()
    num_student = sum(parameter.numel() for parameter in Net(3, 1).parameters())
    num_ta = sum(parameter.numel() for parameter in Net(5, 3).parameters())
    shared = {(each.ta, each.axes): each.num_elements for each in nested.plan.placements.values()}
    assert sum(shared.values()) + 4 == num_student
    assert f"Student: {num_student} parameters" in str(nested)
    assert f"TA: {num_ta} parameters, {num_ta - sum(shared.values())} beyond" in str(nested)
    assert {name for name, each in nested.plan.placements.items() if each.grows} == {
        "blocks.0.0.weight",
        "blocks.0.0.bias",
        "blocks.0.2.weight",
    }


def test_every_line_names_a_slice_that_holds_the_students_weight() -> None:
    nested = _nested()
    for name, live in nested.sources().items():
        assert torch.equal(live.read(contiguous=True), nested.student.state_dict()[name])


def test_several_students_have_a_plan_each() -> None:
    pair = [nn.Sequential(nn.Linear(3, width), nn.Linear(width, 1)) for width in (2, 4)]
    nested = matta.nest(pair, nn.Sequential(nn.Linear(3, 6), nn.Linear(6, 1)))
    first, second = str(nested).split("\n\n\n") if "\n\n\n" in str(nested) else (str(nested), str(nested))
    assert "0.weight[:2, :]" in first
    assert "0.weight[:4, :]" in second
    assert str(nested).count("Student parameter") == 2


def test_private_parameters_that_are_tied_are_counted_once() -> None:
    nested = matta.nest(Net(3, 1), Net(5, 1), share="none")
    assert re.search(r"head.weight +tied +private", str(nested))
    assert f"{sum(p.numel() for p in Net(3, 1).parameters())} private" in str(nested)
