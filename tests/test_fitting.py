"""`matta.fit`: the plain loop's weights exactly, runs that survive whatever stops them, errors that help."""

from __future__ import annotations

import functools
import itertools
import math
import os
import random
import signal
import socket
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor, multiprocessing, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

import matta
from matta.errors import CheckpointError, MattaError, RunError
from matta.training.evaluation import evaluating
from matta.training.randomness import random_state_kept
from matta.training.step_times import PARTS

Pair = tuple[Tensor, Tensor]


class Tower(nn.Module):
    """A Student or TA with all that a run must keep: dropout, BatchNorm statistics, a tied weight."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.norm = nn.Linear(6, width), nn.BatchNorm1d(width)
        self.middle, self.again = nn.Linear(width, width), nn.Linear(width, width)
        self.again.weight = self.middle.weight
        self.last = nn.Linear(width, 1)

    def forward(self, x: Tensor) -> Tensor:
        hidden = nn.functional.dropout(self.norm(self.first(x)).relu(), 0.2, self.training)
        return self.last(self.again(self.middle(hidden).relu()))


class Noisy(Dataset[Pair]):
    """Examples that draw from every global generator when they are loaded."""

    def __len__(self) -> int:
        return 40

    def __getitem__(self, index: int) -> Pair:
        noise = random.random() + numpy.random.rand() + torch.rand(6)
        return examples()[0][index] + 0.1 * noise, examples()[1][index]


def examples(count: int = 40) -> Pair:
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(count, 6, generator=generator)
    return x, (x[:, 0] > 0).float()


def batches() -> list[Pair]:
    return [(x, y) for x, y in zip(*(each.split(8) for each in examples()), strict=True)]


def endless() -> Iterator[Pair]:
    return itertools.cycle(batches())


def shuffled(dataset: Dataset[Pair] | None = None, generator: torch.Generator | None = None) -> DataLoader[Pair]:
    return DataLoader(dataset or TensorDataset(*examples()), batch_size=8, shuffle=True, generator=generator)


def seeded() -> DataLoader[Pair]:
    return shuffled(generator=torch.Generator().manual_seed(3))


def worked() -> DataLoader[Pair]:
    return DataLoader(TensorDataset(*examples()), batch_size=8, shuffle=True, num_workers=1)


class Stream(IterableDataset[Pair]):
    def __iter__(self) -> Iterator[Pair]:
        return zip(*examples(), strict=True)


def streamed() -> DataLoader[Pair]:
    return DataLoader(Stream(), batch_size=8)


def noisy() -> DataLoader[Pair]:
    return shuffled(Noisy())


def seed_all(seed: int) -> None:
    torch.manual_seed(seed)
    random.seed(seed)
    numpy.random.seed(seed)


class Setup:
    """Models, optimizer and scheduler, made alike each time."""

    def __init__(self, *, make: Callable[[int], nn.Module] = Tower, accumulate: int = 1) -> None:
        seed_all(0)
        self.nested = matta.nest(make(4), make(8))
        objective, ramp = matta.objectives.Binary(), matta.Ramp(start=2, steps=5)
        self.cotrain = matta.CoTraining(self.nested, objective, ramp=ramp, accumulate=accumulate)
        self.optimizer = torch.optim.Adam(self.nested.parameters(), lr=0.01)
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda step: 0.9**step)

    def fit(self, data: Iterable[Pair], *, seed: int = 0, **settings: object) -> object:
        seed_all(seed)
        settings = {"scheduler": self.scheduler, "progress": False, "tensorboard": False, **settings}
        return matta.fit(self.cotrain, data, self.optimizer, **settings)

    def state(self) -> dict[str, Tensor]:
        return {name: tensor.clone() for name, tensor in self.cotrain.state_dict().items()}


def assert_equal(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


class Stopped(Exception):
    """What stops a run in these tests."""


def stop_at(count: int, stop: Callable[[], None]) -> Callable[[Iterable[Pair]], object]:
    """Make `CoTraining` stop at its forward number `count`."""

    def prepare(setup: Setup) -> None:
        calls = itertools.count(1)

        def hook(*_: object) -> None:
            if next(calls) == count:
                stop()

        setup.cotrain.register_forward_pre_hook(hook)

    return prepare


def fail() -> None:
    raise Stopped


def test_it_is_the_plain_loop() -> None:
    ours, plain = Setup(), Setup()
    result = ours.fit(batches(), epochs=3, clip_norm=0.5)
    seed_all(0)
    plain.cotrain.train()
    for batch in batches() * 3:
        plain.optimizer.zero_grad()
        plain.cotrain(batch).loss.backward()
        nn.utils.clip_grad_norm_(plain.nested.parameters(), 0.5)
        plain.optimizer.step()
        plain.scheduler.step()
    assert_equal(ours.state(), plain.state())
    assert result.steps == 15
    assert result.losses.keys() == {"student", "ta", "distill"}


def test_accumulated_batches_make_one_step_and_the_ramp_counts_steps() -> None:
    ours, plain = Setup(), Setup(accumulate=2)
    result = ours.fit(batches(), epochs=3, accumulate=2)  # 15 batches: the odd one of a pass joins the next pass
    seed_all(0)
    plain.cotrain.train()
    for pair in zip(*[iter(batches() * 3)] * 2, strict=False):
        plain.optimizer.zero_grad()
        for batch in pair:
            (plain.cotrain(batch).loss / 2).backward()
        plain.optimizer.step()
        plain.scheduler.step()
    assert result.steps == 7
    assert_equal(dict(ours.nested.ta.named_parameters()), dict(plain.nested.ta.named_parameters()))
    assert ours.cotrain.accumulate == 1


def test_a_ramp_continues_where_a_run_with_another_accumulation_has_left_it(tmp_path: Path) -> None:
    ours = Setup()
    seen: list[float] = []
    ours.cotrain.register_forward_hook(lambda *call: seen.append(round(float(call[-1].distill_weight), 4)))
    for settings in ({"accumulate": 2, "steps": 4}, {"accumulate": 1, "steps": 1}, {"accumulate": 4, "steps": 1}):
        ours.fit(batches(), scheduler=None, **settings)
    assert seen == [0, 0, 0, 0, 0, 0, 0.2, 0.2, 0.4, *[0.6] * 4]  # from step 2 on, by a fifth each
    ours.cotrain(batches()[0])
    assert seen[-1] == 0.8
    settings = {"accumulate": 2, "steps": 3, "run": tmp_path / "run"}
    again = Setup()
    again.fit(batches(), **settings)
    resumed = Setup()
    resumed.fit(batches(), **{**settings, "steps": 4, "resume": True})
    assert resumed.cotrain.step == 4


def test_bf16_is_the_forward_under_autocast() -> None:
    ours, plain, full = Setup(), Setup(), Setup()
    ours.fit(batches(), precision="bf16")
    full.fit(batches())
    seed_all(0)
    plain.cotrain.train()
    for batch in batches():
        plain.optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = plain.cotrain(batch)
        out.loss.backward()
        plain.optimizer.step()
        plain.scheduler.step()
    assert_equal(ours.state(), plain.state())
    assert not torch.equal(ours.nested.ta.first.weight, full.nested.ta.first.weight)


@pytest.mark.parametrize(
    ("make_data", "accumulate", "stop"),
    [
        *itertools.product([batches, endless, shuffled, seeded, noisy], [1], [8, 11]),
        *itertools.product([batches, endless, shuffled, seeded, noisy], [2], [16, 23]),
        (worked, 1, 8),
        (streamed, 1, 8),
    ],
)
def test_a_resumed_run_equals_an_uninterrupted_one(
    make_data: Callable[[], Iterable[Pair]], accumulate: int, stop: int, tmp_path: Path
) -> None:
    settings = {"steps": 13, "accumulate": accumulate, "checkpoint_every": 3, "evaluate_every": 4, "resume": True}
    whole, stopped, resumed = Setup(), Setup(), Setup()
    expected = whole.fit(make_data(), evaluate=draw_and_judge, run=tmp_path / "whole", **settings)
    stop_at(stop, fail)(stopped)
    with pytest.raises(Stopped):
        stopped.fit(make_data(), evaluate=draw_and_judge, run=tmp_path / "run", **settings)
    result = resumed.fit(make_data(), seed=1, evaluate=draw_and_judge, run=tmp_path / "run", **settings)
    assert_equal(resumed.state(), whole.state())
    drawn = torch.rand(3)
    Setup().fit(make_data(), steps=13, accumulate=accumulate)
    assert torch.equal(drawn, torch.rand(3))
    assert result.evaluations == expected.evaluations
    assert result.losses == pytest.approx(expected.losses, rel=1e-6)  # of all steps, also those before the checkpoint
    assert [each.step for each in result.evaluations] == [4, 8, 12, 13]
    assert resumed.scheduler.get_last_lr() == whole.scheduler.get_last_lr()


def draw_and_judge(nested: matta.Nested) -> dict[str, float]:
    """An evaluation that draws random numbers, which must not change the run."""
    assert not nested.training and not nested.student.training and not torch.is_grad_enabled()
    torch.rand(3), random.random(), numpy.random.rand()
    return {"loss": nested.student(examples()[0]).sum()}


def test_a_finished_run_goes_on_when_it_is_given_more_steps(tmp_path: Path) -> None:
    whole, ours, again = Setup(), Setup(), Setup()
    whole.fit(seeded(), epochs=4)
    ours.fit(seeded(), epochs=2, run=tmp_path / "run", evaluate=draw_and_judge)
    assert again.fit(seeded(), epochs=4, run=tmp_path / "run", resume=True, seed=1).steps == 20
    assert_equal(whole.state(), again.state())
    finished = Setup()
    assert finished.fit(seeded(), epochs=4, run=tmp_path / "run", resume=True, seed=1).steps == 20
    assert_equal(whole.state(), finished.state())


def test_ctrl_c_ends_the_step_and_leaves_a_checkpoint(tmp_path: Path) -> None:
    whole, stopped, resumed = Setup(), Setup(), Setup()
    whole.fit(shuffled(), steps=9)
    stop_at(5, lambda: os.kill(os.getpid(), signal.SIGINT))(stopped)
    with pytest.raises(KeyboardInterrupt, match="stopped after step 5; continue with resume=True"):
        stopped.fit(shuffled(), steps=9, run=tmp_path / "run")
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert (tmp_path / "run" / "checkpoint-00000005").is_dir()
    assert resumed.fit(shuffled(), steps=9, run=tmp_path / "run", resume=True, seed=1).steps == 9
    assert_equal(resumed.state(), whole.state())


def test_a_fault_of_the_last_evaluation_costs_no_step(tmp_path: Path) -> None:
    whole, stopped, resumed = Setup(), Setup(), Setup()
    expected = whole.fit(noisy(), steps=5, run=tmp_path / "whole", evaluate=draw_and_judge)
    with pytest.raises(KeyboardInterrupt):
        stopped.fit(noisy(), steps=5, run=tmp_path / "run", evaluate=interrupted)
    assert_equal(stopped.state(), whole.state())
    for _ in range(2):
        result = resumed.fit([], steps=5, run=tmp_path / "run", resume=True, evaluate=draw_and_judge)
        assert_equal(resumed.state(), whole.state())
        assert (result.steps, result.evaluations) == (5, expected.evaluations)
    assert (tmp_path / "run" / "nested").is_dir()


def interrupted(nested: matta.Nested) -> dict[str, float]:
    """An evaluation during which Ctrl-C is pressed."""
    raise KeyboardInterrupt


def run_until_killed(folder: str) -> None:
    """For the test below, in a process of its own: a long run with a checkpoint at each step."""
    Setup().fit(noisy(), steps=100_000, run=folder, checkpoint_every=1)


def test_a_run_killed_at_any_moment_goes_on(tmp_path: Path) -> None:
    code = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\nimport test_fitting as t\n"
    code += f"t.run_until_killed({str(tmp_path / 'run')!r})"
    process = subprocess.Popen([sys.executable, "-c", code])
    try:
        deadline = time.monotonic() + 60
        while not (tmp_path / "run").exists() or last_step(tmp_path / "run") < 20:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    steps = last_step(tmp_path / "run") + 7
    whole, resumed = Setup(), Setup()
    whole.fit(noisy(), steps=steps)
    resumed.fit(noisy(), steps=steps, run=tmp_path / "run", resume=True, seed=1)
    assert_equal(resumed.state(), whole.state())
    assert not list((tmp_path / "run").glob(".*"))


def last_step(run: Path) -> int:
    return max((int(each.name.rpartition("-")[2]) for each in run.glob("checkpoint-*")), default=0)


def test_a_run_folder_that_exists_is_left_alone(tmp_path: Path) -> None:
    Setup().fit(batches(), run=tmp_path / "run")
    before = {file: file.read_bytes() for file in (tmp_path / "run").rglob("*") if file.is_file()}
    with pytest.raises(RunError, match="run exists and holds a run; .* resume=True, or choose another name for run="):
        Setup().fit(batches(), run=tmp_path / "run")
    assert before == {file: file.read_bytes() for file in (tmp_path / "run").rglob("*") if file.is_file()}
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "letter.txt").write_text("dear")
    with pytest.raises(RunError, match="other exists and holds no run"):
        Setup().fit(batches(), run=tmp_path / "other", resume=True, seed=1)


def test_a_run_ends_with_nestings_that_load(tmp_path: Path) -> None:
    ours = Setup()
    judged = iter([3.0, 1.0, 2.0])
    result = ours.fit(batches(), steps=3, run=tmp_path / "run", evaluate=lambda nested: {"error": next(judged)},
                      evaluate_every=1, best=("error", "min"))  # fmt: skip
    assert result.best == result.evaluations[1]
    assert (result.best.step, result.best.values) == (2, {"error": 1.0})
    loaded = matta.load(tmp_path / "run" / "nested", Tower(4), Tower(8))
    assert_equal(dict(loaded.ta.state_dict()), dict(ours.nested.ta.state_dict()))
    best = matta.load(tmp_path / "run" / "best", Tower(4), Tower(8))
    assert not torch.equal(best.ta.first.weight, ours.nested.ta.first.weight)
    assert [each.name for each in (tmp_path / "run").glob("checkpoint-*")] == ["checkpoint-00000003"]


def test_patience_ends_a_run_that_gets_no_better_also_when_it_is_resumed(tmp_path: Path) -> None:
    def values(nested: matta.Nested, found: Iterator[float]) -> dict[str, float]:
        return {"error": next(found)}

    def fit(setup: Setup, errors: list[float], **settings: object) -> Any:
        judge = functools.partial(values, found=iter(errors))
        settings = {"evaluate_every": 2, "best": ("error", "min"), "patience": 2, **settings}
        return setup.fit(endless(), steps=40, evaluate=judge, checkpoint_every=2, **settings)

    whole = fit(Setup(), [math.nan, 3.0, 1.0, 2.0, 1.0, 9.0], run=tmp_path / "whole")
    assert (whole.steps, whole.best.step) == (10, 6)
    stopped = Setup()
    stop_at(8, fail)(stopped)
    with pytest.raises(Stopped):
        fit(stopped, [math.nan, 3.0, 1.0], run=tmp_path / "stopped")
    resumed = fit(Setup(), [2.0, 1.0, 9.0], run=tmp_path / "stopped", resume=True)
    assert (resumed.steps, resumed.best) == (whole.steps, whole.best)
    again = fit(Setup(), [], run=tmp_path / "stopped", resume=True)
    assert again.steps == 10, "it has ended"


def test_a_damaged_or_foreign_checkpoint_is_refused(tmp_path: Path) -> None:
    Setup().fit(batches(), steps=4, run=tmp_path / "run")
    other = Setup(make=lambda width: Tower(width + 1))
    before = other.state()
    with pytest.raises(CheckpointError, match=r"norm.running_mean was saved with shape \(4,\) and is \(5,\)"):
        other.fit(batches(), run=tmp_path / "run", resume=True, seed=1)
    assert_equal(before, other.state())
    with pytest.raises(RunError, match="begun with accumulate=1, and now it is 2"):
        Setup().fit(batches(), accumulate=2, run=tmp_path / "run", resume=True, seed=1)
    with pytest.raises(RunError, match="begun with scheduler=True, and now it is False"):
        Setup().fit(batches(), scheduler=None, run=tmp_path / "run", resume=True, seed=1)
    with pytest.raises(RunError, match="the data ended before batch 4, .* epoch 0; expected the data that the run"):
        Setup().fit(iter(batches()[:2]), steps=9, run=tmp_path / "run", resume=True, seed=1)
    file = next((tmp_path / "run").glob("checkpoint-*")) / "model.safetensors"
    file.write_bytes(file.read_bytes()[:99])
    with pytest.raises(
        CheckpointError,
        match="no checkpoint in .* is whole: .*model.safetensors is damaged: its checksum .* remove that folder",
    ):
        Setup().fit(batches(), run=tmp_path / "run", resume=True, seed=1)


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def swap(file: Path) -> None:
    """Put the file of an older checkpoint in the place of this one."""
    older = file.parent.with_name("checkpoint-00000004") / file.name
    file.write_bytes(older.read_bytes())


DAMAGE = {
    "flipped": flip,
    "cut": lambda file: file.write_bytes(file.read_bytes()[:-9]),
    "missing": Path.unlink,
    "swapped": swap,
}


@pytest.mark.parametrize("name", ["model.safetensors", "training.safetensors", "training.json"])
@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_passed_over_for_an_older_one(name: str, damage: str, tmp_path: Path) -> None:
    whole, stopped, resumed = Setup(), Setup(), Setup()
    settings = {"run": tmp_path / "run", "checkpoint_every": 2, "resume": True}
    whole.fit(noisy(), steps=11)
    stop_at(8, fail)(stopped)
    with pytest.raises(Stopped):
        stopped.fit(noisy(), steps=11, **settings)
    DAMAGE[damage](tmp_path / "run" / "checkpoint-00000006" / name)
    message = f"checkpoint-00000006/{name} .*checkpoint-00000004, which is whole"
    with pytest.warns(UserWarning, match=message):
        resumed.fit(noisy(), seed=1, steps=11, **settings)
    assert_equal(resumed.state(), whole.state())
    kept = [f"checkpoint-{step:08d}" for step in (8, 10, 11)]
    assert [each.name for each in sorted((tmp_path / "run").glob("checkpoint-*"))] == kept


def test_a_run_whose_checkpoints_are_all_damaged_is_refused(tmp_path: Path) -> None:
    Setup().fit(batches(), steps=4, checkpoint_every=2, run=tmp_path / "run")
    for step in (2, 4):
        flip(tmp_path / "run" / f"checkpoint-{step:08d}" / "model.safetensors")
    with pytest.raises(
        CheckpointError, match="is whole: .*00004/model.safetensors is damaged.*00002/model.safetensors"
    ):
        Setup().fit(batches(), steps=5, run=tmp_path / "run", resume=True)


def test_a_checkpoint_without_checksums_is_one_of_an_earlier_version(tmp_path: Path) -> None:
    whole, resumed = Setup(), Setup()
    whole.fit(batches(), steps=5)
    Setup().fit(batches(), steps=4, run=tmp_path / "run")
    (tmp_path / "run" / "checkpoint-00000004" / "CRC32SUMS").unlink()
    resumed.fit(batches(), steps=5, run=tmp_path / "run", resume=True)
    assert_equal(resumed.state(), whole.state())


def test_a_damaged_marker_is_refused(tmp_path: Path) -> None:
    Setup().fit(batches(), steps=1, run=tmp_path / "run")
    (tmp_path / "run" / "fit.json").write_bytes(b'{"format": "matta.fit" "version": 2}')
    with pytest.raises(RunError, match="fit.json is damaged"):
        Setup().fit(batches(), steps=2, run=tmp_path / "run", resume=True)


def test_steps_that_are_not_finite_move_no_weight() -> None:
    x, y = batches()[0]
    bad = (torch.full_like(x, torch.inf), y)
    linear = lambda width: nn.Sequential(nn.Linear(6, width), nn.Linear(width, 1))  # noqa: E731
    ours, plain = Setup(make=linear), Setup(make=linear)
    result = ours.fit([(x, y), bad, bad, (x, y)], scheduler=None, max_nonfinite=3)
    assert (result.steps, result.num_skipped) == (4, 2)
    plain.fit([(x, y), (x, y)], scheduler=None)
    weights = [dict(each.nested.ta.named_parameters()) for each in (ours, plain)]
    for name, weight in weights[0].items():
        assert torch.isfinite(weight).all()
        torch.testing.assert_close(weight, weights[1][name], atol=0.01, rtol=0)  # the ramp has moved on
    with pytest.raises(RunError, match=r"not finite in 2 steps in a row, 2 to 3 \(last: epoch 0, batch 2, .*clip_norm"):
        Setup(make=linear).fit([(x, y), bad, bad], scheduler=None, max_nonfinite=2)
    steep = Setup(make=lambda width: Steep())
    assert steep.fit([(torch.zeros_like(x), y)], scheduler=None, clip_norm=1.0).num_skipped == 1
    assert steep.nested.ta.weight == 1


def test_steps_that_shampoo_skips_are_counted() -> None:
    """With a loss that is finite, and no clipping to look at the gradients."""
    x, y = batches()[0]
    steep = Setup(make=lambda width: Steep())
    steep.optimizer = matta.Shampoo(steep.nested, lr=0.01)
    result = steep.fit([(torch.zeros_like(x), y)] * 2, scheduler=None)
    assert (result.steps, result.num_skipped, result.losses) == (2, 2, {})
    with pytest.raises(RunError, match="the loss, or its gradient, was not finite in 2 steps in a row, 1 to 2"):
        steep.fit([(torch.zeros_like(x), y)] * 2, scheduler=None, max_nonfinite=2)
    assert steep.fit([(torch.zeros_like(x), y)] * 2, scheduler=None, max_nonfinite=None).num_skipped == 2


class Steep(nn.Module):
    """Finite at zero, with a gradient that is not."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        return (self.weight * x[:, 0]).sqrt() + (self.weight - 1).sqrt()


