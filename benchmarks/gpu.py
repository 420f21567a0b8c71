"""matta on a GPU, in under six minutes: the tests of the device, and a co-training step of GPT-2 Medium in its TA.

The pair of `recipes/gpt2_medium_c4` in bf16 with fresh weights, on random tokens. Arms take turns in one process:
co-training the pair, its Student alone and its TA alone, each with AdamW; then the pair with Shampoo.

| figure | what |
|---|---|
| `tests_passed`, `tests_failed` | of `tests/test_gpu.py` |
| `pair_tokens_per_s` | of co-training, median over the rounds |
| `pair_over_separate` | time of a co-training step over those of the Student's and the TA's alone |
| `mfu_percent` | FLOPs of matrix products (three times the forward's), of what the card does in bf16; null: unknown |
| `peak_gib` | largest memory of co-training with AdamW |
| `shampoo_overhead_percent` | of a co-training step, against AdamW |
| `waits_per_step` | times that the host waits for the device in a step of co-training |

Without a GPU, and with --quick, it runs at tiny sizes to show that it runs.

    python benchmarks/gpu.py [--quick] [--micro-batch 8] [--json]
"""

from __future__ import annotations

import gc
import os
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import matta
from figures import benchmark_parser, print_figures
from matta.lm.costs import cost_of
from matta.lm.decoders import build_pair, make_optimizer, nest_pair
from matta.lm.recipe import Recipe
from matta.lm.recipe_files import read_recipe
from matta.objectives import CausalLM

ROOT = Path(__file__).parents[1]
TINY = ("model.student.n_layer=2", "model.ta.n_layer=3", "model.student.n_embd=64", "model.student.n_head=2",
        "model.student.n_inner=128", "model.ta.n_inner=256", "model.student.vocab_size=512", "data.context=32",
        "family.k=[]")  # fmt: skip
PEAK_FLOPS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "L4": 121e12, "4090": 165e12}
"""In bf16, dense, of the makers' data sheets."""
GIB = 2**30
Step = Callable[[], None]


def main() -> None:
    """Measure and print."""
    parser = benchmark_parser(
        "matta on a GPU: tests, throughput, memory, Shampoo's overhead.", quick="tiny sizes; so without a GPU"
    )
    parser.add_argument("--micro-batch", type=int, default=8, help="sequences in a forward (default: 8)")
    options = parser.parse_args()
    is_tiny = options.quick or not torch.cuda.is_available()
    recipe = read_recipe(ROOT / "recipes" / "gpt2_medium_c4", TINY if is_tiny else ("family.k=[]",))
    figures = {"device": device_name(), "is_tiny": is_tiny, **tests(), **measure(recipe, options.micro_batch)}
    print_figures(figures, as_json=options.json)


def device_name() -> str:
    """The card, or that there is none."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"


def tests() -> dict[str, int]:
    """How many tests of the device pass and fail, in a process of their own."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", "-p", "no:cacheprovider", "tests/test_gpu.py"]
    ended = subprocess.run(command, cwd=ROOT, env={**os.environ}, capture_output=True, text=True)
    words = ended.stdout.replace(",", " ").split()
    counts = {word: int(words[index - 1]) for index, word in enumerate(words) if word in ("passed", "failed", "error")}
    return {
        "tests_passed": counts.get("passed", 0),
        "tests_failed": counts.get("failed", 0) + counts.get("error", 0) + (ended.returncode not in (0, 1)),
    }


def measure(recipe: Recipe, micro_batch: int) -> dict[str, Any]:
    """The figures of all arms."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    student, ta = build_pair(recipe.model, recipe.model.student["vocab_size"])
    context = recipe.data.context
    flops = 3 * sum(cost_of(model, context).flops_per_token for model in (student, ta))
    nested = nest_pair(recipe.model, student, ta).to(device)
    tokens = torch.randint(int(student.config.vocab_size), (micro_batch, context), device=device)
    batch = {"input_ids": tokens, "labels": tokens}
    for model in (nested.ta, nested.student):
        model.config.use_cache = False
    arms: dict[str, Step] = {
        "pair": cotraining(recipe, nested, batch),
        "student": alone(recipe, matta.extract(nested), tokens),
        "ta": alone(recipe, nested.ta, tokens),
    }
    is_tiny = device.type == "cpu"
    seconds = in_turns(arms, rounds=2 if is_tiny else 5, steps=2 if is_tiny else 4)
    peak = peak_gib(arms["pair"])
    waits = waits_of(arms["pair"])
    arms.clear()
    gc.collect()
    shampoo = {"shampoo": cotraining(recipe, nested, batch, optimizer="shampoo")}
    with_shampoo = in_turns(shampoo, rounds=2 if is_tiny else 5, steps=2 if is_tiny else 20)["shampoo"]
    tokens_per_s = tokens.numel() / seconds["pair"]
    most = next((value for name, value in PEAK_FLOPS.items() if name in device_name()), None)
    return {
        "pair_tokens_per_s": tokens_per_s,
        "pair_over_separate": seconds["pair"] / (seconds["student"] + seconds["ta"]),
        "mfu_percent": None if most is None else 100 * flops * tokens_per_s / most,
        "peak_gib": peak,
        "shampoo_overhead_percent": 100 * (with_shampoo / seconds["pair"] - 1),
        "waits_per_step": waits,
        **{f"{name}_step_s": value for name, value in (*seconds.items(), ("shampoo", with_shampoo))},
    }


def cotraining(recipe: Recipe, nested: matta.Nested, batch: dict[str, Tensor], optimizer: str | None = None) -> Step:
    """A step of co-training in bf16."""
    moves = make_optimizer(replace(recipe.train, optimizer=optimizer or recipe.train.optimizer), nested)
    cotrain = matta.CoTraining(nested, CausalLM()).train()
    return _step(lambda: cotrain(batch).loss, moves, nested)


def alone(recipe: Recipe, model: nn.Module, tokens: Tensor) -> Step:
    """A step of one model, by Transformers' own loss."""
    return _step(
        lambda: model(input_ids=tokens, labels=tokens).loss, make_optimizer(recipe.train, model), model.train()
    )


def _step(loss: Callable[[], Tensor], optimizer: torch.optim.Optimizer, module: nn.Module) -> Step:
    device = next(module.parameters()).device.type

    def step() -> None:
        with torch.autocast(device, dtype=torch.bfloat16):
            value = loss()
        value.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def in_turns(arms: dict[str, Step], *, rounds: int, steps: int) -> dict[str, float]:
    """Seconds of a step of each arm, the median over the rounds, after a round that does not count."""
    found: dict[str, list[float]] = {name: [] for name in arms}
    for number in range(rounds + 1):
        for name, step in arms.items():
            wait()
            start = time.perf_counter()
            for _ in range(steps):
                step()
            wait()
            if number:
                found[name].append((time.perf_counter() - start) / steps)
    return {name: statistics.median(each) for name, each in found.items()}


def wait() -> None:
    """Until the device has done what it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def peak_gib(step: Step) -> float | None:
    """The largest memory of the device in a step, in GiB."""
    if not torch.cuda.is_available():
        return None
    torch.cuda.reset_peak_memory_stats()
    step()
    return torch.cuda.max_memory_allocated() / GIB


def waits_of(step: Step) -> int | None:
    """How often the host waits for the device in a step."""
    if not torch.cuda.is_available():
        return None
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(each.message) for each in seen)


if __name__ == "__main__":
    main()
