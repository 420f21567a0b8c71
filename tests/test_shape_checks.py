"""The checker itself: the tests' shapes are worth something only if a wrong one is seen."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

import jaxtyping
import pytest
import torch
from jaxtyping import Float, jaxtyped
from torch import Tensor

import matta
from shape_checks import check_shapes, modules_with_shapes

MODULES = modules_with_shapes(Path(matta.__file__).parent)


@jaxtyped(typechecker=check_shapes)
def product(rows: Float[Tensor, "m k"], columns: Float[Tensor, "k n"], scale: int = 1) -> Float[Tensor, "m n"]:
    return rows @ columns * scale if scale else rows


def test_right_shapes_pass_and_other_annotations_are_left_alone() -> None:
    assert product(torch.ones(2, 3), torch.ones(3, 4), scale=0.5).shape == (2, 4)  # type: ignore[arg-type]


def test_wrong_arguments_are_seen() -> None:
    with pytest.raises(jaxtyping.TypeCheckError):
        product(torch.ones(2, 3), torch.ones(4, 3))


def test_wrong_results_are_seen() -> None:
    with pytest.raises(jaxtyping.TypeCheckError):
        product(torch.ones(2, 3), torch.ones(3, 4), scale=0)


@pytest.mark.parametrize("name", MODULES)
def test_modules_of_matta_are_checked(name: str) -> None:
    assert type(import_module(name).__loader__).__module__.startswith("jaxtyping")


def test_losses_have_shapes() -> None:
    assert "matta.objectives.losses" in MODULES
