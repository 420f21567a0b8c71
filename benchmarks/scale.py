"""Runs that scale: several processes against one, checkpoints, and models taken from large runs.

Two processes of one thread each (gloo) train the pair of `recipes/gpt2_mini` with its optimizer. `fsdp_grad_error` is
the largest difference of a gradient from that of one process, float32, FSDP2 as a whole and by block.
`shampoo_state_ratio` is the state that a process holds of two, over that of one. `two_process_efficiency` is the
throughput of two processes over twice that of one, arms in turn, by the wall clock: on a machine that does something
else it says more about that. `two_process_cpu_efficiency` is the same by processor time.

`checkpoint_stall_percent` is the time that a step waits for a checkpoint, at one in 100 steps. `extract_peak_mb` is
the most memory that `matta extract` takes less the Student's size, from a TA of 3 GB (`extracting.py`);
`extract_gb_per_s_vs_copy` its speed, imports left out, against copying a file of the Student's size.

    python benchmarks/scale.py [--quick] [--json]
"""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, distributed, nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import extracting
import matta
from figures import benchmark_parser, print_figures
from matta.lm.decoders import build_pair, make_optimizer, nest_pair
from matta.lm.recipe_files import read_recipe
from matta.objectives import CausalLM
from matta.training.launching import in_processes
from matta.training.run_folder import RunFolder

RECIPE = Path(__file__).parents[1] / "recipes" / "gpt2_mini"
NUM_PROCESSES = 2


class Load(NamedTuple):
    """How much is measured."""

    rounds: int
    steps: int


LOADS = {True: Load(rounds=3, steps=1), False: Load(rounds=7, steps=4)}


def main() -> None:
    """Measure and print."""
    parser = benchmark_parser(
        "Several processes, checkpoints, and extraction.", quick="fewer rounds and a small model to extract from"
    )
    options = parser.parse_args()
    torch.set_num_threads(1)
    load = LOADS[options.quick]
    alone = measure_one()
    figures: dict[str, float] = {**in_processes(measure_two, load, num_processes=NUM_PROCESSES)}
    figures["shampoo_state_ratio"] = figures.pop("shampoo_bytes") / alone
    figures |= checkpoint_stall(load) | extraction(quick=options.quick)
    print_figures(figures, as_json=options.json)


def pair(*overrides: str) -> matta.CoTraining:
    """The pair of the recipe, the same in every process."""
    recipe = read_recipe(RECIPE, overrides)
    torch.manual_seed(0)
    nested = nest_pair(recipe.model, *build_pair(recipe.model, 257, end_of_text=256))
    for model in (nested.student, nested.ta):
        model.config.use_cache = False
    return matta.CoTraining(nested, CausalLM()).train()


def tokens(step: int, *, sequences: int = 8) -> dict[str, Tensor]:
    """A batch of the recipe's size."""
    ids = torch.randint(256, (sequences, 256), generator=torch.Generator().manual_seed(step))
    return {"input_ids": ids, "labels": ids}


def share(batch: dict[str, Tensor], rank: int) -> dict[str, Tensor]:
    """The part of a batch that a process trains on."""
    return {name: value[rank::NUM_PROCESSES] for name, value in batch.items()}


def recipe_optimizer(cotrain: matta.CoTraining) -> torch.optim.Optimizer:
    """The recipe's: Shampoo."""
    return make_optimizer(read_recipe(RECIPE, []).train, cotrain.nested)


def take_step(model: nn.Module, optimizer: torch.optim.Optimizer, batch: dict[str, Tensor]) -> None:
    """One step."""
    optimizer.zero_grad()
    model(batch).loss.backward()
    optimizer.step()


def measure_one() -> int:
    """Bytes of Shampoo's state in one process."""
    cotrain = pair()
    optimizer = recipe_optimizer(cotrain)
    take_step(cotrain, optimizer, tokens(0, sequences=1))
    assert isinstance(optimizer, matta.Shampoo)
    return optimizer.state_bytes()


