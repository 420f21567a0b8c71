"""Shampoo over two processes (gloo on loopback): shared refreshes and divided state equal one process's."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, multiprocessing, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from matta.errors import OptimizerError
from matta.optim.divided_parameters import local
from matta.optim.preconditioner import Factors
from matta.optim.shampoo import Shampoo
from test_fitting import free_port

NUM_PROCESSES = 2
NUM_STEPS = 14


def build() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 10), nn.ReLU(), nn.Linear(10, 6), nn.ReLU(), nn.Linear(6, 1)).double()


def batch(step: int) -> tuple[Tensor, Tensor]:
    inputs = torch.randn(8, 12, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
    return inputs, inputs[:, :3].prod(1, keepdim=True)


def train(model: nn.Module, optimizer: Shampoo, rank: int, size: int) -> None:
    for step in range(NUM_STEPS):
        inputs, labels = (each[rank::size] for each in batch(step))
        optimizer.zero_grad()
        F.mse_loss(model(inputs), labels).backward()
        if step == 5:  # what the average over the processes is, if one of them has it
            next(model.parameters()).grad.fill_(torch.nan)
        optimizer.step()
    assert optimizer.num_skipped == 1


def settings() -> dict[str, int | float]:
    return {"lr": 0.01, "block_size": 5, "refresh_every": 6, "statistics_every": 2}


def work(rank: int, port: int, folder: Path) -> None:
    torch.set_num_threads(1)
    address = f"tcp://127.0.0.1:{port}"
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=NUM_PROCESSES)
    computed = count_roots()
    model = build()
    train(DistributedDataParallel(model), Shampoo(model, **settings()), rank, NUM_PROCESSES)
    torch.save({"model": model.state_dict(), "computed": len(computed)}, folder / f"{rank}.pt")
    for name, dtype, graft in SHARDED:
        step_sharded(name, dtype, graft, folder)
    check_refusals()
    dist.barrier()
    dist.destroy_process_group()


SHARDED = [("float64", torch.float64, "adam"), ("float32", torch.float32, "adam"), ("sums", torch.float64, "adagrad")]


class Sides(nn.Module):
    """Sides that are no multiples of blocks or processes, fewer rows than processes, a convolution, a table."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(5, 4)
        self.layers = nn.ModuleList([nn.Linear(12, 23), nn.Linear(9, 3), nn.Linear(7, 1), nn.Linear(11, 11)])
        self.kernel = nn.Conv2d(3, 7, 2)
        self.idle = nn.Linear(6, 6)


