"""The checker itself: the tests' shapes are worth something only if a wrong one is seen."""

from __future__ import annotations

import jaxtyping
import pytest
import torch
from jaxtyping import Float, jaxtyped
from torch import Tensor

from shape_checks import check_shapes


@jaxtyped(typechecker=check_shapes)
def product(
    rows: Float[Tensor, "m k"], columns: Float[Tensor, "k n"], scale: int = 1
) -> Float[Tensor, "m n"]:
    return rows @ columns * scale if scale else rows


def test_right_shapes_pass_and_other_annotations_are_left_alone() -> None:
    assert product(torch.ones(2, 3), torch.ones(3, 4), scale=0.5).shape == (2, 4)  # type: ignore[arg-type]


def test_wrong_arguments_are_seen() -> None:
    with pytest.raises(jaxtyping.TypeCheckError):
        product(torch.ones(2, 3), torch.ones(4, 3))


def test_wrong_results_are_seen() -> None:
    with pytest.raises(jaxtyping.TypeCheckError):
        product(torch.ones(2, 3), torch.ones(3, 4), scale=0)
