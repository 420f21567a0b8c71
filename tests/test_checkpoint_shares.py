"""Checkpoints of sharded runs: written by the share, read by any number of processes; faults of one told on all."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import signal
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, distributed

import matta
from matta.errors import CheckpointError, RunError, Terminated
from matta.sizes.streamed_extraction import SavedWeights
from matta.sizes.weight_files import WeightShards
from matta.training import share_files
from matta.training.checkpoint_shares import SavedShares
from test_fitting import flip
from test_sharding import TOLERANCE, Model, batch, make, whole

OPTIMIZERS = ("adamw", "shampoo")
SHARD = "shard-0000{}-model-00001-of-00001.safetensors"
STEPS = 6
ROLLING = {"rollback": matta.Rollback(factor=1.2, window=2, most=1), "checkpoint_every": 3}


def fit(
    run: Path | None, steps: int, *, by: str = "block", optimizer: str = "shampoo", batches: int = 2, **changes: Any
) -> dict[str, Tensor]:
    """The weights after so many steps, of two batches for any number of processes; `by` "one" is not sharded."""
    num_processes = distributed.get_world_size() if distributed.is_initialized() else 1
    cotrain = make() if by == "one" else matta.shard(make(), by=by)
    made = {
        "adamw": lambda: torch.optim.AdamW(cotrain.nested.parameters(), lr=0.01),
        "shampoo": lambda: matta.Shampoo(cotrain.nested, lr=0.01, refresh_every=3, statistics_every=1, block_size=4),
    }[optimizer]()
    data = changes.pop("data", [tuple(each[:2] for each in batch(step)) for step in range(8)])
    settings = {
        "clip_norm": 0.5,
        "progress": False,
        "tensorboard": False,
        "accumulate": batches // num_processes or 1,
        **changes,
    }
    matta.fit(cotrain, data, made, steps=steps, run=run, resume=run is not None, **settings)
    return whole(cotrain)


class Signalled:
    """An observer on whose process a signal comes in the second step."""

    def __init__(self, *, is_here: bool) -> None:
        self.is_here, self.step = is_here, 0

    def before_step(self, *_: object) -> None:
        self.step += 1
        if self.step == 2 and self.is_here:
            os.kill(os.getpid(), signal.SIGTERM)

    def after_step(self, cotrain: object) -> None:
        pass

    def state_dict(self) -> dict[str, Any]:
        return {"step": self.step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.step = state["step"]


def joined(rank: int, size: int, folder: str, name: str) -> None:
    """Join the processes of one part of a test."""
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "ACCELERATE_USE_CPU": "1"}
    distributed.init_process_group("gloo", init_method=f"file://{folder}/{name}", rank=rank, world_size=size)


def work(rank: int, folder: str) -> None:
    """What two processes do."""
    joined(rank, 2, folder, "store-2")
    path = Path(folder)
    try:
        for optimizer in OPTIMIZERS:
            fit(path / optimizer, 3, optimizer=optimizer, checkpoint_every=1)
            resume(path, optimizer, f"one-{optimizer}", f"grown-{optimizer}", rank, checkpoint_every=1)
        for name, damage in DAMAGES.items():
            if rank == 0:
                shutil.copytree(path / "shampoo", path / name)
                damage(path / name / "checkpoint-00000003")
            distributed.barrier()
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                resume(path, "shampoo", name, name, rank)
            told = [str(each.message) for each in caught if "which is whole" in str(each.message)]
            (path / f"{name}-{rank}.json").write_text(json.dumps(told))
        check_full_disk(rank, path)
        check_signal(rank, path)
        check_rollback(rank, path)
    finally:
        distributed.destroy_process_group()


def resume(path: Path, optimizer: str, run: str, result: str, rank: int, **changes: Any) -> None:
    torch.save(fit(path / run, STEPS, by="whole", optimizer=optimizer, **changes), path / f"{result}-{rank}.pt")


def check_full_disk(rank: int, path: Path) -> None:
    """The second process cannot write its second checkpoint."""
    write, calls = share_files._Writer.write_data, []

    def until_full(self: Any, *arguments: Any) -> Any:
        calls.append(1)
        if rank == 1 and len(calls) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(self, *arguments)

    share_files._Writer.write_data = until_full  # type: ignore[method-assign]
    remedy = r"process 1: \[Errno 28\] No space left on device; mend that, and resume from checkpoint-00000001$"
    with pytest.raises(RunError, match=rf"could not be written to .*full: {remedy}"):
        fit(path / "full", 3, checkpoint_every=1)
    share_files._Writer.write_data = write  # type: ignore[method-assign]
    distributed.barrier()
    assert [each.name for each in (path / "full").glob("*checkpoint-*")] == ["checkpoint-00000001"]
    resume(path, "shampoo", "full", "full", rank)


def check_signal(rank: int, path: Path) -> None:
    with pytest.raises(Terminated) as ended:
        fit(path / "signalled", STEPS, observers=[Signalled(is_here=rank == 1)])
    assert ended.value.code == 143
    torch.save(fit(path / "signalled", STEPS, observers=[Signalled(is_here=False)]), path / f"signalled-{rank}.pt")


def check_rollback(rank: int, path: Path) -> None:
    """The batches of the fifth step make the loss leap: they, and those of the fourth, are left out."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        weights = fit(path / "rolled", STEPS, data=spiked(), **ROLLING)
    told = [str(each.message) for each in caught if "continues from step 3" in str(each.message)]
    assert len(told) == (rank == 0)
    torch.save(weights, path / f"rolled-{rank}.pt")


