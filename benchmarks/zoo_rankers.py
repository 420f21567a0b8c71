"""Rankers written by hand in the zoo: crosses, attention over a history, experts for several tasks, bags."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from zoo_cases import Model
from zoo_handwritten import FEATURES, LENGTH, VOCABULARY

_FIELDS = 4


def _random(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def _ids(*shape: int) -> Tensor:
    return torch.randint(1, VOCABULARY, shape, generator=torch.Generator().manual_seed(0))


def _events() -> Any:
    return {"fields": _ids(6, _FIELDS), "numbers": _random(6, FEATURES), "labels": torch.zeros(6)}


def _bags() -> Any:
    starts = torch.arange(0, 8, 2)
    return (_random(4, FEATURES), [_ids(8) for _ in range(3)], [starts] * 3), None


def _history() -> Any:
    return {"history": _ids(4, LENGTH), "item": _ids(4), "mask": torch.ones(4, LENGTH, dtype=torch.bool)}


def _tower(*sizes: int) -> nn.Sequential:
    layers = [layer for one, two in pairwise(sizes) for layer in (nn.Linear(one, two), nn.ReLU())]
    return nn.Sequential(*layers[:-1])


class _Fields(nn.Module):
    """An embedding of each field."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.tables = nn.ModuleList(nn.Embedding(VOCABULARY, dim) for _ in range(_FIELDS))

    def forward(self, fields: Tensor) -> Tensor:
        return torch.stack([table(fields[:, i]) for i, table in enumerate(self.tables)], 1)


class BagsAndDots(nn.Module):
    """DLRM: bags of embeddings, and the products of each pair of them picked from a matrix by two indices."""

    def __init__(self, dim: int, width: int) -> None:
        super().__init__()
        self.bags = nn.ModuleList(nn.EmbeddingBag(VOCABULARY, dim, mode="sum") for _ in range(3))
        self.bottom, self.top = _tower(FEATURES, width, dim), _tower(dim + 6, width, 1)

    def forward(self, numbers: Tensor, ids: list[Tensor], starts: list[Tensor]) -> Tensor:
        x = self.bottom(numbers)
        bags = [bag(own, start) for bag, own, start in zip(self.bags, ids, starts, strict=True)]
        stacked = torch.cat([x, *bags], 1).view(len(x), -1, x.shape[1])
        pairs = torch.tril_indices(stacked.shape[1], stacked.shape[1], -1)
        return self.top(torch.cat([x, (stacked @ stacked.mT)[:, pairs[0], pairs[1]]], 1))


class LowRankCrosses(nn.Module):
    """DCN v2 with a mixture of low-rank crosses; takes keywords alone."""

    def __init__(self, dim: int, rank: int, width: int) -> None:
        super().__init__()
        size = _FIELDS * dim + FEATURES
        self.fields, self.deep = _Fields(dim), _tower(size, width, width)
        self.down = nn.Parameter(torch.randn(2, size, rank) * 0.3)
        self.core = nn.Parameter(torch.randn(2, rank, rank) * 0.3)
        self.up = nn.Parameter(torch.randn(2, size, rank) * 0.3)
        self.gates, self.head = nn.Linear(size, 2, bias=False), nn.Linear(size + width, 1)

    def forward(self, *, fields: Tensor, numbers: Tensor) -> Tensor:
        x = torch.cat([self.fields(fields).flatten(1), numbers], 1)
        inner = torch.einsum("ber,ers->bes", torch.einsum("bi,eir->ber", x, self.down).tanh(), self.core).tanh()
        crossed = x[:, None] * torch.einsum("ber,eir->bei", inner, self.up)
        mixed = (crossed * self.gates(x).softmax(-1)[..., None]).sum(1)
        return self.head(torch.cat([x + mixed, self.deep(x)], 1))


