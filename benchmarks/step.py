"""What a co-training step costs beside a step of the Student and a step of the TA, each alone.

`ranker_ratio` and `lm_ratio` are co-training step / (Student step + TA step), each with forward, loss, backward and
AdamW. The three arms run in turn in one process on one thread; times are processor time, the ratio is the median over
rounds. `extract_gb_per_s` is the speed of `matta.extract` on the TA of the LM, beside a plain copy of its weights.

    python benchmarks/step.py [--quick] [--json]
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

import matta
from figures import benchmark_parser, print_figures
from matta.objectives import Binary, CausalLM, Objective
from ranker import nest_rankers, ranker_batch, ranker_pair
from tiny_gpt import TinyGPT

Arm = Callable[[], None]


def main() -> None:
    """Measure and print."""
    parser = benchmark_parser(
        "Cost of a co-training step, and speed of extraction.", quick="fewer rounds, under a minute"
    )
    options = parser.parse_args()
    torch.set_num_threads(1)
    figures = {
        **{f"ranker_{name}": value for name, value in ranker(num_rounds=20 if options.quick else 150).items()},
        **{f"lm_{name}": value for name, value in language_model(num_rounds=3 if options.quick else 15).items()},
        **extraction(num_rounds=3 if options.quick else 20),
    }
    print_figures(figures, as_json=options.json)


def ranker(*, num_rounds: int) -> dict[str, float]:
    """Batch 512, Student MLP 64-32, TA 4x; 20 steps to a round."""
    (student, ta), batch = ranker_pair(), ranker_batch()
    nested = nest_rankers(*ranker_pair())
    return compare(student, ta, nested, Binary(), batch, num_rounds=num_rounds, steps=20)


def language_model(*, num_rounds: int) -> dict[str, float]:
    """Student of width 256 with 4 layers, TA 6 layers with FFN x2, vocabulary 512, 16x128 tokens."""
    torch.manual_seed(0)
    student, ta = TinyGPT(), TinyGPT(num_layers=6, hidden=2048)
    nested = matta.nest(TinyGPT(), TinyGPT(num_layers=6, hidden=2048), layers={"h": "first"})
    ids = torch.randint(512, (16, 128))
    batch = {"ids": ids, "labels": ids}
    return compare(student, ta, nested, CausalLM(), batch, num_rounds=num_rounds, steps=1)


def compare(
    student: nn.Module,
    ta: nn.Module,
    nested: matta.Nested,
    objective: Objective,
    batch: dict[str, Tensor] | tuple[tuple[Tensor, Tensor], Tensor],
    *,
    num_rounds: int,
    steps: int,
) -> dict[str, float]:
    """Milliseconds of a step of each arm, and the ratio."""
    cotrain = matta.CoTraining(nested, objective)
    optimizer = torch.optim.AdamW(nested.parameters(), foreach=True)

    def together() -> None:
        optimizer.zero_grad()
        cotrain(batch).loss.backward()
        optimizer.step()

    arms = {
        "student_ms": alone(student, objective, batch),
        "ta_ms": alone(ta, objective, batch),
        "cotraining_ms": together,
    }
    rounds = [{name: timed(arm, steps) for name, arm in arms.items()} for _ in range(num_rounds + 2)][2:]
    figures = {name: statistics.median(each[name] for each in rounds) for name in arms}
    ratios = [each["cotraining_ms"] / (each["student_ms"] + each["ta_ms"]) for each in rounds]
    return {"ratio": statistics.median(ratios), **figures}


def alone(model: nn.Module, objective: Objective, batch: dict[str, Tensor] | tuple[tuple[Tensor, ...], Tensor]) -> Arm:
    """A step of one model, with the same loss function and optimizer."""
    optimizer = torch.optim.AdamW(model.parameters(), foreach=True)

    def step() -> None:
        optimizer.zero_grad()
        if isinstance(batch, dict):
            loss = objective.cross_entropy(model(batch["ids"]), batch["labels"])
        else:
            loss = objective.cross_entropy(model(*batch[0]), batch[1])
        loss.backward()
        optimizer.step()

    return step


def extraction(*, num_rounds: int) -> dict[str, float]:
    """Gigabytes of weights a second, of the wide sub-model and of a plain clone of the same weights."""
    nested = matta.nest(TinyGPT(), TinyGPT(num_layers=6, hidden=2048), layers={"h": "first"})
    spec = matta.wide(nested)
    gigabytes = sum(p.numel() * p.element_size() for p in nested.ta.parameters()) / 1e9

    def copy() -> None:
        [p.detach().clone() for p in nested.ta.parameters()]

    arms: dict[str, Arm] = {
        "extract_gb_per_s": lambda: void(matta.extract(nested, spec)),
        "extract_student_gb_per_s": lambda: void(matta.extract(nested)),
        "copy_gb_per_s": copy,
    }
    sizes = dict.fromkeys(arms, gigabytes)
    sizes["extract_student_gb_per_s"] = sum(p.numel() * 4 for p in matta.extract(nested).parameters()) / 1e9
    rounds = [{name: timed(arm, 1) for name, arm in arms.items()} for _ in range(num_rounds + 1)][1:]
    return {name: sizes[name] / (statistics.median(each[name] for each in rounds) / 1e3) for name in arms}


def void(_: object) -> None:
    """Drop a result."""


def timed(arm: Arm, steps: int) -> float:
    """Milliseconds of processor time of one call."""
    start = time.process_time()
    for _ in range(steps):
        arm()
    return (time.process_time() - start) / steps * 1e3


if __name__ == "__main__":
    main()
