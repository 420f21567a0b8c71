"""What `matta.fit` costs beside the ten-line loop, on a ranker's small step: batch 512, Student MLP 64-32, TA 4x.

The same step (forward, three losses, backward, AdamW) over the same batches in three arms, in turn in one process on
one thread: a plain loop, `fit` as it is called by default, and `fit` with all that it can do beside training off. Times
are processor time; `overhead_percent` is the median over rounds of what `fit` takes longer, all that a call does once
included; `setup_ms` is a call of no more than one step, less that step.

    python benchmarks/fit_overhead.py [--quick] [--json]
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable

import torch

import matta
from figures import benchmark_parser, print_figures
from ranker import nest_rankers, ranker_batch, ranker_pair

Arm = Callable[[int], None]


def main() -> None:
    """Measure and print."""
    parser = benchmark_parser("Cost of matta.fit beside a plain loop.", quick="fewer rounds, under half a minute")
    options = parser.parse_args()
    torch.set_num_threads(1)
    figures = measure(num_rounds=10 if options.quick else 40, steps=200)
    print_figures(figures, as_json=options.json)


def measure(*, num_rounds: int, steps: int) -> dict[str, float]:
    """Milliseconds of a step in each arm, and the overheads."""
    arms = {"loop": plain(), "fit": fitted(), "bare_fit": fitted(max_nonfinite=None, progress=False)}
    rounds = [{name: timed(arm, steps) for name, arm in arms.items()} for _ in range(num_rounds + 1)][1:]
    single = [{name: timed(arms[name], 1) for name in ("loop", "fit")} for _ in range(num_rounds)]
    figures = {f"{name}_step_ms": statistics.median(each[name] for each in rounds) / steps for name in arms}
    for name, prefix in (("fit", ""), ("bare_fit", "bare_")):
        ratio = statistics.median(each[name] / each["loop"] for each in rounds)
        figures[f"{prefix}overhead_percent"] = 100 * (ratio - 1)
    return {**figures, "setup_ms": statistics.median(each["fit"] - each["loop"] for each in single)}


def prepare() -> tuple[matta.CoTraining, torch.optim.Optimizer, list[object]]:
    """What every arm gets."""
    nested = nest_rankers(*ranker_pair())
    optimizer = torch.optim.AdamW(nested.parameters(), lr=1e-4, foreach=True)
    return matta.CoTraining(nested, matta.objectives.Binary()), optimizer, [ranker_batch()] * 50


def plain() -> Arm:
    """The loop that anybody would write."""
    cotrain, optimizer, data = prepare()

    def train(steps: int) -> None:
        for batch in itertools.islice(itertools.cycle(data), steps):
            optimizer.zero_grad()
            cotrain(batch).loss.backward()
            optimizer.step()

    return train


def fitted(**settings: bool | None) -> Arm:
    """A call of `fit`."""
    cotrain, optimizer, data = prepare()
    return lambda steps: matta.fit(cotrain, data, optimizer, steps=steps, **settings)


def timed(arm: Arm, steps: int) -> float:
    """Processor milliseconds of a call."""
    start = time.process_time()
    arm(steps)
    return (time.process_time() - start) * 1e3


if __name__ == "__main__":
    main()
