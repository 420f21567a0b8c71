"""FSDP2 over two processes (gloo on loopback), whole and by block, against one process."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader
from torchmetrics.classification import BinaryAUROC

import matta
from matta.errors import NestingError, RunError
from matta.objectives import CausalLM
from matta.optim.divided_parameters import local
from matta.training.run_evaluation import RunEvaluation

NUM_PROCESSES = 2
VOCABULARY, LENGTH, NUM_STEPS = 11, 6, 3


class Block(nn.Module):
    is_checkpointed = False

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 2 * hidden)
        self.down = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        if self.is_checkpointed:
            return checkpoint(self.compute, x, use_reentrant=False)
        return self.compute(x)

    def compute(self, x: Tensor) -> Tensor:
        return x + self.down(nn.functional.glu(self.up(self.norm(x))))


class Model(nn.Module):
    def __init__(self, depth: int, hidden: int, width: int = 6) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, width)
        self.blocks = nn.ModuleList([Block(width, hidden) for _ in range(depth)])
        self.head = nn.Linear(width, VOCABULARY, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def make(kind: str = "plain", dtype: torch.dtype = torch.float64) -> matta.CoTraining:
    torch.manual_seed(0)
    layouts = {"blocks.*.up.*": 2}
    nested = matta.nest(Model(2, 3), Model(3, 7), layers={"blocks": "first"}, layouts=layouts).to(dtype)
    for part in nested.modules():
        if isinstance(part, Block):
            part.is_checkpointed = kind == "checkpointed"
    specs = [matta.wide_narrow_wide(nested, k) for k in (1, 2)]
    return matta.CoTraining(
        nested,
        CausalLM(fused=kind == "fused"),
        sample=(lambda random: random.choice(specs)) if kind in ("sampled", "turns") else None,
        turns=matta.Turns(alone_steps=1, student_chance=0.5) if kind == "turns" else None,
        accumulate=2 if kind == "accumulated" else 1,
    )


def batch(step: int, rank: int = 0, size: int = 1) -> tuple[Tensor, Tensor]:
    ids = torch.randint(VOCABULARY, (4, LENGTH), generator=torch.Generator().manual_seed(step))[rank::size]
    return ids, ids


def train(cotrain: matta.CoTraining, optimizer: torch.optim.Optimizer, *, rank: int = 0, size: int = 1) -> None:
    """Steps by hand: gradients of all batches of a step, clipped by their common norm."""
    cotrain.train()
    for step in range(NUM_STEPS):
        optimizer.zero_grad()
        for index in range(cotrain.accumulate):
            if size > 1:
                cotrain.set_requires_gradient_sync(index + 1 == cotrain.accumulate)
            cotrain(batch(10 * step + index, rank, size)).loss.backward()
        torch.nn.utils.clip_grad_norm_(cotrain.nested.parameters(), 0.5)
        optimizer.step()


def adamw(cotrain: matta.CoTraining) -> torch.optim.Optimizer:
    return torch.optim.AdamW(cotrain.nested.parameters(), lr=0.01)


def whole(cotrain: matta.CoTraining, read: Callable[[nn.Parameter], Any] = lambda p: p) -> dict[str, Tensor]:
    found = {name: read(p) for name, p in cotrain.named_parameters()}
    return {name: (t.full_tensor() if hasattr(t, "full_tensor") else t).detach() for name, t in found.items()}


KINDS = ("plain", "checkpointed", "fused", "accumulated", "sampled", "turns")
TOLERANCE = {"rtol": 1e-9, "atol": 1e-11}


def work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=NUM_PROCESSES)
    try:
        for kind in KINDS:
            cotrain = matta.shard(make(kind))
            train(cotrain, adamw(cotrain), rank=rank, size=NUM_PROCESSES)
            torch.save(whole(cotrain), f"{folder}/{kind}-{rank}.pt")
        check_gradients(rank, folder)
        check_mixed_precision(rank, folder)
        check_what_is_taken_out(cotrain, folder, rank)
        check_fit(rank, folder)
        check_evaluation(rank, folder)
        measure_memory(rank, folder)
    finally:
        distributed.destroy_process_group()


def check_gradients(rank: int, folder: str) -> None:
    """By hand: `fully_shard` on blocks and then the pair, as on the pair alone."""
    mesh = init_device_mesh("cpu", (NUM_PROCESSES,))
    for by in ("whole", "block"):
        cotrain = make(dtype=torch.float32).train()
        for block in cotrain.nested.ta.blocks if by == "block" else ():
            fully_shard(block, mesh=mesh)
        fully_shard(cotrain, mesh=mesh)
        cotrain(batch(0, rank, NUM_PROCESSES)).loss.backward()
        assert all(p.grad.to_local().numel() < p.numel() for p in cotrain.parameters())
        torch.save(whole(cotrain, lambda p: p.grad), f"{folder}/gradients-{by}-{rank}.pt")


def check_mixed_precision(rank: int, folder: str) -> None:
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    cotrain = matta.shard(make(dtype=torch.float32), policy=policy).train()
    out = cotrain(batch(0, rank, NUM_PROCESSES))
    assert out.ta_logits.dtype == torch.bfloat16
    out.loss.backward()
    assert {p.dtype for p in cotrain.parameters()} == {p.grad.dtype for p in cotrain.parameters()} == {torch.float32}
    torch.save(whole(cotrain, lambda p: p.grad), f"{folder}/mixed-{rank}.pt")


def check_what_is_taken_out(cotrain: matta.CoTraining, folder: str, rank: int) -> None:
    nested = cotrain.nested
    with pytest.raises(NestingError, match="nothing gathers it"):
        nested.student(batch(0)[0])
    for name, spec in (("student", None), ("k1", matta.wide_narrow_wide(nested, 1))):
        module = matta.extract(nested, spec)
        assert {type(part) for part in module.modules()} <= {Model, Block, nn.ModuleList, *LEAVES}
        torch.save(pickle.loads(pickle.dumps(module)).state_dict(), f"{folder}/{name}-{rank}.pt")
    matta.save(nested, f"{folder}/saved")
    with pytest.raises(RunError, match="sharded over processes to publish"):
        matta.Snapshots(f"{folder}/snapshots", every_events=1).publish(nested)
    distributed.barrier()


def fit(cotrain: matta.CoTraining, steps: int, *, accumulate: int = 1, **changes: Any) -> matta.training.FitResult:
    optimizer = matta.Shampoo(cotrain.nested, lr=0.01, refresh_every=3, statistics_every=1)
    data = [tuple(each[:2] for each in batch(step)) for step in range(8)]
    evaluate = matta.Evaluation(data=data[:2], objective=CausalLM())
    settings = {"clip_norm": 0.5, "evaluate": evaluate, "progress": False, "tensorboard": False, **changes}
    return matta.fit(cotrain, data, optimizer, steps=steps, accumulate=accumulate, **settings)


def check_fit(rank: int, folder: str) -> None:
    """A run by block, stopped, and resumed by a pair that is sharded as a whole."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(NUM_PROCESSES)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "ACCELERATE_USE_CPU": "1"}
    fit(matta.shard(make()), 3, run=f"{folder}/run")
    cotrain = matta.shard(make(), by="whole")
    result = fit(cotrain, 6, run=f"{folder}/run", resume=True)
    weights = whole(cotrain)
    torch.save({"weights": weights, "evaluation": result.evaluations[-1].values}, f"{folder}/fit-{rank}.pt")