class Reads(TorchDispatchMode):
    """Counts how often the host reads a number of a tensor."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.count += function is torch.ops.aten._local_scalar_dense.default
        return function(*args, **(kwargs or {}))


def test_the_loop_does_not_wait_for_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("matta.training.reporting.REFRESH_SECONDS", math.inf)  # on a slow machine the bar reads often
    ours, plain = Setup(), Setup()
    plain.optimizer, ours.optimizer = (torch.optim.SGD(each.nested.parameters(), lr=0.1) for each in (plain, ours))
    data = [batches()[0]] * 60
    with Reads() as expected:
        for batch in data:
            plain.cotrain(batch).loss.backward()
    with Reads() as found:
        ours.fit(data, scheduler=None, max_nonfinite=None, clip_norm=1.0, log_every=20, progress=True)
    assert found.count <= expected.count + 20  # by far less than one for each of the 60 steps


TRACKED = (
    *("loss/student", "loss/ta", "loss/distill", "learning_rate", "distill_weight", "skipped_steps"),
    *("steps_per_second", *(f"seconds_per_step/{part}" for part in PARTS)),
)


def test_tensorboard_has_the_losses(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    settings = {"tensorboard": True, "run": tmp_path / "run", "log_every": 2, "evaluate": draw_and_judge}
    Setup().fit(batches(), steps=4, **settings)
    Setup().fit(batches(), steps=8, resume=True, **settings)
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    names = set(TRACKED)
    assert set(events.Tags()["scalars"]) == {*names, "evaluation/loss"}
    assert [each.step for each in events.Scalars("loss/ta")] == [2, 4, 6, 8]
    assert [each.step for each in events.Scalars("evaluation/loss")] == [4, 8]
    assert [round(each.value, 4) for each in events.Scalars("distill_weight")] == [0.0, 0.2, 0.6, 1.0]
    rates = [each.value for each in events.Scalars("learning_rate")]
    assert rates == pytest.approx([0.01 * 0.9**step for step in (1, 3, 5, 7)])  # those that the steps were made with


def test_trackers_of_accelerate_get_the_same_values(tmp_path: Path) -> None:
    from accelerate import Accelerator
    from accelerate.tracking import GeneralTracker

    class Kept(GeneralTracker):
        name, requires_logging_directory, tracker = "kept", False, None

        def __init__(self) -> None:
            super().__init__()
            self.values: list[tuple[int, set[str]]] = []
            self.is_finished = False

        def log(self, values: dict[str, float], step: int | None = None, **_: object) -> None:
            self.values.append((step or 0, set(values)))

        def finish(self) -> None:
            self.is_finished = True

    kept = Kept()
    accelerator = Accelerator(cpu=True, log_with=kept)
    accelerator.init_trackers("ranker")
    settings = {"log_every": 2, "clip_norm": 1.0, "evaluate": draw_and_judge}
    Setup().fit(batches(), steps=4, accelerator=accelerator, **settings)
    names = {*TRACKED, "gradient_norm"}
    assert kept.values == [(2, names), (4, names), (4, {"evaluation/loss"})]
    assert not kept.is_finished  # it is the user's to finish


def test_the_bar_shows_the_losses_and_the_weight(capsys: pytest.CaptureFixture[str]) -> None:
    Setup().fit(batches(), steps=4, progress=True)
    shown = capsys.readouterr()
    assert shown.out == ""
    for word in ("student", "ta", "distill", "ω", "4/4"):
        assert word in shown.err


def test_modes_are_put_back() -> None:
    ours = Setup()
    ours.cotrain.eval()
    ours.nested.ta.norm.train()
    ours.fit(batches(), evaluate=draw_and_judge, evaluate_every=2)
    assert not ours.cotrain.training and not ours.nested.student.training and ours.nested.ta.norm.training
    with evaluating(ours.nested):
        assert not ours.nested.ta.norm.training
    assert ours.nested.ta.norm.training
    assert all(parameter.grad is None for parameter in ours.nested.parameters())


def test_drawing_numbers_can_be_kept_apart() -> None:
    seed_all(0)
    expected = random.random(), numpy.random.rand(), torch.rand(()).item()
    seed_all(0)
    with random_state_kept():
        assert (random.random(), numpy.random.rand(), torch.rand(()).item()) == expected
    assert (random.random(), numpy.random.rand(), torch.rand(()).item()) == expected


PLATEAU = torch.optim.lr_scheduler.ReduceLROnPlateau(torch.optim.SGD([nn.Parameter(torch.ones(1))]))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": 3, "epochs": 2}, "received steps=3 and epochs=2; expected one of them"),
        ({"steps": 0}, "received steps=0; expected a whole number from 1 up"),
        ({"checkpoint_every": 0}, "received checkpoint_every=0; expected a whole number"),
        ({"clip_norm": 0.0}, "received clip_norm=0.0; expected a number over 0"),
        ({"precision": "fp8"}, "received precision='fp8'; expected 'no' or 'bf16'"),
        ({"best": ("loss", "low"), "evaluate": dict}, "received best=.* expected such as"),
        ({"evaluate_every": 3}, "without evaluate; expected evaluate="),
        ({"patience": 3, "evaluate": dict}, "received patience=3 without best= and evaluate_every=; expected both"),
        ({"patience": 0}, "received patience=0; expected a whole number"),
        ({"resume": True, "run": None}, "resume=True without run; expected run="),
        ({"data": endless(), "epochs": 2}, "an iterator and epochs=2, .* or steps="),
        ({"data": TensorDataset(torch.zeros(3))}, "data of type TensorDataset; expected batches: a DataLoader"),
        ({"data": []}, "the data gave no batch"),
        ({"optimizer": torch.optim.SGD([nn.Parameter(torch.ones(1))])}, "no parameter of the nesting; expected nested"),
        ({"best": ("auc", "max"), "evaluate": draw_and_judge}, "best names 'auc', and evaluate gave: loss"),
        ({"evaluate": lambda nested: 0.5}, "evaluate gave 0.5; expected numbers by name"),
        ({"evaluate": lambda nested: {"all": torch.ones(2)}}, "evaluate gave {'all': tensor.*; expected numbers by"),
        ({"evaluate": 0.5}, "received float as evaluate; expected a matta.Evaluation, or a function"),
        ({"optimizer": torch.optim.SGD}, "received the class SGD as optimizer; expected an optimizer of nested"),
        ({"optimizer": torch.optim.LBFGS([nn.Parameter(torch.ones(1))])}, "received LBFGS, which needs"),
        ({"scheduler": torch.optim.lr_scheduler.StepLR}, "received the class StepLR as scheduler; expected"),
        ({"scheduler": PLATEAU}, "received ReduceLROnPlateau, which needs a metric"),
        ({"observers": matta.ProgressiveValidation()}, "received ProgressiveValidation as observers; expected a list"),
        ({"cotrain": nn.Linear(1, 1)}, "received Linear as cotrain; expected matta.CoTraining"),
    ],
    ids=lambda value: None if isinstance(value, dict) else value[:20],
)
def test_settings_that_cannot_work_are_refused(settings: dict, message: str, tmp_path: Path) -> None:
    ours = Setup()
    arguments = {"cotrain": ours.cotrain, "data": batches(), "optimizer": ours.optimizer, **settings}
    with pytest.raises(MattaError, match=message):
        matta.fit(**{"run": tmp_path / "run", "progress": False, **arguments})
    began = arguments["data"] == [] or "evaluate gave" in message  # what only turns out when the run goes on
    assert (tmp_path / "run").exists() == began


def test_parameters_that_the_optimizer_lacks_are_told() -> None:
    pair = matta.nest(Tower(4), Tower(8), share="none")
    cotrain = matta.CoTraining(pair, matta.objectives.Binary())
    optimizer = torch.optim.SGD(pair.ta.parameters(), lr=0.1)
    with pytest.warns(UserWarning, match=r"does not hold nested.students.0.* and \d+ more, which stay as they are"):
        matta.fit(cotrain, batches(), optimizer, steps=1, progress=False)
    pair.students.requires_grad_(False)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        matta.fit(cotrain, batches(), optimizer, steps=1, progress=False)
        Setup().fit(batches(), steps=1)


@pytest.mark.parametrize(("most", "warned"), [(3, True), (10, False)])
def test_a_schedule_made_for_epochs_is_told(most: int, warned: bool) -> None:
    ours = Setup()
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(ours.optimizer, T_max=most)
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        ours.fit(batches(), epochs=2, scheduler=schedule)
    told = [str(each.message) for each in found if "T_max is 3, and the run has 10 steps" in str(each.message)]
    assert bool(told) == warned


def test_what_does_not_belong_together_is_refused() -> None:
    with pytest.raises(RunError, match="the scheduler belongs to another optimizer"):
        Setup().fit(batches(), scheduler=Setup().scheduler)
    with pytest.raises(RunError, match=r"accumulate=4 for a CoTraining\(accumulate=2\); .* leave it out of one"):
        Setup(accumulate=2).fit(batches(), accumulate=4)
    with pytest.raises(RunError, match="ended before the first step, which takes accumulate=8 batches; expected"):
        Setup().fit(batches(), accumulate=8)


def test_a_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "accelerate", None)
    with pytest.raises(RunError, match=r"needs accelerate, .* pip install 'matta\[fit\]'"):
        Setup().fit(batches())


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def double(width: int) -> nn.Module:
    return nn.Sequential(nn.Linear(6, width), nn.Tanh(), nn.Linear(width, 1)).double()


def halves(rank: int | None) -> list[Pair]:
    """Batches of 8 for one process, or this process's half of each, in the order in which they are dealt."""
    whole = [(x.double(), y.double()) for x, y in batches()]
    if rank is None:
        return whole
    return [(x[side], y[side]) for x, y in whole for side in (slice(0, 4), slice(4, 8))]


