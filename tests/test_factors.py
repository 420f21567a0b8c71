"""Factors kept beside a run: what is written is what Shampoo holds, ordered by Student and TA."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import matta
from matta.cli import main
from matta.errors import RunError
from matta.training.factors import FILE, load_factor, save_factors

BATCHES = [(torch.randn(16, 5, generator=torch.Generator().manual_seed(i)), torch.rand(16)) for i in range(12)]


def tower(width: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(5, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 1))


def trained(folder: Path, *, block_size: int = 128) -> tuple[matta.Nested, matta.Shampoo]:
    torch.manual_seed(0)
    nested = matta.nest(tower(4), tower(10))
    optimizer = matta.Shampoo(nested, lr=0.01, graft="adagrad", block_size=block_size, statistics_every=1)
    cotrain = matta.CoTraining(nested, matta.objectives.Binary())
    matta.fit(cotrain, BATCHES, optimizer, run=folder, progress=False, tensorboard=False)
    return nested, optimizer


def test_the_factor_is_the_sum_of_gradient_products_with_the_student_first(tmp_path: Path) -> None:
    torch.manual_seed(0)
    student, ta = (nn.Sequential(nn.Linear(3, width), nn.Linear(width, 1)) for width in (2, 5))
    nested = matta.nest(student, ta)
    weight = nested.ta[0].weight
    optimizer = matta.Shampoo(nested, lr=0.0, graft="adagrad", statistics_every=1)
    left, right = torch.zeros(5, 5), torch.zeros(3, 3)
    for seed in range(3):
        gradient = torch.randn(5, 3, generator=torch.Generator().manual_seed(seed))
        for parameter in nested.parameters():
            parameter.grad = torch.zeros_like(parameter)
        weight.grad = gradient
        left, right = left + gradient @ gradient.T, right + gradient.T @ gradient
        optimizer.step()
    save_factors(optimizer, nested, tmp_path)
    factor = load_factor(tmp_path, "0")
    assert factor.num_student == 2 and factor.layer == "0.weight"
    torch.testing.assert_close(factor.moments.float(), left)
    scale = left.diagonal().sqrt()
    expected = (left / scale[:, None] / scale).abs()
    assert factor.means()["across"] == pytest.approx(float(expected[:2, 2:].mean()), abs=1e-6)
    assert factor.means()["within_student"] == pytest.approx(float(expected[0, 1]), abs=1e-6)
    with pytest.raises(RunError, match="no block of 0.weight holds input channels both"):
        load_factor(tmp_path, "0", "input")


def test_blocks_smaller_than_the_matrix_give_the_one_with_the_students_edge(tmp_path: Path) -> None:
    trained(tmp_path / "run", block_size=6)
    for side in ("output", "input"):
        factor = load_factor(tmp_path / "run", "2.weight", side)
        assert 0 < factor.num_student <= 4 and len(factor.moments) <= 6
        assert bool((factor.correlations() <= 1).all()) and bool((factor.moments.diagonal() > 0).all())


def test_channels_without_a_gradient_are_left_out(tmp_path: Path) -> None:
    nested, optimizer = trained(tmp_path / "run")
    state = optimizer.state[nested.ta[2].weight]
    state["left"][:, 1] = 0
    state["left"][:, :, 1] = 0
    save_factors(optimizer, nested, tmp_path)
    factor = load_factor(tmp_path, "2.weight")
    assert (factor.num_student, len(factor.moments)) == (3, 9)
    assert all(math.isfinite(value) for value in factor.means().values())


def test_the_command_draws_and_prints_the_means(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trained(tmp_path / "run")
    assert main(["figure", "preconditioner", str(tmp_path / "run"), "--layer", "2", "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures.keys() >= {"within_student", "within_ta_only", "across"}
    assert Path(figures["picture"]).read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere", "--layer", "2"], f"nowhere holds no {FILE}; expected the folder of a run"),
        (["run", "--layer", "nothing"], "no output factor of 'nothing'; it has: 0.weight, 2.weight, 4.weight"),
        (["run", "--layer", "2", "--side", "up"], "side='up': expected output or input"),
    ],
)
def test_wrong_requests_are_one_line(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    trained(tmp_path / "run")
    assert main(["figure", "preconditioner", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_a_damaged_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / FILE).write_bytes(b"nothing of the kind")
    with pytest.raises(RunError, match="cannot be read"):
        load_factor(tmp_path, "2")
    with pytest.raises(RunError, match="expected 'output' or 'input'"):
        load_factor(tmp_path, "2", "up")


def test_a_file_whose_shapes_do_not_fit_is_refused(tmp_path: Path) -> None:
    layers = {"2.weight": {"shape": [8, 0], "output": [0], "input": [0]}}
    save_file({"2.weight/input": torch.eye(3)[None]}, tmp_path / FILE, metadata={"layers": json.dumps(layers)})
    with pytest.raises(RunError, match="cannot be read: shape"):
        load_factor(tmp_path, "2", "input")