class Normed(nn.Module):
    """Blocks that keep statistics of what they have seen."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(5, width), nn.BatchNorm1d(width), nn.Linear(width, 5))])
        self.head = nn.Linear(5, 1)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block(x)
        return self.head(x)


def normed() -> matta.CoTraining:
    torch.manual_seed(0)
    return matta.CoTraining(matta.nest(Normed(3), Normed(6)).double(), matta.objectives.Binary())


def held_out() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(3)
    data = [(torch.randn(n, 5, generator=generator), torch.rand(n, generator=generator).round()) for n in (8, 6, 3)]
    return [(x.double(), y) for x, y in data]


def judge(cotrain: matta.CoTraining) -> matta.Evaluation:
    models = {"wide": matta.wide(cotrain.nested), "narrow": matta.SubModel()}
    data: Any = DataLoader(held_out(), batch_size=None, shuffle=True)
    metrics = {"auroc": BinaryAUROC()}
    return matta.Evaluation(data=data, objective=matta.objectives.Binary(), metrics=metrics, models=models)


def judged(cotrain: matta.CoTraining, evaluate: Any) -> tuple[dict[str, float], int]:
    """What an evaluation gives in a run, and how many batches the TA's head sees for it in this process."""
    calls: list[None] = []
    hook = cotrain.nested.ta.head.register_forward_hook(lambda *_: calls.append(None))
    torch.manual_seed(7)
    values = RunEvaluation(cotrain, evaluate, None, None, None).judge(0)
    hook.remove()
    return values, len(calls)


