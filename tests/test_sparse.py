"""Embeddings with sparse gradients: nested, trained, resumed and extracted at the cost of the rows looked up."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import matta

ROWS = 12
IDS = torch.tensor([[3, 1], [3, 7], [0, 3]])
LABELS = torch.tensor([1.0, 0.0, 1.0])
TOUCHED = [0, 1, 3, 7]


class Ranker(nn.Module):
    """Ids, looked up one by one or as a bag, and a layer."""

    def __init__(
        self, width: int, *, rows: int = ROWS, bags: bool = False, sparse: bool = True, **options: Any
    ) -> None:
        super().__init__()
        self.table = (nn.EmbeddingBag if bags else nn.Embedding)(rows, width, sparse=sparse, **options)
        self.head = nn.Linear(width, 1)
        self.bags = bags

    def forward(self, ids: Tensor) -> Tensor:
        found = self.table(ids)
        return self.head(found if self.bags else found.mean(1))


KINDS: dict[str, dict[str, Any]] = {
    "embedding": {},
    "padding": {"padding_idx": 1},
    "sum": {"bags": True, "mode": "sum"},
    "mean": {"bags": True, "mode": "mean"},
}


def _nested(seed: int = 0, **options: Any) -> matta.Nested:
    torch.manual_seed(seed)
    return matta.nest(Ranker(4, **options), Ranker(6, **options))


def _gradients(nested: matta.Nested) -> list[Tensor]:
    nested.zero_grad()
    matta.CoTraining(nested, matta.objectives.Binary())((IDS, LABELS)).loss.backward()
    return [each.grad for each in nested.parameters()]  # type: ignore[misc]


@pytest.mark.parametrize("kind", KINDS)
def test_the_gradient_is_sparse_and_that_of_dense_tables(kind: str) -> None:
    sparse, dense = _gradients(_nested(**KINDS[kind])), _gradients(_nested(sparse=False, **KINDS[kind]))
    table = sparse[0].coalesce()
    assert set(table.indices()[0].tolist()) <= set(TOUCHED)
    torch.testing.assert_close([table.to_dense(), *sparse[1:]], dense)


def test_the_students_gradient_alone_is_that_of_its_columns_and_rows() -> None:
    torch.manual_seed(0)
    nested = matta.nest(Ranker(4, rows=8), Ranker(6))
    nested.student(IDS).sum().backward()
    gradient = nested.ta.table.weight.grad
    assert gradient is not None
    assert gradient.is_sparse
    assert gradient.shape == (ROWS, 6)
    torch.testing.assert_close(gradient.to_dense()[3, :4], nested.student.head.weight[0].detach() * 1.5)
    assert torch.count_nonzero(gradient.to_dense()[:, 4:]) == 0


def test_columns_of_several_parts_and_a_bag_of_fewer_rows() -> None:
    torch.manual_seed(0)
    layouts = {"table.weight": 2, "head.weight": matta.Layout.equal(2, axis=1)}
    found = []
    for sparse in (True, False):
        for bags in (False, True):
            torch.manual_seed(0)
            pair = [Ranker(width, rows=rows, bags=bags, sparse=sparse) for width, rows in ((4, 8), (6, ROWS))]
            columns = {"table.weight": matta.Layout.equal(2, axis=1), "head.weight": layouts["head.weight"]}
            nested = matta.nest(*pair, layouts=columns)
            nested.student(IDS).sum().backward()
            gradient = nested.ta.table.weight.grad
            assert gradient is not None
            found.append(gradient.to_dense())
    for other in found[1:]:
        torch.testing.assert_close(other, found[0])


@pytest.mark.parametrize("kind", KINDS)
def test_a_dense_use_of_the_same_table_adds_up(kind: str) -> None:
    def gradient(**options: Any) -> Tensor:
        nested = _nested(**KINDS[kind], **options)
        (nested.student(IDS).sum() + nested.student.table.weight.square().sum()).backward()
        found = nested.ta.table.weight.grad
        assert found is not None
        return found.to_dense()

    torch.testing.assert_close(gradient(), gradient(sparse=False))


OPTIMIZERS: dict[str, Callable[[matta.Nested], torch.optim.Optimizer]] = {
    "shampoo": lambda nested: matta.Shampoo(nested, lr=0.05),
    "shampoo-adagrad": lambda nested: matta.Shampoo(nested, lr=0.05, graft="adagrad"),
    "sgd": lambda nested: torch.optim.SGD(nested.parameters(), lr=0.1),
    "adagrad": lambda nested: torch.optim.Adagrad(nested.parameters(), lr=0.1),
}


@pytest.mark.parametrize("bags", [False, True])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_fit_moves_the_rows_looked_up_and_extracts_exactly(name: str, bags: bool, tmp_path: Path) -> None:
    nested = _nested(bags=bags)
    before = nested.ta.table.weight.detach().clone()
    cotrain = matta.CoTraining(nested, matta.objectives.Binary())
    matta.fit(cotrain, [(IDS, LABELS)] * 4, OPTIMIZERS[name](nested), steps=4, clip_norm=1.0, progress=False)
    moved = (nested.ta.table.weight.detach() != before).any(1)
    assert moved.nonzero().flatten().tolist() == TOUCHED
    extracted = matta.extract(nested).eval()
    assert extracted.table.sparse
    assert torch.equal(extracted(IDS), nested.student.eval()(IDS))
    matta.save(nested, tmp_path / "saved")
    again = matta.load(tmp_path / "saved", Ranker(4, bags=bags), Ranker(6, bags=bags))
    assert torch.equal(again.student.eval()(IDS), extracted(IDS))


def test_clipped_gradients_are_those_of_dense_tables() -> None:
    weights = []
    for sparse in (True, False):
        nested = _nested(sparse=sparse)
        cotrain = matta.CoTraining(nested, matta.objectives.Binary())
        optimizer = torch.optim.SGD(nested.parameters(), lr=1.0)
        matta.fit(cotrain, [(IDS, LABELS)] * 6, optimizer, steps=3, accumulate=2, clip_norm=0.05, progress=False)
        weights.append([each.detach() for each in nested.parameters()])
    torch.testing.assert_close(*weights)


def test_a_resumed_run_is_one_that_never_stopped(tmp_path: Path) -> None:
    def run(folder: Path, *, steps: int, **options: Any) -> list[Tensor]:
        nested = _nested(bags=True)
        cotrain = matta.CoTraining(nested, matta.objectives.Binary())
        data = [(IDS, LABELS), (IDS + 1, LABELS), (IDS[:2] + 3, LABELS[:2])] * 2
        matta.fit(cotrain, data, OPTIMIZERS["shampoo"](nested), steps=steps, run=folder, tensorboard=False, **options)
        return [each.detach() for each in nested.parameters()]

    whole = run(tmp_path / "whole", steps=6)
    run(tmp_path / "parts", steps=4)
    assert all(map(torch.equal, whole, run(tmp_path / "parts", steps=6, resume=True)))


def test_turns_and_sub_models_keep_the_gradient_sparse() -> None:
    nested = _nested()
    turns = matta.Turns(alone_steps=1)
    cotrain = matta.CoTraining(nested, matta.objectives.Binary(), turns=turns)
    for _ in range(2):
        nested.zero_grad()
        cotrain((IDS, LABELS)).loss.backward()
        assert nested.ta.table.weight.grad is not None
        assert nested.ta.table.weight.grad.is_sparse


def test_a_million_rows_are_never_copied() -> None:
    """In training and in evaluation: the memory that a step takes is that of the rows looked up."""
    from torch.utils._python_dispatch import TorchDispatchMode

    largest = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            made = func(*args, **(kwargs or {}))
            views = func.is_view or "detach" in str(func)
            found = [each for each in (made if isinstance(made, tuple) else (made,)) if isinstance(each, Tensor)]
            own = [each._values() if each.is_sparse else each for each in found]
            largest.extend([] if views else [each.numel() for each in own])
            return made

    for bags in (False, True):
        pair = [Ranker(width, rows=100_000, bags=bags, _weight=torch.zeros(100_000, width)) for width in (4, 6)]
        nested = matta.nest(*pair)
        cotrain = matta.CoTraining(nested, matta.objectives.Binary())
        with Watch():
            cotrain((IDS, LABELS)).loss.backward()
            matta.Evaluation(data=[(IDS, LABELS)], objective=matta.objectives.Binary())(nested)
    assert max(largest) < 100_000


class Remainders(nn.Module):
    """Rows of two small tables, by quotient and remainder, in a module that calls the lookups itself."""

    def __init__(self, width: int) -> None:
        super().__init__()
        torch.manual_seed(width)
        self.sparse = True
        self.quotients, self.remainders = (nn.Parameter(torch.randn(5, width)) for _ in range(2))

    def forward(self, ids: Tensor) -> Tensor:
        parts = ((ids // 5, self.quotients), (ids % 5, self.remainders))
        first, second = (nn.functional.embedding_bag(ids, table, mode="sum", sparse=True) for ids, table in parts)
        return first * second


def test_a_module_of_ones_own_that_looks_up_sparsely_gets_the_gradient_of_a_dense_one() -> None:
    ids, found = torch.tensor([[3], [7], [24]]), []
    for is_sparse in (True, False):
        pair = [nn.Sequential(Remainders(width), nn.Linear(width, 1)) for width in (2, 4)]
        nested = matta.nest(*pair, example=(ids, None))
        if not is_sparse:
            for each in (nested.student, nested.ta):
                each[0].forward = lambda ids, own=each[0]: own.quotients[ids[:, 0] // 5] * own.remainders[ids[:, 0] % 5]
        (nested.student(ids).sum() + nested.ta(ids).square().sum()).backward()
        table = nested.ta[0].quotients
        assert table.grad is not None and table.grad.is_sparse == is_sparse
        found.append(table.grad.to_dense())
        matta.Shampoo(nested).step()
    torch.testing.assert_close(*found)
