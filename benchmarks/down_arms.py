"""The tools of `benchmarks/down.py`: each makes a smaller model of a trained one, and trains it for the same steps."""

from __future__ import annotations

import contextlib
import copy
import io
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from itertools import islice
from typing import Any

import torch
from torch import nn

import matta
from down_tasks import Sizes, Task, num_parameters
from matta.nesting.slicing import materialize

NUM_MEASURED = 16  # batches that importance is measured on, by each tool
NUM_MOVED = 3  # even shapes from which uneven ones are made


class CannotError(Exception):
    """A tool does not handle a model, or is not installed."""


def trained(task: Task, num_steps: int, seed: int) -> nn.Module:
    """The large model that everything starts from."""
    torch.manual_seed(seed)
    module = task.build(task.full)
    optimizer, schedule = _optimizer(module, task.rate, num_steps)
    for inputs, labels in islice(task.batches(seed), num_steps):
        optimizer.zero_grad()
        task.objective.cross_entropy(module.train()(*inputs), labels).backward()
        optimizer.step()
        schedule.step()
    return module


def _optimizer(module: nn.Module, rate: float, num_steps: int) -> tuple[torch.optim.Optimizer, Any]:
    optimizer = torch.optim.AdamW(module.parameters(), lr=rate, weight_decay=0.01)
    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / num_steps)


# --- matta ----------------------------------------------------------------------------------------


def ordered(task: Task, ta: nn.Module, importance: str, seed: int) -> nn.Module:
    """The trained model with its channels in order, or turned where only linear maps touch them."""
    data = islice(task.batches(1000 + seed), NUM_MEASURED)
    return matta.order(ta, example=task.example(), data=data, importance=importance, loss=task.objective, rotate=True)


def best_shape(task: Task, ta: nn.Module, share: float, seed: int, num_shapes: int) -> tuple[float, Sizes]:
    """Of several shapes with that share of the parameters, the one whose leading slice has the least training loss.

    From the best few, units are then moved between blocks.
    """
    measured = list(islice(task.batches(2000 + seed), 4))

    @torch.no_grad()
    def loss(sizes: Sizes) -> float:
        student = _nested(task, ta, [sizes]).student.eval()
        return sum(float(task.objective.cross_entropy(student(*inputs), labels)) for inputs, labels in measured)

    even = sorted((loss(sizes), sizes) for sizes in task.shapes(share, num_shapes))
    return min(even + [(loss(moved), moved) for _, sizes in even[:NUM_MOVED] for moved in task.uneven(sizes)])


def _nested(task: Task, ta: nn.Module, shapes: Sequence[Sizes]) -> matta.Nested:
    if len(shapes) > 1:
        students = [task.build(sizes) for sizes in shapes]
        return matta.nest(students, ta, example=task.example(), warm_start="ta")
    return matta.nest(task.build(shapes[0]), ta, layouts=task.layouts(shapes[0], task.full), warm_start="ta")


def co_trained(
    task: Task, teacher: nn.Module, ta: nn.Module, shapes: Sequence[Sizes], *, num_steps: int, seed: int
) -> list[nn.Module]:
    """Students of an ordered model, in one run, and extracted; on the labels and the trained model's probabilities."""
    nested = _nested(task, copy.deepcopy(ta), shapes)
    ramp = matta.Ramp(start=0, steps=0)
    cotrain = matta.CoTraining(nested, task.objective, ramp=ramp, teacher=teacher, labels=0.5)
    optimizer, schedule = _optimizer(nested, task.rate, num_steps)
    for batch in islice(task.batches(seed + 1), num_steps):
        optimizer.zero_grad()
        cotrain.train()(batch).loss.backward()
        optimizer.step()
        schedule.step()
    return [materialize(student) for student in nested.students]


# --- the others -----------------------------------------------------------------------------------


def distilled(task: Task, teacher: nn.Module, student: nn.Module, *, num_steps: int, seed: int) -> nn.Module:
    """A pruned model after the same steps, on the labels and the trained model's probabilities."""
    optimizer, schedule = _optimizer(student, task.rate, num_steps)
    for inputs, labels in islice(task.batches(seed + 1), num_steps):
        with torch.no_grad():
            logits = teacher.eval()(*inputs)
        optimizer.zero_grad()
        losses = task.objective.losses([student.train()(*inputs)], logits, labels)
        (losses.students[0] + losses.distill[0]).backward()
        optimizer.step()
        schedule.step()
    return student