class CompressedInteractions(nn.Module):
    """xDeepFM: maps of outer products by a convolution along the embedding, whose bias is summed over its length."""

    def __init__(self, dim: int, maps: int) -> None:
        super().__init__()
        self.fields, self.first = _Fields(dim), nn.Conv1d(_FIELDS * _FIELDS, maps, 1)
        self.second, self.head = nn.Conv1d(_FIELDS * (maps // 2), maps, 1), nn.Linear(maps // 2 + maps, 1)

    def forward(self, fields: Tensor, numbers: Tensor) -> Tensor:
        x = self.fields(fields)
        kept, hidden = self.first((x[:, :, None] * x[:, None]).flatten(1, 2)).relu().chunk(2, 1)
        last = self.second((x[:, :, None] * hidden[:, None]).flatten(1, 2)).relu()
        return self.head(torch.cat([kept, last], 1).sum(2)) + numbers.mean(1, keepdim=True)


class InterestOverHistory(nn.Module):
    """DIN: the item's embedding beside each one of the history, their difference and product."""

    def __init__(self, dim: int, width: int) -> None:
        super().__init__()
        self.items, self.attention = nn.Embedding(VOCABULARY, dim), _tower(4 * dim, width, 1)
        self.head, self.alpha = nn.Linear(2 * dim, width), nn.Parameter(torch.zeros(width))
        self.norm, self.last = nn.BatchNorm1d(width, affine=False), nn.Linear(width, 1)

    def forward(self, history: Tensor, item: Tensor, mask: Tensor) -> Tensor:
        seen, own = self.items(history), self.items(item)
        beside = own[:, None].expand_as(seen)
        scores = self.attention(torch.cat([beside, seen, beside - seen, beside * seen], -1))[..., 0]
        weights = scores.masked_fill_(~mask, -1e9).softmax(-1)
        x = self.head(torch.cat([(weights[..., None] * seen).sum(1), own], -1))
        gate = self.norm(x).sigmoid()
        return self.last(gate * x + (1 - gate) * self.alpha * x)


class FieldAttention(nn.Module):
    """AutoInt: attention between fields, its heads cut off one by one and joined again."""

    def __init__(self, dim: int, heads: int, head_dim: int) -> None:
        super().__init__()
        self.fields, self.head_dim = _Fields(dim), head_dim
        self.q, self.k, self.v, self.own = (nn.Linear(dim, heads * head_dim, bias=False) for _ in range(4))
        self.head = nn.Linear(_FIELDS * heads * head_dim, 1)

    def forward(self, fields: Tensor, numbers: Tensor) -> Tensor:
        x = self.fields(fields)
        q, k, v = (torch.stack(each(x).split(self.head_dim, 2)) for each in (self.q, self.k, self.v))
        made = torch.einsum("hbij,hbjd->hbid", torch.einsum("hbid,hbjd->hbij", q, k).softmax(-1), v)
        return self.head((torch.cat(tuple(made), -1) + self.own(x)).relu().flatten(1)) + numbers.mean(1, keepdim=True)


class ExpertsOfTasks(nn.Module):
    """MMoE: experts that several tasks share, each with a gate and a tower; returns a logit for each task."""

    def __init__(self, dim: int, width: int) -> None:
        super().__init__()
        self.fields, size = _Fields(dim), _FIELDS * dim + FEATURES
        self.experts = nn.ModuleList(_tower(size, width, width) for _ in range(3))
        self.gates = nn.ModuleDict({task: nn.Linear(size, 3) for task in ("click", "buy")})
        self.towers = nn.ModuleDict({task: _tower(width, width, 1) for task in ("click", "buy")})

    def forward(self, fields: Tensor, numbers: Tensor) -> dict[str, Tensor]:
        x = torch.cat([self.fields(fields).flatten(1), numbers], 1)
        made = torch.stack([expert(x) for expert in self.experts], 1)
        mixed = {task: (gate(x).softmax(-1)[..., None] * made).sum(1) for task, gate in self.gates.items()}
        return {task: tower(mixed[task]) for task, tower in self.towers.items()}


def _model(name: str, grows: str, make: Callable[..., nn.Module], student: Any, ta: Any, batch: Any) -> Model:
    return Model(name=name, source="rankers", grows=grows, make=make, student=student, ta=ta, batch=batch)


_SMALL, _LARGE = {"dim": 3, "width": 6}, {"dim": 5, "width": 9}

MODELS: tuple[Model, ...] = (
    _model("DLRM", "embedding, width", BagsAndDots, _SMALL, _LARGE, _bags),
    _model("DCN v2", "embedding, rank, width", LowRankCrosses, {**_SMALL, "rank": 2}, {**_LARGE, "rank": 3}, _events),
    _model("xDeepFM", "embedding, maps", CompressedInteractions, {"dim": 3, "maps": 4}, {"dim": 5, "maps": 8}, _events),
    _model("xDeepFM", "maps", CompressedInteractions, {"dim": 3, "maps": 4}, {"maps": 8}, _events),
    _model("DIN", "embedding, width", InterestOverHistory, _SMALL, _LARGE, _history),
    _model(
        "AutoInt",
        "embedding, heads kept",
        FieldAttention,
        {"dim": 4, "heads": 2, "head_dim": 2},
        {"dim": 6, "head_dim": 4},
        _events,
    ),
    _model("MMoE", "embedding, width", ExpertsOfTasks, _SMALL, _LARGE, _events),
)
"""Every ranker of the zoo."""
