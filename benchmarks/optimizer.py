"""What a step of Shampoo costs, and what its steps are worth, beside AdamW and the peers that are installed.

    python benchmarks/optimizer.py             overhead of a step of a small GPT, largest step, memory of the state
    python benchmarks/optimizer.py --quality   loss after 600 steps on real text, rates tuned with one budget
    python benchmarks/optimizer.py --waves     loss after 300 steps, by the steps over which the first roots are spread
    python benchmarks/optimizer.py --nested    overhead of Shampoo on whole co-training steps

With --json one JSON object and nothing else; with --arms only some optimizers; with --quick under a minute and rougher.
Times are processor time of one thread, so other processes disturb them little. A step's overhead counts means over
whole cycles of refreshes, since a median would hide the steps that only some optimizers make expensive. Peers:
pip install pytorch-optimizer heavyball.
"""

from __future__ import annotations

import copy
import functools
import gc
import pydoc_data.topics
import statistics
import sys
import time
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from figures import benchmark_parser, print_figures
from matta.optim import preconditioner
from nested_step import measure_nested
from optimizer_arms import OURS, Arm, Build, arms, missing_peers
from tiny_gpt import TinyGPT, next_token_loss

# --- overhead


def measure_overhead(*, num_steps: int) -> dict[str, Any]:
    """Every arm gets the gradients of one forward and backward pass per round, whose time is shared by all.

    The first steps, in which ours refreshes more often, count for the worst step and not for the overhead.
    """
    torch.manual_seed(0)
    model = TinyGPT()
    running = {name: Arm(copy.deepcopy(model), build) for name, build in arms().items()}
    num_warmup = {name: 50 if name == "matta" else 10 for name in running}
    passes = []
    for round_number in range(1 + num_steps):
        ids = torch.randint(512, (16, 129))
        start = time.process_time()
        model.zero_grad()
        next_token_loss(model, ids).backward()
        passes.append(time.process_time() - start)
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        for name, arm in running.items():
            for _ in range(1 if round_number else num_warmup[name]):
                arm.step(gradients)
        model.load_state_dict(running["adamw"].model.state_dict())
    return summarise(running, statistics.median(passes), num_warmup)


def summarise(running: dict[str, Arm], pass_seconds: float, num_warmup: dict[str, int]) -> dict[str, Any]:
    base = pass_seconds + statistics.mean(running["adamw"].seconds[num_warmup["adamw"] :])
    figures: dict[str, Any] = {"pass_ms": pass_seconds * 1e3}
    for name, arm in running.items():
        steps = [pass_seconds + seconds for seconds in arm.seconds]
        figures[f"overhead_percent_{name}"] = 100 * (statistics.mean(steps[num_warmup[name] :]) / base - 1)
        figures[f"worst_step_ratio_{name}"] = max(steps) / statistics.median(steps[num_warmup[name] :])
    for name, build in arms().items():
        figures[f"peak_state_mb_{name}"] = state_megabytes(build)
    for key in ("overhead_percent", "worst_step_ratio", "peak_state_mb"):
        figures[key] = figures[f"{key}_matta"]
    return figures


def state_megabytes(build: Build) -> float:
    """All that the optimizer holds between steps beyond parameters and gradients, buffers included."""
    model = TinyGPT()
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    before = held_bytes()
    optimizers = build(model, 1e-4)
    for _ in range(2):
        for optimizer in optimizers:
            optimizer.step()
    held = held_bytes() - before
    del optimizers
    return held / 2**20


def held_bytes() -> int:
    gc.collect()
    tensors = (each for each in gc.get_objects() if issubclass(type(each), Tensor))
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


# --- quality

RATES = (1.5e-3, 3e-3, 6e-3, 1.2e-2, 2.4e-2)
NUM_EVALUATED = 40


@functools.cache
def corpus() -> tuple[Tensor, Tensor]:
    """Bytes of CPython's help topics: nine tenths to train on, the last tenth held out."""
    text = "\n".join(pydoc_data.topics.topics[key] for key in sorted(pydoc_data.topics.topics))
    data = torch.tensor(list(text.encode()))
    cut = len(data) * 9 // 10
    return data[:cut], data[cut:]


def windows(data: Tensor, generator: torch.Generator) -> Tensor:
    starts = torch.randint(len(data) - 65, (32,), generator=generator)
    return torch.stack([data[start : start + 65] for start in starts.tolist()])


def held_out_losses(build: Build, lr: float, *, seed: int, num_steps: int) -> tuple[float, float]:
    """Nats per byte on held-out text half way and after training at a constant rate; infinity if it diverges."""
    torch.manual_seed(seed)
    model = TinyGPT(num_layers=2, width=64, hidden=128, vocabulary=256, context=64)
    optimizers = build(model, lr)
    train, held_out = corpus()
    generator = torch.Generator().manual_seed(seed)
    half_way = float("inf")
    for step in range(num_steps):
        if step == num_steps // 2:
            half_way = evaluate(model, held_out)
        model.zero_grad()
        loss = next_token_loss(model, windows(train, generator))
        if not loss.isfinite():
            return half_way, float("inf")
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
    return half_way, evaluate(model, held_out)