def check_evaluation(rank: int, folder: str) -> None:
    """Shared among processes, each of which has seen other batches; before the pair's first forward, and after it."""
    found = {}
    for by in ("none", "block", "whole"):
        cotrain = normed()
        if by != "none":
            matta.shard(cotrain, by=by)
        norms = [part for part in cotrain.modules() if isinstance(part, nn.BatchNorm1d)]
        for part in norms:
            part.running_mean += rank
        evaluate = judge(cotrain)
        found[by] = judged(cotrain, evaluate), judged(cotrain, lambda nested, evaluate=evaluate: evaluate(nested))
        cotrain.eval()(held_out()[0])
        assert judged(cotrain, evaluate) == found[by][0]
        assert all(bool((part.running_mean == rank).all()) for part in norms)
        assert by == "none" or all(hasattr(each, "full_tensor") for each in cotrain.nested.parameters())
        with pytest.raises(RunError if rank else ZeroDivisionError, match="division by zero"):
            judged(cotrain, lambda _: {"value": 1 / 0})
    torch.save(found, f"{folder}/evaluation-{rank}.pt")


def measure_memory(rank: int, folder: str) -> None:
    """What a process keeps of weights, gradients and optimizer state."""
    found = {}
    for by in ("whole", "block"):
        for kind in ("adamw", "shampoo"):
            cotrain = matta.shard(make(dtype=torch.float32), by=by)
            optimizer = adamw(cotrain) if kind == "adamw" else matta.Shampoo(cotrain.nested)
            cotrain.train()(batch(0, rank, NUM_PROCESSES)).loss.backward()
            optimizer.step()
            parameters = list(cotrain.nested.parameters())
            kept = [[local(each) for each in parameters], [local(each.grad) for each in parameters]]
            figures = [sum(4 * each.numel() for each in tensors) for tensors in kept]
            found[by, kind] = [*figures, held_by(optimizer)]
    torch.save(found, f"{folder}/memory-{rank}.pt")


