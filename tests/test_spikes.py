"""A run whose loss leaps returns to its newest checkpoint and leaves out the batches since."""

from __future__ import annotations

import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import matta
from matta.errors import RunError
from matta.training.loop import Training
from test_fitting import Pair, Setup, Stopped, assert_equal, batches, fail, stop_at

ROLLBACK = matta.Rollback(factor=4.0, window=3, most=2)


def spoilt() -> Pair:
    """A batch whose labels are all wrong, and whose inputs are large."""
    x, y = batches()[0]
    return 200 * x, 1 - y


def tower(width: int) -> nn.Module:
    return nn.Sequential(nn.Linear(6, width), nn.ReLU(), nn.Linear(width, 1))


def setup() -> Setup:
    ours = Setup(make=tower)
    ours.scheduler = None
    return ours


def test_the_loss_seen_does_not_depend_on_the_number_of_processes() -> None:
    """So that a run that is resumed in more of them sees no leap."""
    seen = []
    for count in (1, 4):
        outputs = [SimpleNamespace(loss=torch.tensor(each), total_weight=torch.tensor(3.0)) for each in (0.25, 0.5)]
        processes = SimpleNamespace(num_processes=count, reduce=lambda tensor, _, count=count: count * tensor)
        told: Any = SimpleNamespace(accelerator=processes, norm=None, interrupt=SimpleNamespace(came=None))
        told._note_signals = lambda total: None
        seen.append(Training._seen_loss(told, outputs))  # type: ignore[arg-type]
    assert seen == [0.25, 0.25]


def test_a_spike_costs_the_batches_since_the_checkpoint(tmp_path: Path) -> None:
    good = batches() * 4
    spiked = [*good[:5], spoilt(), *good[6:]]
    expected, ours = setup(), setup()
    expected.fit([*good[:4], *good[6:]], steps=10, scheduler=None)
    settings = {"run": tmp_path / "run", "checkpoint_every": 2, "rollback": ROLLBACK, "scheduler": None}
    with pytest.warns(UserWarning, match="the loss of step 6 is .* over 4 times .* continues from step 4"):
        assert ours.fit(spiked, steps=10, **settings).steps == 10
    assert_equal(ours.state(), expected.state())
    stopped, resumed = setup(), setup()
    stop_at(9, fail)(stopped)  # two forwards were for nothing
    settings["run"] = tmp_path / "again"
    with pytest.raises(Stopped), pytest.warns(UserWarning, match="continues from step 4"):
        stopped.fit(spiked, steps=10, **settings)
    resumed.fit(spiked, steps=10, resume=True, **settings)
    assert_equal(resumed.state(), expected.state())


@pytest.mark.parametrize(
    "settings",
    [
        {"turns": matta.Turns(alone_steps=6)},
        {"ramp": matta.Ramp(start=6, steps=1), "weights": matta.Weights(distill=9)},
    ],
    ids=["turns", "ramp"],
)
def test_losses_that_join_in_are_no_spike(settings: dict[str, Any], tmp_path: Path) -> None:
    torch.manual_seed(0)
    nested = matta.nest(tower(4), tower(8))
    cotrain = matta.CoTraining(nested, matta.objectives.Binary(), **settings)
    rollback = matta.Rollback(factor=1.5, window=3)
    chosen: dict[str, Any] = {"run": tmp_path / "run", "checkpoint_every": 2, "tensorboard": False, "progress": False}
    optimizer = torch.optim.SGD(nested.parameters(), lr=0.01)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert matta.fit(cotrain, batches(), optimizer, steps=12, rollback=rollback, **chosen).steps == 12


def test_the_best_nesting_is_the_one_in_the_folder_after_a_rollback(tmp_path: Path) -> None:
    values, kept = iter([5.0, 4, 3, 2, 1, *[9] * 20]), []

    def judge(nested: matta.Nested) -> dict[str, float]:
        kept.append({name: each.clone() for name, each in nested.ta.state_dict().items()})
        return {"loss": next(values)}

    good, ours = batches() * 4, setup()
    settings: dict[str, Any] = {"rollback": ROLLBACK, "run": tmp_path / "run", "checkpoint_every": 4, "evaluate": judge}
    with pytest.warns(UserWarning, match="the run continues from step 4"):
        result: Any = ours.fit(
            [*good[:5], spoilt(), *good[6:]], steps=9, evaluate_every=1, best=("loss", "min"), **settings
        )
    assert (result.best.step, result.best.values) == (5, {"loss": 1.0})
    loaded = matta.load(tmp_path / "run" / "best", tower(4), tower(8))
    for name, tensor in loaded.ta.state_dict().items():
        assert torch.equal(tensor, kept[4][name])


def test_too_many_spikes_end_the_run(tmp_path: Path) -> None:
    data = [*batches(), spoilt(), spoilt(), spoilt()]
    settings = {"run": tmp_path / "run", "checkpoint_every": 2, "rollback": ROLLBACK, "scheduler": None}
    with (
        pytest.warns(UserWarning, match="continues from step"),
        pytest.raises(RunError, match="has rolled back 2 times; lower the learning rate"),
    ):
        setup().fit(data, steps=9, **settings)


def test_without_a_checkpoint_there_is_no_way_back(tmp_path: Path) -> None:
    data = [*batches()[:4], spoilt()]
    ours = setup()
    assert ours.fit(data, steps=5, run=tmp_path / "run", rollback=ROLLBACK, scheduler=None).steps == 5
    assert all(bool(torch.isfinite(each).all()) for each in ours.state().values())


def test_settings_that_cannot_work_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="expected a factor over 1, a window from 2 up and most from 1 up"):
        matta.Rollback(factor=0.5)
    with pytest.raises(RunError, match="received rollback without run; expected run="):
        setup().fit(batches(), rollback=ROLLBACK, scheduler=None)
    with pytest.raises(RunError, match="received rollback with max_nonfinite=None"):
        setup().fit(batches(), run=tmp_path / "run", rollback=ROLLBACK, max_nonfinite=None, scheduler=None)
