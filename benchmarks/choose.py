"""How near `matta.family` comes to the front of all sizes, and whether its latencies hold when they are measured again.

    python benchmarks/choose.py            a trained pair of 12 blocks: 60 evaluations against all 4,096 sizes
    python benchmarks/choose.py --quick    8 blocks: 30 evaluations against all 256

With --json one JSON object and nothing else. `hypervolume_ratio` is the area of parameters and loss that the sizes
found dominate, over that of all sizes, up to the TA's parameters and the Student's loss. `latency_error_percent` is the
median difference between the latencies in the table and those measured again, one size at a time.
"""

from __future__ import annotations

import time
from itertools import product
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

import matta
from figures import benchmark_parser, print_figures
from matta.choosing.measuring import measure_latency, resized
from matta.choosing.searching import hypervolume

BATCH, EVALUATED, WIDTH, FEATURES = 256, 2048, 24, 16


class Block(nn.Module):
    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, hidden), nn.Linear(hidden, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.up(self.norm(x)).relu())


class Tower(nn.Module):
    def __init__(self, num_blocks: int, hidden: int) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(FEATURES, WIDTH), nn.Linear(WIDTH, 1)
        self.blocks = nn.ModuleList(Block(hidden) for _ in range(num_blocks))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def labelled(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Inputs and probabilities of a fixed function that small models cannot follow."""
    torch.manual_seed(12345)
    teacher = nn.Sequential(nn.Linear(FEATURES, 96), nn.Tanh(), nn.Linear(96, 96), nn.Tanh(), nn.Linear(96, 1))
    x = torch.randn(count, FEATURES, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        return x, (8.0 * teacher(x)).sigmoid().squeeze(1)


def trained_pair(num_blocks: int, num_steps: int) -> matta.Nested:
    torch.manual_seed(0)
    nested = matta.nest(Tower(num_blocks, 4), Tower(num_blocks, 32), warm_start=True)
    objective = matta.objectives.Binary()
    cotrain = matta.CoTraining.for_family(nested, objective, num_steps=num_steps, alone=0.3, student_chance=0.2)
    optimizer = matta.Shampoo(nested, lr=0.01)
    x, y = labelled(BATCH * num_steps, 1)
    for rows in torch.arange(len(x)).split(BATCH):
        optimizer.zero_grad()
        cotrain((x[rows], y[rows])).loss.backward()
        optimizer.step()
    return nested


def measure(*, num_blocks: int, num_steps: int, max_evaluations: int) -> dict[str, Any]:
    nested = trained_pair(num_blocks, num_steps)
    x, y = labelled(EVALUATED, 2)
    objective = matta.objectives.Binary()

    def evaluate(module: nn.Module) -> float:
        with torch.no_grad():
            return float(objective.cross_entropy(module(x), y))

    start = time.perf_counter()
    found = matta.family(
        nested, evaluate=evaluate, example=(x, y), max_evaluations=max_evaluations, batch_sizes=(64,), progress=False
    )
    seconds = time.perf_counter() - start
    points = [(float(size.parameters), size.quality) for size in found.sizes]
    names = matta.layer_names(nested)
    everything = []
    for choices in product(("narrow", "wide"), repeat=len(names)):
        module = matta.extract(nested, matta.SubModel(dict(zip(names, choices, strict=True)))).eval()
        everything.append((float(sum(each.numel() for each in module.parameters())), evaluate(module)))
    most, worst = max(cost for cost, _ in everything), evaluate(matta.extract(nested).eval())
    ends = [point for point in everything if point[0] in (most, min(everything)[0])]
    volumes = {
        name: hypervolume(each, most, worst) for name, each in (("found", points), ("all", everything), ("ends", ends))
    }
    errors = []
    for size in found.pareto():
        module = matta.extract(nested, size.spec).eval()
        (again,) = measure_latency([module], resized(x, 64), calls=50, threads=1)
        errors.append(100 * abs(again.median_ms / size.latency_ms - 1))
    return {
        "blocks": num_blocks,
        "evaluations": len(found.sizes),
        "all_sizes": len(everything),
        "hypervolume_ratio": volumes["found"] / volumes["all"],
        "hypervolume_ratio_of_the_ends": volumes["ends"] / volumes["all"],
        "latency_error_percent": median(errors),
        "latency_error_percent_max": max(errors),
        "seconds": seconds,
    }


def main() -> None:
    parser = benchmark_parser(
        "The front that matta.family finds, against all sizes.", quick="under a minute, fewer blocks"
    )
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.quick:
        figures = measure(num_blocks=8, num_steps=300, max_evaluations=30)
    else:
        figures = measure(num_blocks=12, num_steps=1500, max_evaluations=60)
    print_figures(figures, as_json=options.json)


if __name__ == "__main__":
    main()
