"""Checkpoints of a pair sharded by FSDP2: by shares (`matta.fit` writes them so), and gathered on the first process.

A TA of 100 MB in float32 and AdamW's two averages, in N processes of one thread (gloo). For each way, arms in turn:
what the busiest process writes (`mb_written`), what training waits for (`stall_ms`: the copy, and what is gathered),
the time to the file on disk (`save_s`, the copy included), the time to load weights and state (`load_s`, checksums
included; the slowest process), and the most that a process has in memory beyond what it had before (`peak_mb`, of a
save and a load in processes that do nothing else).

    python benchmarks/checkpoint_shares.py [--processes 2] [--quick] [--json]
"""

from __future__ import annotations

import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor, distributed, nn

import matta
from figures import benchmark_parser, print_figures
from matta.nesting.batches import map_tensors
from matta.nesting.sharded_slices import gathered
from matta.objectives import CausalLM
from matta.sizes.saving import split_state
from matta.training.launching import in_processes
from matta.training.plain_state import PackedState
from matta.training.run_folder import RunFolder
from matta.training.sharding import divided_state

SHARES, GATHERED = "shares", "gathered"


class Load(NamedTuple):
    """What is measured, and how often."""

    way: str | None
    width: int
    rounds: int


class Figures(NamedTuple):
    """Of one save and load on one process."""

    mb_written: float
    stall_ms: float
    save_s: float
    load_s: float


def main() -> None:
    """Measure and print."""
    parser = benchmark_parser("Checkpoints by shares against gathered ones.", quick="a TA of 2 MB, one round")
    parser.add_argument("--processes", type=int, default=2, help="how many (default: 2)")
    options = parser.parse_args()
    width, rounds = (64, 1) if options.quick else (448, 3)
    run = partial(in_processes, measure, num_processes=options.processes)
    figures: dict[str, float] = {"processes": options.processes, **run(Load(None, width, rounds))}
    for way in (SHARES, GATHERED):
        figures[f"{way}_peak_mb"] = run(Load(way, width, 1))["peak_mb"]
    print_figures(figures, as_json=options.json)


class Block(nn.Module):
    """Two layers of a residual block."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """The block's output."""
        return x + self.down(torch.relu(self.up(x)))


class Tower(nn.Module):
    """Blocks between an embedding and a head."""

    def __init__(self, width: int, hidden: int, depth: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(512, width)
        self.blocks = nn.ModuleList([Block(width, hidden) for _ in range(depth)])
        self.head = nn.Linear(width, 512, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        """Logits."""
        x = self.tokens(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def measure(load: Load) -> dict[str, float]:
    """The figures of both ways, or the memory of one."""
    torch.set_num_threads(1)
    distributed.init_process_group("gloo")
    torch.manual_seed(0)
    width = load.width
    nested = matta.nest(Tower(width, 2 * width, 8), Tower(width, 4 * width, 16), layers={"blocks": "first"})
    cotrain = matta.shard(matta.CoTraining(nested, CausalLM()))
    optimizer = torch.optim.AdamW(cotrain.nested.parameters())
    for parameter in cotrain.nested.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found: dict[str, list[Figures]] = {}
    with tempfile.TemporaryDirectory() as made:
        folder = RunFolder(Path(_of_first(made), "run"), resume=False)
        if distributed.get_rank() == 0:
            folder.begin()
        distributed.barrier()
        for round_ in range(load.rounds):
            for way in (SHARES, GATHERED) if load.way is None else (load.way,):
                found.setdefault(way, []).append(WAYS[way](folder, 2 * round_ + (way == GATHERED), cotrain, optimizer))
        folder.close()
        distributed.barrier()
    peak = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    figures = {"ta_mb": sum(4 * each.numel() for each in nested.ta.parameters()) / 1e6, "peak_mb": _most(peak)}
    if load.way is None:
        figures.pop("peak_mb")
        for way, rounds in found.items():
            medians = Figures(*map(statistics.median, zip(*rounds, strict=True)))
            figures |= {f"{way}_{name}": _most(value) for name, value in medians._asdict().items()}
    distributed.destroy_process_group()
    return figures


def by_shares(folder: RunFolder, step: int, cotrain: matta.CoTraining, optimizer: torch.optim.Optimizer) -> Figures:
    """As `matta.fit` does it."""
    common = {"step": step, "num_processes": distributed.get_world_size()}
    distributed.barrier()
    start = time.perf_counter()
    folder.save_shares(step, cotrain, optimizer, common, {"random": torch.get_rng_state()})
    stall = time.perf_counter() - start
    folder.wait()
    saved = time.perf_counter() - start
    files = folder.checkpoints()[-1].glob(f"*0{distributed.get_rank() + 1}-model*")
    written = sum(each.stat().st_size for each in files)
    load_s = _loaded(folder, cotrain, optimizer)
    return Figures(mb_written=written / 1e6, stall_ms=1e3 * stall, save_s=saved, load_s=load_s)


def by_gathering(folder: RunFolder, step: int, cotrain: matta.CoTraining, optimizer: torch.optim.Optimizer) -> Figures:
    """Everything on the first process, which writes it."""
    common = {"step": step, "num_processes": distributed.get_world_size(), "feeds": []}
    distributed.barrier()
    start = time.perf_counter()
    tensors, others = split_state(cotrain)
    state = optimizer.state_dict()
    whole = {**state, "state": map_tensors(state["state"], gathered)}
    is_first = distributed.get_rank() == 0
    if is_first:
        packed = PackedState({**common, "optimizer": whole, "extra_state": others})
    stall = time.perf_counter() - start
    if is_first:
        folder._write(step, tensors, packed)
    distributed.barrier()
    saved = time.perf_counter() - start
    written = sum(each.stat().st_size for each in folder.checkpoints()[-1].iterdir()) if is_first else 0
    load_s = _loaded(folder, cotrain, optimizer)
    return Figures(mb_written=written / 1e6, stall_ms=1e3 * stall, save_s=saved, load_s=load_s)


def _loaded(folder: RunFolder, cotrain: matta.CoTraining, optimizer: torch.optim.Optimizer) -> float:
    distributed.barrier()
    start = time.perf_counter()
    state = folder.load(cotrain, optimizer)
    assert state is not None
    optimizer.load_state_dict(divided_state(optimizer, state["optimizer"]))
    return time.perf_counter() - start


WAYS: Final[dict[str, Callable[..., Figures]]] = {SHARES: by_shares, GATHERED: by_gathering}


def _most(value: float) -> float:
    """The largest of all processes."""
    largest = torch.tensor(value, dtype=torch.float64)
    distributed.all_reduce(largest, distributed.ReduceOp.MAX)
    return float(largest)


def _of_first(value: Any) -> Any:
    values = [value]
    distributed.broadcast_object_list(values)
    return values[0]


if __name__ == "__main__":
    main()
