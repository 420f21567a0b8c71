"""`nest(..., warm_start="ta")`: the Student starts as its slice of a trained Teaching Assistant."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import matta


def tower(width: int) -> nn.Module:
    return nn.Sequential(nn.Linear(3, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Linear(width, 2))


def trained(width: int) -> nn.Module:
    """A tower whose statistics are not those of a fresh one."""
    torch.manual_seed(1)
    module = tower(width)
    for _ in range(3):
        module(torch.randn(16, 3) + 1)
    with torch.no_grad():
        module[1].weight.normal_()
        module[1].bias.normal_()
    return module.eval()


def sliced(ta: nn.Module, width: int, x: Tensor) -> Tensor:
    """The tower's first channels alone, by hand."""
    h = ta[0](x)[:, :width]
    norm = ta[1]
    h = (h - norm.running_mean[:width]) / (norm.running_var[:width] + norm.eps).sqrt()
    h = (h * norm.weight[:width] + norm.bias[:width]).relu()
    return h @ ta[3].weight[:, :width].T + ta[3].bias


@pytest.mark.parametrize("private", [(), ("1.*",), ("1.*", "3.*")])
def test_student_is_the_leading_slice_of_the_ta(private: tuple[str, ...]) -> None:
    ta, x = trained(8), torch.randn(5, 3)
    before = {name: each.clone() for name, each in ta.state_dict().items()}
    nested = matta.nest(tower(4), ta, private=private, warm_start="ta")
    torch.testing.assert_close(nested.student.eval()(x), sliced(ta, 4, x))
    assert all(torch.equal(each, before[name]) for name, each in ta.state_dict().items())


def test_private_parameters_are_copies() -> None:
    ta = trained(8)
    nested = matta.nest(tower(4), ta, private=["3.*"], warm_start="ta")
    with torch.no_grad():
        nested.student[3].bias.add_(1)
    assert torch.equal(nested.student[3].bias, ta[3].bias + 1)


def test_blocks_are_those_of_the_layers_that_are_kept() -> None:
    def stack(depth: int) -> nn.Module:
        return nn.Sequential(*(nn.BatchNorm1d(2) for _ in range(depth)))

    ta = stack(3)
    for index, norm in enumerate(ta):
        norm.running_mean.fill_(index)
    nested = matta.nest(stack(2), ta, layers={"": [0, 2]}, private=["*"], warm_start="ta")
    assert [norm.running_mean.tolist() for norm in nested.student] == [[0.0, 0.0], [2.0, 2.0]]


def test_private_parameters_for_which_the_ta_has_no_room_stay() -> None:
    student, ta = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 9)), nn.Sequential(nn.Linear(3, 8), nn.Linear(8, 2))
    nested = matta.nest(student, ta, private=["1.*"], layouts={"0.*": 1}, warm_start="ta")
    assert torch.equal(nested.student[1].weight, student[1].weight)
    assert torch.equal(nested.student[0].weight, ta[0].weight[:4])


def test_a_warm_start_that_is_none_is_refused() -> None:
    with pytest.raises(matta.MattaError, match="warm_start='student'; expected True"):
        matta.nest(tower(4), tower(8), warm_start="student")  # type: ignore[arg-type]
