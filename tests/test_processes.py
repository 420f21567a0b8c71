"""Several processes equal one: every label weighs the same, what is shown is of all, and no launcher goes unnoticed."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from datetime import timedelta
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from torch import Tensor, distributed, nn
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset, TensorDataset
from torchdata.stateful_dataloader import StatefulDataLoader

import matta
from matta.cli import main
from matta.errors import NestingError, RunError
from matta.training.feeding import Feed
from matta.training.processes import make_accelerator, num_launched, require_all
from matta.training.randomness import random_state
from matta.training.run_folder import RunFolder
from test_fitting import free_port

Pair = tuple[Tensor, Tensor]
LAUNCHERS = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "ACCELERATE_USE_CPU", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*LAUNCHERS, "SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)


def batches() -> list[Pair]:
    """Twelve batches of which ever more is ignored, of some all, and a short one."""
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(48, 5, generator=generator), torch.rand(48, generator=generator).round()
    y[torch.rand(48, generator=generator) < torch.linspace(0, 1, 48)] = -100
    y[8:12] = -100
    parts = list(zip(x.split(4), y.split(4), strict=True))
    return [*parts[:-1], (parts[-1][0][:3], parts[-1][1][:3])]


def whole(count: int) -> list[Pair]:
    """The same in larger batches, of `count` each."""
    groups = zip(*[iter(batches())] * count, strict=True)
    return [(torch.cat([x for x, _ in group]), torch.cat([y for _, y in group])) for group in groups]


def tower(width: int) -> nn.Module:
    return nn.Sequential(nn.Linear(5, width), nn.Tanh(), nn.Linear(width, 1))


class Trained:
    """A run by SGD in float32, and what it shows."""

    def __init__(self, data: Any, *, lr: float = 0.5, in_turns: bool = False, **settings: Any) -> None:
        torch.manual_seed(0)
        nested = matta.nest(tower(4), tower(8), warm_start=in_turns, private=["2.bias"])
        ramp, turns = matta.Ramp(start=0, steps=3), matta.Turns(alone_steps=2) if in_turns else None
        sample = matta.random_sub_model(nested) if in_turns else None
        cotrain = matta.CoTraining(nested, matta.objectives.Binary(), ramp=ramp, turns=turns, sample=sample)
        optimizer = torch.optim.SGD(nested.parameters(), lr)
        self.validation = matta.ProgressiveValidation(window=20)
        observers = [*([] if in_turns else [self.validation]), *settings.pop("observers", [])]
        self.result = matta.fit(cotrain, data, optimizer, observers=observers, progress=False, **settings)
        self.weights = {name: weight.detach() for name, weight in nested.named_parameters()}

    def shown(self) -> dict[str, Any]:
        judged = self.validation.values() if self.validation.names else {}
        return {"weights": self.weights, "losses": self.result.losses, "steps": self.result.steps, "judged": judged}


class Ranker(nn.Module):
    """Rows of a table, looked up one by one or as bags, a block, and heads."""

    def __init__(self, width: int, *, bags: bool, sparse: bool, heads: Sequence[str]) -> None:
        super().__init__()
        self.table = (nn.EmbeddingBag if bags else nn.Embedding)(30, width, sparse=sparse)
        self.blocks = nn.ModuleList([nn.Linear(width, width)])
        self.heads = nn.ModuleDict({name: nn.Linear(width, 1) for name in heads})

    def forward(self, ids: Tensor) -> dict[str, Tensor]:
        found = self.table(ids)
        found = self.blocks[0](found if found.ndim == 2 else found.mean(1))
        return {name: head(found) for name, head in self.heads.items()}


def events() -> list[dict[str, Any]]:
    """Eight batches of weighted events, which ever more weigh, and of which the last is short; few have a time."""
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(30, (32, 3), generator=generator)
    click, watch_s = (
        torch.randint(2, (32,), generator=generator).double(),
        torch.rand(32, 1, generator=generator).double(),
    )
    watch_s[::3], click[5:8] = -100.0, -100.0
    weights = torch.rand(32, generator=generator).double() * torch.linspace(0, 4, 32)
    weights[12:16] = 0
    parts = zip(*(each.split([4] * 7 + [3, 1]) for each in (ids, click, watch_s, weights)), strict=True)
    found = [{"ids": a, "labels": {"click": b, "watch_s": c}, "importance": d} for a, b, c, d in parts]
    return found[:8]


OPTIMIZERS: dict[str, Any] = {
    "sgd": lambda nested: torch.optim.SGD(nested.parameters(), 0.3),
    "adagrad": lambda nested: torch.optim.Adagrad(nested.parameters(), 0.1),
    "shampoo": lambda nested: matta.Shampoo(nested, lr=0.05),
}
HEADS = ("click", "watch_s")
EVENTS: dict[str, dict[str, Any]] = {
    "weights": {"heads": HEADS[:1]},
    "heads": {},
    "weights, sparse": {"heads": HEADS[:1], "sparse": True},
    "heads, sparse": {"sparse": True},
    "sparse bags": {"sparse": True, "bags": True},
    "sparse bags, adagrad": {"sparse": True, "bags": True, "optimizer": "adagrad"},
    "sparse bags, shampoo": {"sparse": True, "bags": True, "optimizer": "shampoo"},
}
"""Weighted events for one head or two, over tables with sparse gradients or others."""


class Ranked:
    """A run over events by `Heads`, or by the click alone; `by` says how it is sharded."""

    def __init__(
        self,
        *,
        heads: Sequence[str] = HEADS,
        alone: bool = False,
        bags: bool = False,
        sparse: bool = False,
        optimizer: str = "sgd",
        by: Any = None,
        **settings: Any,
    ) -> None:
        torch.manual_seed(0)
        pair = (Ranker(width, bags=bags, sparse=sparse, heads=heads) for width in (3, 5))
        nested = matta.nest(*pair).double()
        click, watch_s = matta.objectives.Binary(), matta.objectives.Huber(ignore_index=-100)
        both = matta.objectives.Heads({"click": (click, 1.0), "watch_s": (watch_s, 0.5)}, weights="importance")
        alone = alone or len(heads) == 1
        objective = matta.objectives.Binary(weights="importance") if alone else both
        cotrain = matta.CoTraining(nested, objective, logits="click" if alone else None)
        if by is not None:
            matta.shard(cotrain, by=by)
        data = [{**each, "labels": each["labels"]["click"]} for each in events()] if alone else events()
        quiet = {"progress": False, "tensorboard": False, "clip_norm": 0.1, "log_every": 2}
        result = matta.fit(cotrain, data, OPTIMIZERS[optimizer](nested), epochs=2, **quiet, **settings)
        found = {name: each.full_tensor() if by else each for name, each in nested.named_parameters()}
        weights = {name: each.detach() for name, each in found.items()}
        self.shown = {"weights": weights, "losses": result.losses}


def check_events() -> dict[str, Any]:
    """What one of two processes shows of runs over events; and what is refused before the first step."""
    found = {name: Ranked(**options).shown for name, options in EVENTS.items()}
    for by in ("block", "whole"):
        found |= {f"{name} by {by}": Ranked(**EVENTS[name], by=by).shown for name in ("weights", "heads")}
    with pytest.raises(
        RunError, match=r"no loss depends on nested.ta.heads.watch_s.weight, .*find_unused_parameters=True"
    ):
        Ranked(alone=True)
    unused = Accelerator(cpu=True, kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)])
    found["unused"] = Ranked(alone=True, accelerator=unused).shown
    with pytest.raises(NestingError, match="received table, a table with sparse gradients, to be sharded by FSDP2"):
        Ranked(sparse=True, by="block")
    by_hand = matta.CoTraining(matta.nest(tower(4), tower(8)), matta.objectives.Binary())
    by_hand.nested.ta.append(nn.Embedding(2, 2, sparse=True))
    fully_shard(by_hand)
    with pytest.raises(NestingError, match="received 3, a table with sparse gradients"):
        by_hand(batches()[0])
    return found


def loader(generator: torch.Generator) -> DataLoader[Any]:
    data = TensorDataset(*(torch.cat(each)[:40] for each in zip(*batches(), strict=True)))
    return DataLoader(data, batch_size=4, shuffle=True, generator=generator)


class Endless(IterableDataset[Any]):
    def __iter__(self) -> Any:
        return iter(())


SHUFFLED = {
    "list": lambda: batches()[:8],
    "loader": lambda: loader(torch.Generator().manual_seed(5)),
}
"""Data whose order does not depend on how many processes share it."""


class Stopped(Exception):
    """What stops a run in these tests."""


class StopAfter:
    """An observer that stops a run after some steps."""

    def __init__(self, step: int) -> None:
        self.left = step

    def before_step(self, *_: object) -> None:
        pass

    def after_step(self, cotrain: object) -> None:
        self.left -= 1
        if not self.left:
            raise Stopped

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


class Idle(StopAfter):
    def after_step(self, cotrain: object) -> None:
        pass


def begun(folder: str, name: str, *, stop: int) -> dict[str, Any]:
    """Settings of a run that stops after a step, without having saved it."""
    run = {"run": Path(folder, name), "checkpoint_every": 1, "tensorboard": False}
    return {**run, "steps": 7, "log_every": 2, "observers": [StopAfter(stop)]}


def resumed(folder: str, name: str) -> dict[str, Any]:
    return {**begun(folder, name, stop=0), "observers": [Idle(0)], "resume": True}


def check_full_disk(folder: Path) -> None:
    """The main process cannot write, and all say so."""
    write = RunFolder._write
    RunFolder._write = full  # type: ignore[method-assign]
    told = "" if os.environ["RANK"] == "0" else r"process 0 of \d failed: "
    with pytest.raises(RunError, match=rf"^{told}a checkpoint could not be written to .*No space left on device"):
        Trained(batches(), run=folder / "full", checkpoint_every=1, tensorboard=False)
    RunFolder._write = write  # type: ignore[method-assign]


def full(*_: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def work(folder: str) -> None:
    """A process of several, as torchrun starts it."""
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    snapshots = matta.Snapshots(Path(folder, "published"), every_events=10)
    once = Trained(batches(), clip_norm=0.1, observers=[snapshots], run=Path(folder, "run"), tensorboard=False)
    plain = DataLoader(TensorDataset(*(torch.cat(each) for each in zip(*batches(), strict=True))), batch_size=4)
    found = {"once": once.shown(), "loader": Trained(plain, clip_norm=0.1).shown()}
    found["turns"] = Trained(batches(), in_turns=True, log_every=4).shown()
    if world == 2:
        found["twice"] = Trained(batches(), accumulate=2, log_every=3).shown()
    if world == 2:
        for name, make in SHUFFLED.items():
            with suppress(Stopped):
                Trained(make(), **begun(folder, f"two, {name}", stop=3), accumulate=2)
            found[f"changed {name}"] = Trained(make(), **resumed(folder, f"one, {name}"), accumulate=2).shown()
        found |= check_events()
    check_full_disk(Path(folder))
    share = make_accelerator().prepare_data_loader(plain)
    with pytest.raises(RunError, match="gives each process its share"):
        matta.Evaluation(data=share, objective=matta.objectives.Binary())(matta.nest(tower(4), tower(8)))
    torch.save(found, Path(folder, f"{rank}.pt"))


def go_on(folder: str, stop: int) -> None:
    """A process of several that begins a run or goes on with it, and stops it after some steps."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    with suppress(Stopped):
        settings = {**begun(folder, "chain", stop=stop), "resume": True}
        found = Trained(SHUFFLED["list"](), **settings, accumulate=4 // world).shown()
        torch.save(found, Path(folder, f"chain-{os.environ.get('RANK', '0')}.pt"))


def evaluate_longer_than_messages_wait(folder: str, seconds: float) -> None:
    """A process of several, of which the main one evaluates for longer than torch waits for a message."""
    distributed.init_process_group("gloo", timeout=timedelta(seconds=seconds))

    def evaluate(_: Any) -> dict[str, float]:
        time.sleep(1.2 * seconds)
        return {"loss": 0.5}

    result = Trained(batches(), evaluate=evaluate).result
    Path(folder, os.environ["RANK"]).write_text(str([each.values for each in result.evaluations]), encoding="utf-8")


def torchrun(world: int, folder: Path, call: str = "") -> subprocess.CompletedProcess[str]:
    """Run `work`, or another call, in processes that nothing but the launcher tells of each other."""
    script = folder / "script.py"
    call = call or f"work({str(folder)!r})"
    code = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
    code += f"import test_processes\ntest_processes.{call}\n"
    script.write_text(code, encoding="utf-8")
    command = ["-m", "torch.distributed.run", f"--nproc-per-node={world}", f"--master-port={free_port()}", str(script)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize("world", [2, pytest.param(3, marks=pytest.mark.stress)])
def test_processes_equal_one_whatever_labels_they_ignore(world: int, tmp_path: Path) -> None:
    for name, make in SHUFFLED.items():
        with suppress(Stopped):
            Trained(make(), **begun(str(tmp_path), f"one, {name}", stop=3), accumulate=4)
    ended = torchrun(world, tmp_path)
    assert ended.returncode == 0, ended.stderr[-3000:]
    first, *others = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(world))
    for other in others:
        torch.testing.assert_close(other, first, atol=0, rtol=0)
    alone = Trained(batches(), accumulate=world, clip_norm=0.1).shown()
    for name in ("once", "loader"):
        torch.testing.assert_close(first[name], alone, atol=1e-6, rtol=1e-5)
    if world == 2:
        for name, make in SHUFFLED.items():
            whole_run = Trained(make(), steps=7, accumulate=4, log_every=2).shown()
            again = Trained(make(), **resumed(str(tmp_path), f"two, {name}"), accumulate=4).shown()
            for changed in (again, first[f"changed {name}"]):
                for part in ("weights", "losses", "steps"):
                    torch.testing.assert_close(changed[part], whole_run[part], atol=1e-6, rtol=1e-5)
    in_turns = Trained(batches(), accumulate=world, in_turns=True, log_every=4).shown()
    torch.testing.assert_close(first["turns"], in_turns, atol=1e-6, rtol=1e-5)
    if world == 2:
        four = Trained(batches(), accumulate=4, log_every=3).shown()
        torch.testing.assert_close(first["twice"], four, atol=1e-6, rtol=1e-5)
    if world == 2:
        expected = {name: Ranked(**options, accumulate=2).shown for name, options in EVENTS.items()}
        sharded = {f"{name} by {by}": expected[name] for name in ("weights", "heads") for by in ("block", "whole")}
        unused = {"unused": Ranked(alone=True, accumulate=2).shown}
        for name, shown in (expected | sharded | unused).items():
            torch.testing.assert_close(first[name], shown, atol=1e-9, rtol=0)
    newest = matta.read_snapshot(tmp_path / "published", lambda: tower(4))
    assert (newest.version, newest.events) == {2: (3, 47), 3: (4, 47)}[world]


@pytest.mark.stress
def test_two_then_one_then_four_processes_are_one_run(tmp_path: Path) -> None:
    for world, stop in ((2, 3), (1, 3), (4, 99)):
        if world == 1:
            go_on(str(tmp_path), stop)
            continue
        ended = torchrun(world, tmp_path, f"go_on({str(tmp_path)!r}, {stop})")
        assert ended.returncode == 0, ended.stderr[-3000:]
    whole_run = Trained(SHUFFLED["list"](), steps=7, accumulate=4, log_every=2).shown()
    for rank in range(4):
        found = torch.load(tmp_path / f"chain-{rank}.pt", weights_only=True)
        for part in ("weights", "losses", "steps"):
            torch.testing.assert_close(found[part], whole_run[part], atol=1e-6, rtol=1e-5)


@pytest.mark.stress
def test_the_others_wait_for_an_evaluation_as_long_as_it_takes(tmp_path: Path) -> None:
    ended = torchrun(2, tmp_path, f"evaluate_longer_than_messages_wait({str(tmp_path)!r}, 30)")
    assert ended.returncode == 0, ended.stderr[-3000:]
    assert [Path(tmp_path, rank).read_text(encoding="utf-8") for rank in "01"] == ["[{'loss': 0.5}]"] * 2


def test_one_process_weighs_every_label_of_a_step_alike() -> None:
    for count in (2, 3, 4):
        parts, together = Trained(batches(), accumulate=count), Trained(whole(count))
        torch.testing.assert_close(parts.shown(), together.shown(), atol=1e-6, rtol=1e-5)


def test_logged_losses_are_means_over_labels() -> None:
    parts, together = (Trained(data, lr=0.0, log_every=12).result.losses for data in (batches(), whole(12)))
    assert parts == pytest.approx(together)


def one_of_three(rank: int = 0) -> SimpleNamespace:
    """What `Feed` sees of Accelerate in one of three processes."""
    return SimpleNamespace(
        device=torch.device("cpu"), process_index=rank, num_processes=3, split_batches=False, even_batches=True
    )


def test_lists_are_shared_out_batch_by_batch() -> None:
    data = [(torch.full((1,), float(index)), torch.zeros(1)) for index in range(8)]
    for rank in range(3):
        feed = Feed(data, one_of_three(rank), None)
        assert feed.num_batches() == 2
        assert [int(x) for x, _ in islice(feed, 4)] == [rank, 3 + rank, rank, 3 + rank], "what is left over is left out"
        resumed = Feed(data, one_of_three(rank), None)
        state = {"epoch": 0, "batch": 1, "start": feed.state()["start"], "now": feed.state()["now"]}
        resumed.resume([state] * 3)
        assert int(next(iter(resumed))[0]) == 3 + rank


def test_a_loader_is_prepared_without_samples_dealt_twice() -> None:
    seen = []

    def prepare(loader: Any) -> Any:
        seen.append(accelerator.even_batches)
        return loader

    accelerator = one_of_three()
    accelerator.prepare_data_loader = prepare
    data = TensorDataset(torch.zeros(36, 2), torch.zeros(36))
    loader = DataLoader(data, batch_size=4)
    assert Feed(loader, accelerator, 1).num_batches() == 9
    assert seen == [False] and accelerator.even_batches
    uneven = Feed(DataLoader(data, batch_size=9), accelerator, None)
    assert len(list(islice(uneven, 4))) == 4
    with pytest.raises(RunError, match="KeepsItsPlace, which keeps its own place, in 3 processes; .* shard"):
        Feed(KeepsItsPlace([1]), accelerator, None)


class KeepsItsPlace:
    """An iterator with a state, which cannot be shared out."""

    def __init__(self, values: list[int]) -> None:
        self.values = iter(values)

    def __iter__(self) -> KeepsItsPlace:
        return self

    def __next__(self) -> int:
        return next(self.values)

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


def test_batches_that_do_not_divide_are_refused_before_the_first_step() -> None:
    three = one_of_three()
    data = TensorDataset(torch.zeros(32, 2), torch.zeros(32))
    for uneven in (DataLoader(data, batch_size=4), [(torch.zeros(1, 2), torch.zeros(1))] * 8):
        with pytest.raises(RunError, match="8 batches for 3 processes, which leave 2 over; .* drop_last=True"):
            Feed(uneven, three, 1)
    with pytest.raises(RunError, match="DistributedSampler, .* leave sampler= out"):
        Feed(DataLoader(data, sampler=DistributedSampler(data, 3, 0)), three, None)


@pytest.mark.parametrize(
    ("make", "states", "message"),
    [
        (lambda: loader(torch.Generator()), {"generators": []}, "expected as many, or a DataLoader with a generator"),
        (lambda: loader(torch.Generator()), {"batch": 3}, "and 3 batches of a pass are done; expected as many"),
        (
            lambda: DataLoader(Endless(), batch_size=4),
            {},
            "map-style dataset: a DataLoader over Endless gives them other",
        ),
        (
            lambda: StatefulDataLoader(TensorDataset(torch.zeros(48)), 4, generator=torch.Generator()),
            {},
            "a StatefulDataLoader over TensorDataset gives them other batches",
        ),
        (lambda: batches()[:9], {}, "a pass of 9 batches is not a multiple of both"),
    ],
)
def test_other_processes_are_refused_where_they_would_see_other_samples(
    make: Any, states: dict[str, Any], message: str
) -> None:
    state = {"epoch": 0, "batch": states.get("batch", 2), "start": {}}
    state["now"] = {
        "global": random_state(),
        "generators": states.get("generators", [None] * (type(make()) is not list)),
    }
    two = SimpleNamespace(**{**vars(one_of_three()), "num_processes": 2, "prepare_data_loader": lambda each: each})
    with pytest.raises(RunError, match=rf"begun in 1 process\(es\), and now there are 2.*{message}"):
        Feed(make(), two, None).resume([state])


@pytest.mark.parametrize("variable", ["WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_STEP_NUM_TASKS"])
def test_a_launcher_is_noticed(
    variable: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert num_launched() == 1
    monkeypatch.setenv(variable, "2")
    with pytest.raises(RunError, match="started 2 processes, and Accelerate joins 1, .* torchrun"):
        require_all(SimpleNamespace(num_processes=1))  # type: ignore[arg-type]
    require_all(SimpleNamespace(num_processes=2))  # type: ignore[arg-type]
    for command in (["extract", "run", "--out", "x"], ["study", "quality"], ["plan", "recipe"], ["evaluate", "gpt2"]):
        assert main(command) == 2
        assert "works in one process, and the launcher started 2" in capsys.readouterr().err


def test_an_accelerator_of_ones_own_that_is_alone_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from accelerate import Accelerator

    alone = Accelerator()
    monkeypatch.setenv("WORLD_SIZE", "2")
    for settings in ({"accelerator": alone}, {}):
        with pytest.raises(RunError, match="the launcher started 2 processes"):
            Trained(batches(), run=tmp_path / "run", **settings)
    assert not (tmp_path / "run").exists()


def test_processes_that_accelerate_did_not_start_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")  # what `accelerate launch --cpu --num_processes 2` leaves
    with pytest.warns(UserWarning, match="asked for several processes and started one"):
        assert make_accelerator().num_processes == 1
