"""One traced model over another: heads, groups and parts where the two are split into different factors."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import matta


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


def test_single_channels_of_groups_lie_in_wider_groups() -> None:
    def model(width: int) -> nn.Module:
        return nn.Sequential(
            nn.Conv1d(3, 4 * width, 1), nn.Conv1d(4 * width, 4 * width, 1, groups=4), nn.Conv1d(4 * width, 2, 1)
        )

    plan = matta.nest(model(1), model(3), example=(torch.randn(2, 3, 5), None)).plan
    assert plan.placements["0.weight"].axes[0].positions() == [0, 3, 6, 9]
    assert plan.placements["2.weight"].axes[1].positions() == [0, 3, 6, 9]