def gradients(model: nn.Module, step: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return {
        name: torch.randn(p.shape, generator=generator, dtype=torch.float64)
        for name, p in model.named_parameters()
        if not (name.startswith("idle") and step % 3 == 1)
    }


def sides(dtype: torch.dtype) -> Sides:
    torch.manual_seed(1)
    return Sides().to(dtype)


def move(model: nn.Module, optimizer: Shampoo, steps: range) -> None:
    """Steps along the same gradients, in one process or divided among several."""
    for step in steps:
        given = gradients(model, step)
        for name, p in model.named_parameters():
            whole = given[name].to(p.dtype) if name in given else None
            if whole is not None and hasattr(p, "placements"):
                whole = distribute_tensor(whole, p.device_mesh, p.placements)
            p.grad = whole
            if step == 4 and whole is not None and name == "layers.0.weight":
                local(whole)[-1:].fill_(torch.nan)
        optimizer.step()


def of_sides(model: nn.Module, graft: Any) -> Shampoo:
    return Shampoo(model, graft=graft, weight_decay=0.1, **settings())


def step_sharded(name: str, dtype: torch.dtype, graft: str, folder: Path) -> None:
    """Some steps, then as many again from the saved state."""
    mesh = init_device_mesh("cpu", (NUM_PROCESSES,))
    model = fully_shard(sides(dtype), mesh=mesh)
    optimizer = of_sides(model, graft)
    move(model, optimizer, range(8))
    state = optimizer.state_dict()
    torch.save(
        {
            "half": {name: p.full_tensor() for name, p in model.named_parameters()},
            "state": state,
            "bytes": optimizer.state_bytes(),
        },
        folder / f"{name}-{dist.get_rank()}.pt",
    )
    dist.barrier()
    again = of_sides(model, graft)
    again.load_state_dict(torch.load(folder / f"{name}-0.pt", weights_only=True)["state"])
    move(model, again, range(8, NUM_STEPS))
    weights = {name: p.full_tensor() for name, p in model.named_parameters()}
    torch.save(weights, folder / f"{name}-end-{dist.get_rank()}.pt")


def check_refusals() -> None:
    mesh = init_device_mesh("cpu", (NUM_PROCESSES,))
    model = build()
    before = Shampoo(model)
    fully_shard(model, mesh=mesh)(batch(0)[0]).sum().backward()
    with pytest.raises(OptimizerError, match="after fully_shard"):
        before.step()
    by_columns = nn.Parameter(distribute_tensor(torch.zeros(4, 4), mesh, [Shard(1)]))
    with pytest.raises(OptimizerError, match="divided along one axis"):
        Shampoo([by_columns])
    optimizer = Shampoo(model)
    optimizer.step()
    with pytest.raises(OptimizerError, match="called by all of them"):
        copy.deepcopy(optimizer)


def count_roots() -> list[int]:
    """A list that grows with every root that this process computes."""
    computed: list[int] = []
    refresh = Factors.refresh

    def counted(self: Factors, blocks: Sequence[int], *, eps: float) -> None:
        computed.extend(blocks)
        refresh(self, blocks, eps=eps)

    Factors.refresh = counted  # type: ignore[method-assign]
    return computed


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes have left."""
    path = tmp_path_factory.mktemp("shampoo")
    multiprocessing.spawn(work, (free_port(), path), nprocs=NUM_PROCESSES)
    return path


@pytest.mark.parametrize(("name", "dtype", "graft"), SHARDED)
def test_divided_state_equals_one_process(name: str, dtype: torch.dtype, graft: str, folder: Path) -> None:
    model = sides(dtype)
    optimizer = of_sides(model, graft)
    move(model, optimizer, range(8))
    left = [torch.load(folder / f"{name}-{rank}.pt", weights_only=True) for rank in range(NUM_PROCESSES)]
    tolerance = {"rtol": 0, "atol": 1e-6 if dtype == torch.float32 else 1e-12}
    for each in left:
        torch.testing.assert_close(each["half"], dict(model.named_parameters()), **tolerance, check_stride=False)
        assert each["bytes"] <= 0.55 * optimizer.state_bytes()
    assert sum(each["bytes"] for each in left) >= 0.99 * optimizer.state_bytes()
    alone = copy.deepcopy(model)
    continued = of_sides(alone, graft)
    continued.load_state_dict(left[0]["state"])
    for each, its in ((model, optimizer), (alone, continued)):
        move(each, its, range(8, NUM_STEPS))
    torch.testing.assert_close(dict(alone.named_parameters()), dict(model.named_parameters()), **tolerance)
    for rank in range(NUM_PROCESSES):
        found = torch.load(folder / f"{name}-end-{rank}.pt", weights_only=True)
        torch.testing.assert_close(found, dict(model.named_parameters()), **tolerance, check_stride=False)


def test_two_processes_equal_one_and_share_the_refreshes(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = (torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(NUM_PROCESSES))
    model = build()
    monkeypatch.setattr(Factors, "refresh", Factors.refresh)  # put back after the test
    computed = count_roots()
    train(model, Shampoo(model, **settings()), 0, 1)
    torch.testing.assert_close(first["model"], second["model"], atol=0, rtol=0)
    torch.testing.assert_close(first["model"], dict(model.state_dict()), atol=1e-9, rtol=1e-9)
    assert first["computed"] + second["computed"] == len(computed)
    assert abs(first["computed"] - second["computed"]) <= len(computed) // 4
