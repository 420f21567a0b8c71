"""Overhead of Shampoo on whole co-training steps against AdamW on the same ones, for `optimizer.py --nested`."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

import matta
from optimizer_arms import OURS, Arm
from tiny_gpt import TinyGPT

TABLES = (671, 9066, 24, 7)  # users, films, hours, weekdays
NUM_WARMUP = 50  # steps in which Shampoo refreshes more often: they count for the worst step only
Batch = tuple[Tensor, Tensor]


class Ranker(nn.Module):
    """Embeddings of the ids of a (user, film, context) tuple, side by side, into an MLP with one logit."""

    def __init__(self, *, width: int, hidden: tuple[int, int]) -> None:
        super().__init__()
        self.tables = nn.ModuleList(nn.Embedding(size, width) for size in TABLES)
        first, second = hidden
        self.mlp = nn.Sequential(
            nn.Linear(width * len(TABLES), first), nn.ReLU(), nn.Linear(first, second), nn.ReLU(), nn.Linear(second, 1)
        )

    def forward(self, ids: Tensor) -> Tensor:
        columns = [table(each) for table, each in zip(self.tables, ids.unbind(1), strict=True)]
        return self.mlp(torch.cat(columns, dim=1)).squeeze(1)


def ranker() -> tuple[matta.CoTraining, Callable[[], Batch]]:
    student = Ranker(width=8, hidden=(64, 32))
    ta = Ranker(width=16, hidden=(256, 128))
    nested = matta.nest(student, ta, layouts={"mlp.0.weight": matta.Layout({1: len(TABLES)})})

    def batch() -> Batch:
        ids = torch.stack([torch.randint(size, (512,)) for size in TABLES], dim=1)
        return ids, torch.rand(512)

    return matta.CoTraining(nested, matta.objectives.Binary()), batch


def language_model() -> tuple[matta.CoTraining, Callable[[], Batch]]:
    nested = matta.nest(TinyGPT(), TinyGPT(num_layers=6, hidden=2048), layers={"h": "first"})

    def batch() -> Batch:
        ids = torch.randint(512, (16, 129))
        return ids[:, :-1], ids[:, 1:]

    return matta.CoTraining(nested, matta.objectives.Classification()), batch


def measure_nested(*, quick: bool) -> dict[str, float]:
    """Overheads in percent of the whole step: forward, three losses, backward, optimizer."""
    figures: dict[str, float] = {}
    cases = {"ranker": (ranker, 200 if quick else 2000), "lm": (language_model, 10 if quick else 50)}
    for case, (build, num_steps) in cases.items():
        torch.manual_seed(0)
        pass_seconds, arms = run(*build(), num_steps=num_steps)
        seconds = {name: statistics.mean(arm.seconds[NUM_WARMUP:]) for name, arm in arms.items()}
        base = pass_seconds + seconds["adamw"]
        figures[f"{case}_overhead_percent"] = 100 * ((pass_seconds + seconds["matta"]) / base - 1)
        figures[f"{case}_pass_ms"] = pass_seconds * 1e3
        figures |= {f"{case}_{name}_step_ms": value * 1e3 for name, value in seconds.items()}
        whole = [pass_seconds + each for each in arms["matta"].seconds]
        figures[f"{case}_worst_step_ratio"] = max(whole) / statistics.median(whole[NUM_WARMUP:])
    return figures


def run(cotrain: matta.CoTraining, batch: Callable[[], Batch], *, num_steps: int) -> tuple[float, dict[str, Arm]]:
    """Median time of the passes, and the arms, which all take a step with each pass's gradients."""
    arms = {name: Arm(copy.deepcopy(cotrain.nested), build) for name, build in OURS.items()}
    passes = []
    for round_number in range(1 + num_steps):
        inputs = batch()
        start = time.process_time()
        cotrain.zero_grad()
        cotrain(inputs).loss.backward()
        passes.append(time.process_time() - start)
        gradients = [parameter.grad for parameter in cotrain.nested.parameters() if parameter.grad is not None]
        for arm in arms.values():
            for _ in range(1 if round_number else NUM_WARMUP):
                arm.step(gradients)
    return statistics.median(passes), arms
