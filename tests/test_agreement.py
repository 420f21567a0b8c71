"""Processes that are told different things end with one line, and those whose data ends apart end together."""

from __future__ import annotations

import shutil
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed, nn
from torch.utils.data import DataLoader, TensorDataset

import matta
from matta.errors import CheckpointError, RunError
from matta.training import run_folder
from test_checkpoint_shares import joined
from test_fitting import Setup, assert_equal, batches, examples


def tower(width: int) -> nn.Module:
    return nn.Sequential(nn.Linear(6, width), nn.Tanh(), nn.Linear(width, 1))


def loaded(count: int, size: int) -> DataLoader[Any]:
    return DataLoader(TensorDataset(*(each[:count] for each in examples())), batch_size=size)


def judge(_: object) -> dict[str, float]:
    return {"loss": 1.0}


def judged(count: int) -> matta.Evaluation:
    return matta.Evaluation(data=batches()[:count], objective=matta.objectives.Binary())


APART: dict[str, tuple[Any, Any]] = {
    "steps": (4, 6),
    "evaluate_every": (2, None),
    "evaluate": (judge, None),
    "evaluate.data": (lambda: judged(2), lambda: judged(3)),
    "run": ("runs/1", "runs/2"),
    "clip_norm": (None, 0.5),
    "batches": (lambda: loaded(32, 8), lambda: loaded(32, 4)),
    "optimizer.param_groups[0].lr": (0.01, 0.02),
    "cotrain.objective": (matta.objectives.Binary(), matta.objectives.SquaredError()),
    "nested.ta.0.weight": (8, 9),
}
"""What the first process is given, and the second."""


def fit(given: dict[str, Any], **settings: Any) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    nested = matta.nest(tower(4), tower(given.get("nested.ta.0.weight", 8)))
    cotrain = matta.CoTraining(nested, given.get("cotrain.objective", matta.objectives.Binary()))
    optimizer = torch.optim.Adam(nested.parameters(), lr=given.get("optimizer.param_groups[0].lr", 0.01))
    names = ("steps", "evaluate", "evaluate_every", "run", "clip_norm")
    settings |= {name: given[name] for name in names if name in given}
    if "evaluate.data" in given:
        settings["evaluate"] = given["evaluate.data"]()
    data = given["batches"]() if "batches" in given else settings.pop("data", batches()[:4])
    settings = {"steps": 4, "progress": False, "tensorboard": False, **settings}
    matta.fit(cotrain, data, optimizer, **settings)
    return {name: each.detach() for name, each in nested.named_parameters()}


def check_calls(rank: int) -> None:
    for name, values in APART.items():
        given = {name: values[rank]}
        if name == "evaluate_every":
            given["evaluate"] = judge
        with pytest.raises(RunError, match="expected the same call of matta.fit in all processes") as told:
            fit(given)
        assert str(told.value).startswith(f"process 1 of 2 was given {name}="), told.value


class Sharded:
    """An iterator that shares itself out, but not evenly."""

    def __init__(self, ends: tuple[int, int]) -> None:
        self.ends, self.rank, self.place = ends, 0, 0

    def shard(self, rank: int, num_ranks: int) -> None:
        self.rank = rank

    def __iter__(self) -> Sharded:
        return self

    def __next__(self) -> tuple[torch.Tensor, torch.Tensor]:
        if self.place == self.ends[self.rank]:
            raise StopIteration
        self.place += 1
        return batches()[self.place - 1]

    def state_dict(self) -> dict[str, Any]:
        return {"place": self.place}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.place = state["place"]


def check_ends(rank: int, path: Path) -> None:
    """Three steps are made by both, of data that has more for one of them."""
    expected = fit({}, data=[each for each in batches() for _ in range(2)], steps=3)
    for first, second in ((3, 5), (5, 3)):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            found = fit({}, data=Sharded((first, second)), steps=None, run=path / f"ends-{first}")
        told = [str(each.message) for each in caught if "has ended" in str(each.message)]
        assert len(told) == (rank == 0) and all("the data of 1 of 2 processes has ended" in each for each in told)
        torch.testing.assert_close(found, expected)
    own = (each for index in range(6 + 4 * rank) for each in [batches()[index // 2 % 5]])
    torch.testing.assert_close(fit({}, data=own, steps=None), expected)


class Unsized:
    """Evaluation data whose length shows at its end."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __iter__(self) -> Iterator[Any]:
        return iter(batches()[: self.count])


def check_evaluation(rank: int) -> None:
    for counts in ((5, 2), (2, 5), (3, 3)):
        evaluation = matta.Evaluation(data=Unsized(counts[rank]), objective=matta.objectives.Binary())
        if counts[0] != counts[1]:
            with pytest.raises(RunError, match="data of 1 of 2 processes has ended.*; expected the same data"):
                fit({}, evaluate=evaluation)
            continue
        fit({}, evaluate=evaluation)


def check_damage(rank: int, path: Path) -> None:
    """The second process alone cannot read the newest checkpoint: both resume from the one before."""
    run = path / "run"
    fit({}, run=run, checkpoint_every=2)
    shutil.rmtree(run / "nested") if rank == 0 else None
    expected = fit({}, steps=6)
    verify = run_folder.verify

    def unreadable(folder: Path) -> None:
        if rank == 1 and folder.name == "checkpoint-00000004":
            raise CheckpointError(f"{folder} cannot be read here")
        verify(folder)

    run_folder.verify = unreadable  # type: ignore[assignment]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.testing.assert_close(fit({}, steps=6, run=run, resume=True), expected, rtol=0, atol=0)
    told = [str(each.message) for each in caught if "cannot be read here" in str(each.message)]
    assert len(told) == (rank == 0) and all("checkpoint-00000002, which is whole" in each for each in told)
    run_folder.verify = verify


def check_beginning(rank: int, path: Path) -> None:
    """The main process alone cannot write to the folder: it is told by both."""
    (path / "file").write_text("")
    with pytest.raises((OSError, RunError)) as told:
        fit({}, run=path / "file" / "run")
    assert ("process 0 of 2 failed" in str(told.value)) == (rank == 1)


def work(rank: int, folder: str) -> None:
    joined(rank, 2, folder, "store")
    try:
        check_calls(rank)
        check_ends(rank, Path(folder))
        check_evaluation(rank)
        check_damage(rank, Path(folder))
        check_beginning(rank, Path(folder))
    finally:
        distributed.destroy_process_group()


def test_two_processes_agree_or_end(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(work, (str(tmp_path),), nprocs=2)


def where_gradients_are_off(call: Callable[[], object]) -> Iterator[Callable[[], object]]:
    yield torch.no_grad()(call)
    yield torch.inference_mode()(call)
    yield lambda: Setup().fit(batches(), steps=2, evaluate=lambda nested: call() and {})


def test_a_run_where_gradients_are_off_is_refused() -> None:
    for call in where_gradients_are_off(lambda: Setup().fit(batches(), steps=2)):
        with pytest.raises(RunError, match="gradients are off, in torch.no_grad.* or in what evaluate= calls"):
            call()


def test_runs_in_two_threads_are_two_runs() -> None:

    expected = Setup(make=tower)
    expected.fit(batches(), steps=4)
    ours = [Setup(make=tower) for _ in range(2)]
    run = Setup.fit
    threads = [threading.Thread(target=run, args=(each, batches()), kwargs={"steps": 4}) for each in ours]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    for each in ours:
        assert_equal(each.state(), expected.state())
