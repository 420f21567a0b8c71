"""Runs that scale: several processes against one, checkpoints, and models taken from large runs.

Two processes of one thread each (gloo) train the pair of `recipes/gpt2_mini` with its optimizer. `fsdp_grad_error` is
the largest difference of a gradient from that of one process, float32, FSDP2 as a whole and by block.
`shampoo_state_ratio` is the state that a process holds of two, over that of one. `two_process_efficiency` is the
throughput of two processes over twice that of one, arms in turn, by the wall clock: on a machine that does something
else it says more about that. `two_process_cpu_efficiency` is the same by processor time.

`checkpoint_stall_percent` is the time that a step waits for a checkpoint, at one in 100 steps. `extract_peak_mb` is
what `matta extract` takes of memory beyond its imports and the Student's size; `extract_gb_per_s_vs_copy` its speed,
imports left out, against copying a file of the Student's size.

    python benchmarks/scale.py [--quick] [--json]
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, distributed, nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import matta
from matta.lm.decoders import build_pair, make_optimizer, nest_pair
from matta.lm.recipe import Recipe, read_recipe
from matta.lm.tokens import load_tokenizer
from matta.lm.trained_runs import write_run
from matta.objectives import CausalLM
from matta.training.launching import in_processes
from matta.training.run_folder import MARKER, NESTED, RunFolder

RECIPE = Path(__file__).parents[1] / "recipes" / "gpt2_mini"
NUM_PROCESSES = 2


class Load(NamedTuple):
    """How much is measured."""

    rounds: int
    steps: int
    extract: tuple[str, ...]


LOADS = {
    True: Load(rounds=3, steps=1, extract=("model.student.n_embd=512", "model.ta.n_inner=2048", "model.ta.n_layer=12")),
    False: Load(
        rounds=7,
        steps=4,
        extract=(
            *("model.student.n_embd=1536", "model.student.n_inner=2048", "model.student.n_head=16"),
            *("model.student.n_layer=8", "model.ta.n_layer=36", "model.ta.n_inner=4096"),
        ),
    ),
}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="Several processes, checkpoints, and extraction.")
    parser.add_argument("--quick", action="store_true", help="fewer rounds and a small model to extract from")
    parser.add_argument("--json", action="store_true", help="print one JSON object, nothing else")
    options = parser.parse_args()
    torch.set_num_threads(1)
    load = LOADS[options.quick]
    alone = measure_one()
    figures: dict[str, float] = {**in_processes(measure_two, load, num_processes=NUM_PROCESSES)}
    figures["shampoo_state_ratio"] = figures.pop("shampoo_bytes") / alone
    figures |= checkpoint_stall(load) | extraction(load)
    if options.json:
        print(json.dumps(figures))
        return
    for name, value in figures.items():
        print(f"{name:32} {value:14.6g}")


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


def extraction(load: Load) -> dict[str, float]:
    """`matta extract` of the Student from a run, as a process of its own."""
    with tempfile.TemporaryDirectory() as path:
        run = Path(path) / "run"
        recipe = read_recipe(RECIPE, load.extract)
        write_made_run(run, recipe)
        imports_s, imports_mb = resources("import matta.lm.extracting, matta.lm.costs")
        command = f"from matta.cli import main; main(['extract', {str(run)!r}, 'student', '--out', {path + '/out'!r}])"
        seconds, peak_mb = resources(command)
        files = list((Path(path) / "out").rglob("*.safetensors"))
        size = sum(each.stat().st_size for each in files)
        start = time.perf_counter()
        for file in files:
            shutil.copy(file, file.with_suffix(".copy"))
        os.sync()
        copy_s = time.perf_counter() - start
    extract_s = max(seconds - imports_s, 1e-3)
    return {
        "extract_ta_mb": 4 * num_parameters(recipe) / 1e6,
        "extract_student_mb": size / 1e6,
        "extract_peak_mb": peak_mb - imports_mb - size / 1e6,
        "extract_gb_per_s": size / 1e9 / extract_s,
        "extract_gb_per_s_vs_copy": copy_s / extract_s,
    }


def write_made_run(run: Path, recipe: Recipe) -> None:
    """A run that has ended, with weights that nothing has trained."""
    tokenizer = load_tokenizer(recipe.data.tokenizer)
    nested = nest_pair(recipe.model, *build_pair(recipe.model, len(tokenizer), end_of_text=tokenizer.eos_token_id))
    folder = RunFolder(run, resume=True)
    folder.begin()
    write_run(run, recipe, nested, tokenizer)
    matta.save(nested, run / NESTED)
    folder.close()
    assert (run / MARKER).is_file()


def num_parameters(recipe: Recipe) -> int:
    """Of the TA."""
    with torch.device("meta"):
        return sum(each.numel() for each in build_pair(recipe.model, 257, end_of_text=256)[1].parameters())


def resources(code: str) -> tuple[float, float]:
    """Seconds by the wall clock, and the most memory in MB (mapped files included), of a process that runs code."""
    measured = (
        f"import resource, time\nstart = time.perf_counter()\n{code}\n"
        "print(time.perf_counter() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6)"
    )
    done = subprocess.run([sys.executable, "-c", measured], capture_output=True, text=True, check=True)
    seconds, peak_mb = done.stdout.split()[-2:]
    return float(seconds), float(peak_mb)


if __name__ == "__main__":
    main()
