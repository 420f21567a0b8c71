"""Downwards from a trained model: matta beside Torch-Pruning and NVIDIA Model Optimizer, at equal steps.

A ranker of films, a CNN on scikit-learn's digits and a byte GPT are trained first. Each tool then makes models of 75,
50 and 25% of the parameters of them, which train for the same number of steps on the same batches:

    matta            order by taylor and by magnitude, embeddings turned onto principal axes; of both orders and all
                     shapes, those with more hidden units in one block too, the leading slice with the least training
                     loss; nest(warm_start="ta"); co-train on labels and the trained model's probabilities, half each;
                     extract
    matta_family     the three sizes of one order in one run, a third of the steps in all
    torch_pruning    a uniform ratio, heads and embeddings too; by taylor and by magnitude; labels and distillation
    model_optimizer  FastNAS under a limit of parameters; labels and distillation

Quality is the held-out cross-entropy in nats: lower is better. Of Torch-Pruning's two importances the better one on
these held-out data counts, while matta chooses by the training loss. Its shapes are of all dimensions from a tenth to
the whole, so those that keep embeddings or a residual stream whole are among them. Changes are in percent against the
best of the others, paired by seed, with 95% intervals.

    python benchmarks/down.py [--quick] [--seeds N] [--first N] [--tasks ranker,cnn,gpt,handled] [--json]

Needs `pip install 'matta[bench]'`; a tool that is missing is said so in the figures.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any, final

import torch

import down_arms as arms
from down_models import MODELS, handled
from down_tasks import Task, byte_model, digits, num_parameters, ranker
from matta_studies.intervals import relative_change

SHARES = (0.75, 0.5, 0.25)
TASKS = {"ranker": ranker, "cnn": digits, "gpt": byte_model}
HANDLED = "handled"


@final
@dataclass(frozen=True, kw_only=True)
class Effort:
    """How much is run."""

    seeds: int
    training: dict[str, int]
    tuning: dict[str, int]
    num_shapes: int
    num_candidates: int
    importances: tuple[str, ...]
    models: tuple[str, ...]
    limit_s: int


QUICK = Effort(
    seeds=2,
    training={"ranker": 100, "cnn": 60, "gpt": 30},
    tuning={"ranker": 15, "cnn": 10, "gpt": 6},
    num_shapes=4,
    num_candidates=5,
    importances=("taylor",),
    models=("ranker", "cnn", "byte_gpt", "lstm", "torch_encoder"),
    limit_s=3,
)
FULL = Effort(
    seeds=5,
    training={"ranker": 800, "cnn": 400, "gpt": 500},
    tuning={"ranker": 100, "cnn": 60, "gpt": 60},
    num_shapes=300,
    num_candidates=300,
    importances=("taylor", "magnitude"),
    models=tuple(MODELS),
    limit_s=30,
)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="Downwards from a trained model, beside other tools.")
    parser.add_argument("--quick", action="store_true", help="two seeds and few steps: under a minute")
    parser.add_argument("--seeds", type=int, help="seeds of each task (default: 5)")
    parser.add_argument("--first", type=int, default=0, help="the first seed (default: 0)")
    parser.add_argument("--tasks", default=",".join([*TASKS, HANDLED]), help="which, with commas")
    parser.add_argument("--json", action="store_true", help="print one JSON object, nothing else")
    options = parser.parse_args()
    torch.set_num_threads(1)
    effort = QUICK if options.quick else FULL
    figures: dict[str, Any] = {f"version.{name}": version for name, version in arms.versions().items()}
    for name in options.tasks.split(","):
        if name == HANDLED:
            figures |= handled(effort.models, effort.limit_s)
        else:
            figures |= measure(
                TASKS[name](), effort, range(options.first, options.first + (options.seeds or effort.seeds))
            )
    if options.json:
        print(json.dumps(figures))
        return
    for name, value in figures.items():
        print(f"{name:48} {value:9.4f}" if isinstance(value, float) else f"{name:48} {value}")


def measure(task: Task, effort: Effort, seeds: Sequence[int]) -> dict[str, Any]:
    """All tools on one task."""
    run = _Measured(task, effort)
    for seed in seeds:
        run.add(seed)
        print(f"{task.name}: seed {seed} done", file=sys.stderr, flush=True)
    return run.figures()


@final
class _Measured:
    """The qualities of a task, by tool, importance and share of the parameters, one of each seed."""

    def __init__(self, task: Task, effort: Effort) -> None:
        self.task, self.effort = task, effort
        self.steps = effort.tuning[task.name]
        self.start: list[float] = []
        self.quality: dict[tuple[str, str, float], list[float]] = defaultdict(list)
        self.seconds: dict[str, list[float]] = defaultdict(list)
        self.parameters: dict[str, int] = {}
        self.cannot: dict[str, str] = {}

    def add(self, seed: int) -> None:
        """One seed of every tool."""
        ta = arms.trained(self.task, self.effort.training[self.task.name], seed)
        self.start.append(self.task.quality(ta))
        self._matta(ta, seed)
        for importance in self.effort.importances:
            self._other("torch_pruning", importance, ta, seed)
        self._other("model_optimizer", "search", ta, seed)

    def _matta(self, ta: torch.nn.Module, seed: int) -> None:
        task, num = self.task, self.effort.num_shapes
        orders, seconds = arms.timed(lambda: [arms.ordered(task, ta, each, seed) for each in self.effort.importances])
        found, searching = arms.timed(
            lambda: [[arms.best_shape(task, each, share, seed, num) for share in SHARES] for each in orders]
        )
        self.seconds["matta"].append((seconds + searching) / len(SHARES))
        for column, share in enumerate(SHARES):
            (_, shape), order = min(zip([row[column] for row in found], orders, strict=True), key=lambda each: each[0])
            [made] = arms.co_trained(task, ta, order, [shape], num_steps=self.steps, seed=seed)
            self._note("matta", "search", share, made)
        row, order = min(zip(found, orders, strict=True), key=lambda each: sum(loss for loss, _ in each[0]))
        family = arms.co_trained(task, ta, order, [shape for _, shape in row], num_steps=self.steps, seed=seed)
        for share, made in zip(SHARES, family, strict=True):
            self._note("matta_family", "search", share, made)

    def _other(self, tool: str, importance: str, ta: torch.nn.Module, seed: int) -> None:
        task = self.task
        for share in SHARES:
            key = f"{task.name}.{tool}.{share:.0%}"
            larger = [f"{task.name}.{tool}.{each:.0%}" for each in SHARES if each > share]
            if any(each in self.cannot for each in (key, *larger)):
                self.cannot.setdefault(key, "it cannot leave a larger share")
                continue
            try:
                if tool == "torch_pruning":
                    made, seconds = arms.timed(lambda s=share: arms.torch_pruned(task, ta, s, importance, seed))
                else:
                    made, seconds = arms.timed(
                        lambda s=share: arms.model_optimized(task, ta, s, seed, self.effort.num_candidates)
                    )
            except arms.CannotError as error:
                self.cannot[key] = str(error)
                continue
            self.seconds[tool].append(seconds)
            made = arms.distilled(task, copy.deepcopy(ta), made, num_steps=self.steps, seed=seed)
            self._note(tool, importance, share, made)

    def _note(self, tool: str, importance: str, share: float, module: torch.nn.Module) -> None:
        self.quality[tool, importance, share].append(self.task.quality(module))
        self.parameters[f"{self.task.name}.parameters.{tool}.{share:.0%}"] = num_parameters(module)

    def figures(self) -> dict[str, Any]:
        """Means, changes with intervals, seconds, and what could not be done."""
        name = self.task.name
        found: dict[str, Any] = {f"{name}.quality.trained": fmean(self.start)}
        for share in SHARES:
            best = self._best(share)
            for tool, values in best.items():
                found[f"{name}.quality.{tool}.{share:.0%}"] = fmean(values)
            others = [values for tool, values in best.items() if not tool.startswith("matta")]
            for tool in ("matta", "matta_family"):
                if others and len(best[tool]) > 1:
                    change = relative_change(best[tool], min(others, key=fmean))
                    found[f"{name}.change_percent.{tool}.{share:.0%}"] = change.mean
                    found[f"{name}.change_interval.{tool}.{share:.0%}"] = change.interval
        found |= {f"{name}.seconds_to_prune.{tool}": fmean(each) for tool, each in self.seconds.items()}
        found |= self.parameters
        return found | {f"cannot.{key}": reason for key, reason in self.cannot.items()}

    def _best(self, share: float) -> dict[str, list[float]]:
        """Each tool's qualities at its better importance."""
        best: dict[str, list[float]] = {}
        for (tool, _, at), values in self.quality.items():
            if at == share and (tool not in best or fmean(values) < fmean(best[tool])):
                best[tool] = values
        return best


if __name__ == "__main__":
    main()