def spiked() -> list[tuple[Tensor, Tensor]]:
    ids = torch.arange(6).repeat(2, 1)
    return [(ids, torch.full_like(ids, 9) if step == 4 else ids) for step in range(8) for _ in range(2)]


DAMAGES = {
    "flipped": lambda path: flip(path / SHARD.format(2)),
    "gone": lambda path: (path / SHARD.format(2)).unlink(),
    "unlisted": lambda path: (path / "CRC32SUMS").unlink(),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes have left."""
    path = tmp_path_factory.mktemp("shares")
    for optimizer in OPTIMIZERS:
        fit(path / f"one-{optimizer}", 3, by="one", optimizer=optimizer)
    torch.multiprocessing.spawn(work, (str(path),), nprocs=2)
    return path


@pytest.fixture(scope="module")
def undisturbed() -> dict[str, dict[str, Tensor]]:
    return {optimizer: fit(None, STEPS, by="one", optimizer=optimizer) for optimizer in OPTIMIZERS}


def assert_left(folder: Path, name: str, expected: dict[str, Tensor], num_processes: int = 2) -> None:
    for rank in range(num_processes):
        torch.testing.assert_close(torch.load(folder / f"{name}-{rank}.pt"), expected, **TOLERANCE)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_two_processes_continue_the_run_of_one(optimizer: str, folder: Path, undisturbed: Any) -> None:
    assert_left(folder, f"grown-{optimizer}", undisturbed[optimizer])
    kept = sorted(each.name for each in (folder / f"one-{optimizer}").glob("*checkpoint*"))
    assert kept == [f"checkpoint-0000000{step}" for step in (4, 5, 6)]


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_one_process_continues_the_run_of_two(optimizer: str, folder: Path, undisturbed: Any, tmp_path: Path) -> None:
    shutil.copytree(folder / optimizer, tmp_path / "run")
    found = fit(tmp_path / "run", STEPS, by="one", optimizer=optimizer)
    torch.testing.assert_close(found, undisturbed[optimizer], **TOLERANCE)


@pytest.mark.parametrize(
    ("damage", "told"), [("flipped", "is damaged"), ("gone", "No such file"), ("unlisted", "is missing")]
)
def test_two_processes_pass_over_a_damaged_checkpoint(damage: str, told: str, folder: Path, undisturbed: Any) -> None:
    assert_left(folder, damage, undisturbed["shampoo"])
    lines = [json.loads((folder / f"{damage}-{rank}.json").read_text()) for rank in range(2)]
    assert len(lines[0]) == 1 and not lines[1]
    assert told in lines[0][0] and "checkpoint-00000002, which is whole" in lines[0][0]


@pytest.mark.parametrize("name", ["flipped", "gone"])
def test_one_process_finds_what_another_has_damaged(name: str, folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "shampoo", tmp_path / "run")
    for checkpoint in (tmp_path / "run").glob("checkpoint-*"):
        DAMAGES[name](checkpoint)
    with pytest.raises(CheckpointError, match=r"no checkpoint in .* is whole: .*shard-00002"):
        fit(tmp_path / "run", STEPS, by="one")


def test_a_flipped_bit_in_any_file_is_found(folder: Path, tmp_path: Path) -> None:
    saved = folder / "shampoo" / "checkpoint-00000003"
    assert SavedShares(saved).state("training")["step"] == 3
    for file in saved.iterdir():
        shutil.copytree(saved, tmp_path / file.name)
        flip(tmp_path / file.name / file.name)
        with pytest.raises(CheckpointError, match="take another copy"):
            SavedShares(tmp_path / file.name)


@pytest.mark.parametrize("name", ["full", "signalled"])
def test_a_run_that_was_stopped_equals_the_uninterrupted(name: str, folder: Path, undisturbed: Any) -> None:
    assert_left(folder, name, undisturbed["shampoo"])


def test_two_processes_return_from_a_spike(folder: Path, tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="continues from step 3"):
        expected = fit(tmp_path / "run", STEPS, by="one", data=spiked(), **ROLLING)
    assert_left(folder, "rolled", expected)


def test_each_process_writes_its_share_and_no_pickle(folder: Path) -> None:
    checkpoint = folder / "shampoo" / "checkpoint-00000003"
    names = [
        SHARD.format(1),
        SHARD.format(2),
        "process-00000.json",
        "process-00001.json",
        "training.json",
        "CRC32SUMS",
    ]
    assert sorted(each.name for each in checkpoint.iterdir()) == sorted(names)
    held = []
    for rank in (1, 2):
        with safe_open(checkpoint / SHARD.format(rank), "pt") as file:
            held.append({name: file.get_slice(name).get_shape() for name in file.keys()})  # noqa: SIM118
    rows = [shapes["nested.ta.blocks.0.up.weight"][0] for shapes in held]
    assert rows == [7, 7]
    strips = [{name for name in shapes if re.search(r"left\.\d", name)} for shapes in held]
    assert all(strips) and not strips[0] & strips[1]
    own = [{name.partition(".")[0] for name in shapes if name.startswith("process")} for shapes in held]
    assert own == [{"process-00000"}, {"process-00001"}]


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_the_nesting_at_the_end_is_written_from_shares(optimizer: str, folder: Path) -> None:
    nested = matta.load(folder / f"one-{optimizer}" / "nested", make().nested)
    expected = torch.load(folder / f"grown-{optimizer}-0.pt")
    found = {f"nested.{name}": value.detach() for name, value in nested.named_parameters()}
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_weights_are_read_from_shares_by_the_slice(folder: Path) -> None:
    checkpoint = folder / "adamw" / "checkpoint-00000003"
    nested = matta.load(folder / "adamw" / "nested", make().nested)
    with torch.device("meta"):
        empty = matta.nest(Model(2, 3), Model(3, 7), layers={"blocks": "first"}, layouts={"blocks.*.up.*": 2})
    weights = SavedWeights(checkpoint, empty, "nested.")
    for name, (_, pieces) in weights.tensors(empty.student).items():
        expected = nested.student.state_dict()[name]
        torch.testing.assert_close(torch.cat(list(pieces)).view(expected.shape), expected, rtol=0, atol=0)


def test_missing_rows_are_told(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "adamw" / "checkpoint-00000003", tmp_path / "checkpoint")
    (tmp_path / "checkpoint" / SHARD.format(1)).unlink()
    with pytest.raises(CheckpointError, match=r"lacks rows 0 to \d+ of .*; take another copy"):
        WeightShards(tmp_path / "checkpoint")


def wide(rank: int, folder: str, size: int, steps: int) -> None:
    """A run of several processes, begun or continued."""
    joined(rank, size, folder, f"store-{size}-{steps}")
    try:
        for optimizer in OPTIMIZERS:
            found = fit(Path(folder, optimizer), steps, optimizer=optimizer, batches=4)
            torch.save(found, Path(folder, f"{optimizer}-{rank}.pt"))
    finally:
        distributed.destroy_process_group()


@pytest.mark.stress
def test_two_then_four_then_one_process_are_one_run(tmp_path: Path) -> None:
    for size, steps in ((2, 2), (4, 4)):
        torch.multiprocessing.spawn(wide, (str(tmp_path), size, steps), nprocs=size)
    for optimizer in OPTIMIZERS:
        assert len(list((tmp_path / optimizer / "checkpoint-00000004").glob("process-*"))) == 4
        assert_left(tmp_path, optimizer, fit(None, 4, by="one", optimizer=optimizer, batches=4), num_processes=4)
        found = fit(tmp_path / optimizer, STEPS, by="one", optimizer=optimizer, batches=4)
        expected = fit(None, STEPS, by="one", optimizer=optimizer, batches=4)
        torch.testing.assert_close(found, expected, **TOLERANCE)