def held_by(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of its state without the counters of steps; of Shampoo with the two working copies."""
    if isinstance(optimizer, matta.Shampoo):
        stacks = [stack for part in optimizer._parts.values() for stack in part.stacks]
        counters = sum(len(part.kept) for part in optimizer._parts.values()) + len(optimizer.state)
        return optimizer.state_bytes() - 4 * counters + sum(8 * stack.gradient.numel() for stack in stacks)
    states = list(optimizer.state.values())
    return sum(4 * local(value).numel() for state in states for name, value in state.items() if name != "step")


LEAVES = (nn.Linear, nn.LayerNorm, nn.Embedding)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes have left."""
    path = tmp_path_factory.mktemp("sharded")
    torch.multiprocessing.spawn(work, (str(path),), nprocs=NUM_PROCESSES)
    return path


@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_by_block_equal_one(kind: str, folder: Path) -> None:
    cotrain = make(kind)
    train(cotrain, adamw(cotrain))
    for rank in range(NUM_PROCESSES):
        torch.testing.assert_close(torch.load(folder / f"{kind}-{rank}.pt"), whole(cotrain), **TOLERANCE)


@pytest.mark.parametrize("by", ["whole", "block"])
def test_gradients_in_float32(by: str, folder: Path) -> None:
    cotrain = make(dtype=torch.float32).train()
    cotrain(batch(0)).loss.backward()
    for rank in range(NUM_PROCESSES):
        found = torch.load(folder / f"gradients-{by}-{rank}.pt")
        torch.testing.assert_close(found, whole(cotrain, lambda p: p.grad), rtol=0, atol=1e-6)


def test_bfloat16_with_float32_weights(folder: Path) -> None:
    cotrain = make(dtype=torch.float32).train()
    cotrain(batch(0)).loss.backward()
    found = torch.load(folder / "mixed-0.pt")
    torch.testing.assert_close(found, whole(cotrain, lambda p: p.grad), rtol=0.1, atol=0.02)


def test_extracted_and_saved_models_are_plain_and_exact(folder: Path) -> None:
    nested = make().nested
    saved = matta.load(folder / "saved", nested)
    for name, spec in (("student", None), ("k1", matta.wide_narrow_wide(nested, 1))):
        expected = matta.extract(saved, spec).state_dict()
        for rank in range(NUM_PROCESSES):
            found = torch.load(folder / f"{name}-{rank}.pt")
            torch.testing.assert_close(found, dict(expected), rtol=0, atol=0)


def test_fit_by_block_resumed_as_a_whole_equals_one_process(folder: Path) -> None:
    cotrain = make()
    result = fit(cotrain, 6, accumulate=NUM_PROCESSES)
    for rank in range(NUM_PROCESSES):
        found = torch.load(folder / f"fit-{rank}.pt")
        torch.testing.assert_close(found["weights"], whole(cotrain), **TOLERANCE)
        assert found["evaluation"] == pytest.approx(result.evaluations[-1].values, rel=1e-9)
    saved = matta.load(folder / "run" / "nested", make().nested)
    expected = dict(cotrain.nested.ta.named_parameters())
    torch.testing.assert_close(dict(saved.ta.named_parameters()), expected, **TOLERANCE)


@pytest.mark.parametrize("by", ["none", "block", "whole"])
def test_an_evaluation_shared_by_two_processes_is_that_of_one(by: str, folder: Path) -> None:
    cotrain = normed()
    expected, num_calls = judged(cotrain, judge(cotrain))
    assert len(expected) == 8
    assert num_calls == 3 * 3  # the sub-models have copies of the head
    for rank in range(NUM_PROCESSES):
        (shared, share), (alone, all_or_none) = torch.load(folder / f"evaluation-{rank}.pt")[by]
        assert shared == alone == expected
        assert (share, all_or_none) == (2 * 3, 0 if rank else 3 * 3)


@pytest.mark.parametrize("optimizer", ["adamw", "shampoo"])
@pytest.mark.parametrize("by", ["whole", "block"])
def test_planned_memory_is_what_a_process_keeps(by: Any, optimizer: Any, folder: Path) -> None:
    from matta.lm.costs import StepMemory
    from matta.lm.gpu_memory import memory_of
    from matta.lm.recipe import TrainPart

    part = TrainPart(steps=1, batch=4, learning_rate=0.01, optimizer=optimizer)
    nothing = StepMemory(weights=0, gradients=0, optimizer=0, activations=0, heads=0)
    nested = make(dtype=torch.float32).nested
    plan = memory_of(nested, part, nothing, sharding=by, num_gpus=NUM_PROCESSES)
    measured = [torch.load(folder / f"memory-{rank}.pt")[by, optimizer] for rank in range(NUM_PROCESSES)]
    weights, gradients, state = (max(each) for each in zip(*measured, strict=True))
    assert (weights, gradients) == (plan.weights, plan.gradients)
    assert state == pytest.approx(plan.optimizer, rel=0.02)


def test_what_cannot_be_sharded_by_block() -> None:
    nested = matta.nest(nn.Linear(4, 1), nn.Linear(4, 1))
    with pytest.raises(RunError, match="without a module list"):
        matta.shard(matta.CoTraining(nested, matta.objectives.Binary()))
    with pytest.raises(RunError, match="by='layer'"):
        matta.shard(make(), by="layer")