def measure_two(load: Load) -> dict[str, float]:
    """What two processes measure, each its part of it."""
    torch.set_num_threads(1)
    distributed.init_process_group("gloo")
    rank = distributed.get_rank()
    try:
        errors = {by: gradient_error(by, rank) for by in ("whole", "block")}
        return {
            "fsdp_grad_error": max(errors.values()),
            **{f"fsdp_grad_error_{by}": error for by, error in errors.items()},
            "shampoo_bytes": sharded_state_bytes(rank),
            **efficiency(load, rank),
        }
    finally:
        distributed.destroy_process_group()


def gradient_error(by: Any, rank: int) -> float:
    """The largest difference from one process, over all gradients."""
    batch = tokens(0, sequences=2)
    single, divided = pair(), matta.shard(pair(), by=by)
    single(batch).loss.backward()
    divided(share(batch, rank)).loss.backward()
    differences = [
        (whole(mine.grad) - theirs.grad).abs().max()
        for mine, theirs in zip(divided.parameters(), single.parameters(), strict=True)
        if mine.grad is not None and theirs.grad is not None
    ]
    return float(torch.stack(differences).max())


def whole(tensor: Tensor) -> Tensor:
    """A tensor gathered from all processes."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def sharded_state_bytes(rank: int) -> int:
    """Bytes of Shampoo's state on the process that has most of it."""
    cotrain = matta.shard(pair())
    optimizer = recipe_optimizer(cotrain)
    take_step(cotrain, optimizer, share(tokens(0, sequences=2), rank))
    assert isinstance(optimizer, matta.Shampoo)
    held = torch.tensor(optimizer.state_bytes())
    distributed.all_reduce(held, distributed.ReduceOp.MAX)
    return int(held)


def efficiency(load: Load, rank: int) -> dict[str, float]:
    """Seconds of a process for the same work alone over those of both; each process has a whole batch of its own."""
    alone, together = pair(), pair()
    own = make_optimizer(read_recipe(RECIPE, []).train, alone.nested)
    if isinstance(own, matta.Shampoo):
        own.process_group = None
    shared = recipe_optimizer(together)
    both = DistributedDataParallel(together)
    batches = [tokens(step) for step in range(load.steps)]
    rounds = []
    for _ in range(load.rounds + 1):
        single = timed(alone, own, batches) if rank == 0 else (0.0, 0.0)
        distributed.barrier()
        double = timed(both, shared, batches)
        rounds.append((*single, *double))
        distributed.barrier()
    ratios = [(wall / walls, cpu / cpus) for wall, cpu, walls, cpus in rounds[1:]]
    names = ("two_process_efficiency", "two_process_cpu_efficiency")
    values = (statistics.median(each) for each in zip(*ratios, strict=True))
    return dict(zip(names, values, strict=True))


def timed(model: nn.Module, optimizer: torch.optim.Optimizer, batches: list[dict[str, Tensor]]) -> tuple[float, float]:
    """Seconds of the wall clock and of the processor."""
    start, processor = time.perf_counter(), time.process_time()
    for batch in batches:
        take_step(model, optimizer, batch)
    return time.perf_counter() - start, time.process_time() - processor


def checkpoint_stall(load: Load) -> dict[str, float]:
    """What training waits for a checkpoint, of the time of the 100 steps that it stands for."""
    cotrain = pair()
    optimizer = recipe_optimizer(cotrain)
    batches = [tokens(step) for step in range(load.steps)]
    timed(cotrain, optimizer, batches)
    step_s = timed(cotrain, optimizer, batches)[0] / load.steps
    waits = []
    with tempfile.TemporaryDirectory() as path:
        folder = RunFolder(Path(path) / "run", resume=False)
        folder.begin()
        for step in range(load.rounds):
            folder.wait()
            start = time.perf_counter()
            folder.save(step, cotrain, {"optimizer": optimizer.state_dict()})
            waits.append(time.perf_counter() - start)
        folder.close()
    return {"checkpoint_stall_percent": 100 * statistics.median(waits) / (100 * step_s)}


def extraction(*, quick: bool) -> dict[str, float]:
    """`matta extract` of the Student, as `extracting.py` measures it."""
    found = extracting.measure(quick=quick)
    return {
        "extract_ta_mb": found["ta_mb"],
        "extract_student_mb": found["sub_model_mb"],
        "extract_peak_mb": found["extract_peak_over_sub_model_mb"],
        "extract_gb_per_s_vs_copy": found["extract_gb_per_s_vs_copy"],
    }


if __name__ == "__main__":
    main()
