"""Shampoo over two processes (gloo on loopback): shared refreshes equal one process's; shards are refused."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, multiprocessing, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from matta.errors import OptimizerError
from matta.optim.preconditioner import Factors
from matta.optim.shampoo import Shampoo

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
    sharded = fully_shard(build(), mesh=init_device_mesh("cpu", (NUM_PROCESSES,)))
    with pytest.raises(OptimizerError, match=r"DTensor of shape \(10, 12\)"):
        Shampoo(sharded)
    torch.save({"model": model.state_dict(), "computed": len(computed)}, folder / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def count_roots() -> list[int]:
    """A list that grows with every root that this process computes."""
    computed: list[int] = []
    refresh = Factors.refresh

    def counted(self: Factors, block: int, *, eps: float) -> None:
        computed.append(block)
        refresh(self, block, eps=eps)

    Factors.refresh = counted  # type: ignore[method-assign]
    return computed


def test_two_processes_equal_one_and_share_the_refreshes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    multiprocessing.spawn(work, (port, tmp_path), nprocs=NUM_PROCESSES)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(NUM_PROCESSES))
    model = build()
    monkeypatch.setattr(Factors, "refresh", Factors.refresh)  # put back after the test
    computed = count_roots()
    train(model, Shampoo(model, **settings()), 0, 1)
    torch.testing.assert_close(first["model"], second["model"], atol=0, rtol=0)
    torch.testing.assert_close(first["model"], dict(model.state_dict()), atol=1e-9, rtol=1e-9)
    assert first["computed"] + second["computed"] == len(computed)
    assert abs(first["computed"] - second["computed"]) <= len(computed) // 4