def evaluate(model: TinyGPT, held_out: Tensor) -> float:
    generator = torch.Generator().manual_seed(12345)
    with torch.no_grad():
        losses = [next_token_loss(model, windows(held_out, generator)) for _ in range(NUM_EVALUATED)]
    return torch.stack(losses).mean().item()


def measure_quality(builds: dict[str, Build], *, num_steps: int, num_seeds: int) -> dict[str, Any]:
    """The best of the same rates for every optimizer on a seed that is not counted, then the mean over seeds.

    Rates being constant, the loss half way is that of a run of half the length, which is tuned for itself.
    """
    figures: dict[str, Any] = {}
    for name, build in builds.items():
        tuned = [held_out_losses(build, lr, seed=100, num_steps=num_steps) for lr in RATES]
        best_half, best = (min(RATES, key=lambda lr: tuned[RATES.index(lr)][end]) for end in (0, 1))
        runs = {
            lr: [held_out_losses(build, lr, seed=seed, num_steps=num_steps) for seed in range(num_seeds)]
            for lr in {best, best_half}
        }
        losses, halves = [loss for _, loss in runs[best]], [half_way for half_way, _ in runs[best_half]]
        figures[f"loss_{name}"], figures[f"loss_{name}_{num_steps // 2}"] = map(statistics.mean, (losses, halves))
        figures[f"losses_{name}"], figures[f"losses_{name}_{num_steps // 2}"] = losses, halves
        figures[f"lr_{name}"], figures[f"lr_{name}_{num_steps // 2}"] = best, best_half
        figures[f"tuning_{name}"] = dict(zip(map(str, RATES), tuned, strict=True))
        means = statistics.mean(losses), statistics.mean(halves)
        print(f"{name:24} {means[0]:.4f} at {best:g}, half way {means[1]:.4f} at {best_half:g}", file=sys.stderr)
    peers = [figures[f"loss_{name}"] for name in builds if name not in OURS]
    figures["loss_best_peer"] = min(peers) if peers else None
    for steps in ("", f"_{num_steps // 2}"):
        if OURS.keys() <= builds.keys():
            figures[f"gain_over_adamw{steps}"] = figures[f"loss_adamw{steps}"] - figures[f"loss_matta{steps}"]
    return figures


WAVES = {
    "in step 1": (1, 2, 4, 8, 16, 24, 32, 40),
    "over steps 1 to 3": (1, 4, 8, 16, 24, 32, 40),
    "over steps 1 to 7": (1, 8, 16, 24, 32, 40),
}
"""Steps at which all roots begin to be computed anew, by how long the first time takes."""


def measure_waves(*, num_steps: int, num_seeds: int) -> dict[str, Any]:
    """Losses half way and at the end by seed, at the rate that is best for 300 steps."""
    figures: dict[str, Any] = {}
    for name, waves in WAVES.items():
        with mock.patch.object(preconditioner, "EARLY_WAVES", waves):
            build = OURS["matta"]
            losses = [held_out_losses(build, 6e-3, seed=seed, num_steps=num_steps) for seed in range(num_seeds)]
        for end, steps in enumerate((num_steps // 2, num_steps)):
            found = [each[end] for each in losses]
            figures[f"loss_{steps}, {name}"], figures[f"losses_{steps}, {name}"] = statistics.mean(found), found
    return figures


# --- command line


def main() -> None:
    parser = benchmark_parser("Cost and worth of Shampoo's steps.", quick="under a minute, rougher")
    parser.add_argument("--quality", action="store_true", help="loss after 600 steps on real text")
    parser.add_argument("--nested", action="store_true", help="overhead on whole co-training steps")
    parser.add_argument("--waves", action="store_true", help="loss by how the first refresh is spread")
    parser.add_argument("--arms", help="with --quality: comma-separated names of the arms to run, others left out")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.quality:
        runs = {"num_steps": 10, "num_seeds": 1} if options.quick else {"num_steps": 600, "num_seeds": 3}
        chosen = options.arms.split(",") if options.arms else arms()
        figures = measure_quality({name: arms()[name] for name in chosen}, **runs)
    elif options.waves:
        runs = {"num_steps": 10, "num_seeds": 1} if options.quick else {"num_steps": 300, "num_seeds": 3}
        figures = measure_waves(**runs)
    elif options.nested:
        figures = measure_nested(quick=options.quick)
    else:
        figures = measure_overhead(num_steps=10 if options.quick else 100)
    for module in missing_peers():
        print(f"{module} is not installed: its arms are left out", file=sys.stderr)
    print_figures(figures, as_json=options.json)


if __name__ == "__main__":
    main()