def torch_pruned(task: Task, ta: nn.Module, share: float, importance: str, seed: int) -> nn.Module:
    """Torch-Pruning (`torch-pruning`): the least uniform ratio that leaves the share of the parameters."""
    tp = package("torch_pruning", "torch-pruning")
    most, low, high = num_parameters(ta) * share, 0.0, 0.99
    best = None
    for _ in range(6):
        ratio = (low + high) / 2
        found = _torch_pruned_by(tp, task, ta, ratio, importance, seed)
        if num_parameters(found) <= most:
            best, high = found, ratio
        else:
            low = ratio
    if best is None:
        raise CannotError(f"no ratio leaves {share:.0%} of the parameters")
    return best


def _torch_pruned_by(tp: Any, task: Task, ta: nn.Module, ratio: float, importance: str, seed: int) -> nn.Module:
    module = copy.deepcopy(ta).eval()
    heads = task.heads(module)
    kinds = {"taylor": tp.importance.GroupTaylorImportance, "magnitude": tp.importance.GroupMagnitudeImportance}
    pruner = tp.pruner.BasePruner(
        module,
        task.example()[0],
        importance=kinds[importance](),
        pruning_ratio=ratio,
        head_pruning_ratio=ratio,
        num_heads=heads,
        prune_num_heads=bool(heads),
        prune_head_dims=False,
        ignored_layers=[module.get_submodule(name) for name in task.kept],
        root_module_types=[nn.Conv2d, nn.Linear, nn.Embedding],
    )
    for inputs, labels in islice(task.batches(1000 + seed), NUM_MEASURED if importance == "taylor" else 0):
        task.objective.cross_entropy(module(*inputs), labels).backward()
    pruner.step()
    module.zero_grad()
    module(*task.example()[0])
    return module


def model_optimized(task: Task, ta: nn.Module, share: float, seed: int, num_candidates: int) -> nn.Module:
    """NVIDIA Model Optimizer (`nvidia-modelopt`), FastNAS: its search under a limit of parameters.

    Its Minitron mode takes models of Megatron-Core alone.
    """
    with silence():
        prune = package("modelopt.torch.prune", "nvidia-modelopt")
    module = copy.deepcopy(ta)
    data = list(islice(task.batches(1000 + seed), NUM_MEASURED))
    inputs = [batch[0] for batch in data]
    ratios = tuple(step / 10 for step in range(1, 11))
    space = {
        "nn.Conv2d": {"*": {"channels_ratio": ratios, "kernel_size": (), "channel_divisor": 1}},
        "nn.Linear": {"*": {"features_ratio": ratios, "feature_divisor": 1}},
    }

    def score(candidate: nn.Module) -> float:
        with torch.no_grad():
            return -sum(float(task.objective.cross_entropy(candidate.eval()(*x), y)) for x, y in data[:4])

    try:
        with silence():
            found, _ = prune.prune(
                module,
                mode=[("fastnas", space)],
                constraints={"params": f"{100 * share:.0f}%"},
                dummy_input=inputs[0] if len(inputs[0]) > 1 else inputs[0][0],
                config={
                    "data_loader": inputs,
                    "score_func": score,
                    "checkpoint": None,
                    "verbose": False,
                    "num_iters": num_candidates,
                },
            )
    except Exception as error:
        text = str(error)
        reason = "the share is outside of its search space" if "NOT all constraints" in text else text.strip()[:200]
        raise CannotError(f"FastNAS: {reason or type(error).__name__}") from error
    return found


def package(name: str, distribution: str) -> Any:
    try:
        module = __import__(name, fromlist=["_"])
    except ImportError as error:
        raise CannotError(f"{distribution} cannot be imported: {error}; pip install 'matta[bench]'") from error
    return module


def versions() -> dict[str, str]:
    """The versions of the tools, "" where one is missing."""
    found = {}
    for name in ("torch-pruning", "nvidia-modelopt"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = ""
    return found


@contextlib.contextmanager
def silence() -> Iterator[None]:
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        with contextlib.redirect_stderr(io.StringIO()):
            yield


def timed(function: Callable[[], Any]) -> tuple[Any, float]:
    """What a function returns, and the seconds that it took."""
    start = time.perf_counter()
    return function(), time.perf_counter() - start