def work(rank: int, port: int, folder: Path) -> None:
    """A process of two."""
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "ACCELERATE_USE_CPU": "true"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    setup = Setup(make=double)
    judge = matta.Evaluation(data=halves(None), objective=matta.objectives.Binary())
    result = setup.fit(halves(rank), steps=6, accumulate=2, clip_norm=0.5, evaluate=judge)
    loader = Setup(make=double)
    dataset = TensorDataset(*(each.double() for each in examples()))
    settings = {"run": folder / "run", "checkpoint_every": 2, "resume": True}
    stopped = Setup(make=double)
    stop_at(4, fail)(stopped)
    loader.fit(shuffled(dataset), steps=5)
    with pytest.raises(Stopped):
        stopped.fit(shuffled(dataset), steps=5, **settings)
    resumed = Setup(make=double)
    resumed.fit(shuffled(dataset), steps=5, **settings)
    assert_equal(loader.state(), resumed.state())
    torch.save({"weights": setup.state(), "loader": loader.state(), "loss": result.evaluations[-1].values},
               folder / f"{rank}.pt")  # fmt: skip
    torch.distributed.destroy_process_group()


@pytest.mark.stress  # test_processes and test_interrupts run two in `make test`
def test_two_processes_equal_one_with_double_batches(tmp_path: Path) -> None:
    multiprocessing.spawn(work, (free_port(), tmp_path), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    for name in ("weights", "loader"):
        assert_equal(first[name], second[name])
    assert first["loss"] == second["loss"]
    one = Setup(make=double)
    one.fit(halves(None), steps=6, accumulate=2, clip_norm=0.5)
    for name, tensor in one.state().items():
        torch.testing.assert_close(tensor, first["weights"][name], atol=1e-6, rtol=0)
