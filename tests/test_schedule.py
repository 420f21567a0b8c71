"""The weights of the losses and the ramp."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from matta.errors import MattaError
from matta.training.loss_schedule import Ramp, Weights


@given(st.integers(0, 50), st.integers(0, 50), st.integers(0, 200))
def test_the_ramp_on_a_device_is_the_ramp_in_numbers(start: int, steps: int, step: int) -> None:
    ramp = Ramp(start=start, steps=steps)
    found = ramp.at_tensor(torch.tensor(step), torch.float64)
    assert found.dtype == torch.float64
    assert found.item() == pytest.approx(ramp.at(step), abs=1e-15)


@given(st.integers(0, 50), st.integers(1, 50))
def test_the_ramp_is_zero_then_rises_to_one_and_stays(start: int, steps: int) -> None:
    ramp = Ramp(start=start, steps=steps)
    values = [ramp.at(step) for step in range(start + steps + 5)]
    assert values == sorted(values)
    assert values[start] == 0.0
    assert values[start + steps :] == [1.0] * 5
    assert ramp.at(start + steps - 1) < 1.0


def test_a_ramp_without_steps_jumps() -> None:
    ramp = Ramp(start=3, steps=0)
    assert [ramp.at(step) for step in (0, 2, 3, 4)] == [0.0, 0.0, 1.0, 1.0]
    assert ramp.at_tensor(torch.tensor([2, 3]), torch.float32).tolist() == [0.0, 1.0]


@pytest.mark.parametrize("setting", [{"start": -1}, {"steps": -1}])
def test_a_negative_number_of_steps_is_refused(setting: dict[str, int]) -> None:
    with pytest.raises(MattaError, match=r"-1.*expected start and steps of zero or more"):
        Ramp(**setting)


@pytest.mark.parametrize("name", ["student", "ta", "distill"])
@pytest.mark.parametrize("value", [-0.5, float("inf"), float("nan")])
def test_a_weight_that_is_negative_or_not_finite_is_refused(name: str, value: float) -> None:
    with pytest.raises(MattaError, match=rf"Weights\({name}={value}\); expected a finite number, zero or more"):
        Weights(**{name: value})
