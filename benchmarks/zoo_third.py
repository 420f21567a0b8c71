"""Models of a third search outside of the zoo: one head beside several, sines, sparse graphs, Fourier transforms."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from zoo_cases import Model
from zoo_handwritten import CLASSES, FEATURES, LENGTH, VOCABULARY

_NODES = 6


def _random(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def _whole(limit: int, *shape: int) -> Tensor:
    return torch.randint(0, limit, shape, generator=torch.Generator().manual_seed(0))


def _ids() -> Any:
    return _whole(VOCABULARY, 2, LENGTH), None


def _images() -> Any:
    return _random(2, 3, 8, 8), None


class MaskedBlocks(nn.Module):
    """A decoder with its mask in a buffer, of which a forward without targets reads the last place alone."""

    def __init__(self, dim: int, heads: int, *, length: int = 16) -> None:
        super().__init__()
        self.heads, self.tokens, self.places = heads, nn.Embedding(VOCABULARY, dim), nn.Embedding(length, dim)
        self.norm, self.qkv, self.out = nn.LayerNorm(dim), nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.head = nn.Linear(dim, VOCABULARY, bias=False)
        self.head.weight = self.tokens.weight
        self.register_buffer("mask", torch.ones(length, length).tril().view(1, 1, length, length))

    def forward(self, ids: Tensor, targets: Tensor | None = None) -> Tensor:
        size, length = ids.shape
        x = self.tokens(ids) + self.places(torch.arange(length))
        parts = self.qkv(self.norm(x)).split(x.shape[-1], -1)
        q, k, v = (part.view(size, length, self.heads, -1).transpose(1, 2) for part in parts)
        scores = q @ k.mT * (1 / math.sqrt(k.shape[-1]))
        scores = scores.masked_fill(self.mask[:, :, :length, :length] == 0, -torch.inf)
        x = x + self.out((scores.softmax(-1) @ v).transpose(1, 2).reshape(size, length, -1))
        return self.head(x if targets is not None else x[:, [-1]])


class BiasesApart(nn.Module):
    """Attention from one matrix, whose biases are vectors of their own, and that of the keys a buffer."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads, self.enter, self.qkv = heads, nn.Linear(FEATURES, dim), nn.Linear(dim, 3 * dim, bias=False)
        self.q_bias, self.v_bias = nn.Parameter(torch.zeros(dim)), nn.Parameter(torch.zeros(dim))
        self.register_buffer("k_bias", torch.zeros(dim))
        self.out, self.head = nn.Linear(dim, dim), nn.Linear(dim, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        bias = torch.cat([self.q_bias, self.k_bias, self.v_bias])
        q, k, v = F.linear(x, self.qkv.weight, bias).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        made = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return self.head((x + self.out(made)).mean(1))


class DenoisingUNet(nn.Module):
    """A step of diffusion: the time as sines and cosines, whose number goes with the channels, and one skip."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels, self.time = channels, nn.Sequential(nn.Linear(channels, 24), nn.SiLU(), nn.Linear(24, channels))
        self.enter, self.down = nn.Conv2d(3, channels, 3, padding=1), nn.Conv2d(channels, channels, 3, 2, 1)
        self.norm, self.up = nn.GroupNorm(1, channels), nn.ConvTranspose2d(channels, channels, 2, 2)
        self.leave = nn.Conv2d(2 * channels, 3, 3, padding=1)

    def forward(self, image: Tensor, time: Tensor) -> Tensor:
        half = self.channels // 2
        angles = time[:, None].float() * torch.exp(-math.log(1e4) * torch.arange(half) / half)
        told = self.time(torch.cat([angles.cos(), angles.sin()], -1))[:, :, None, None]
        x = self.enter(image)
        made = self.up(F.silu(self.norm(self.down(x) + told)))
        return self.leave(torch.cat([x, made], 1))


class StandardisedConv(nn.Conv2d):
    """Its weights have mean 0 and variance 1 over what each output reads."""

    def forward(self, x: Tensor) -> Tensor:
        rows = self.weight.reshape(1, self.out_channels, -1)
        weight = F.batch_norm(rows, None, None, training=True, momentum=0.0).reshape_as(self.weight)
        return F.conv2d(x, weight, self.bias, self.stride, self.padding)


class NormFree(nn.Module):
    """Convolutions with standardised weights in place of norms."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.enter = StandardisedConv(3, channels, 3, padding=1)
        self.middle = StandardisedConv(channels, 2 * channels, 3, 2, 1)
        self.head = nn.Linear(2 * channels, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.middle(self.enter(x).relu()).relu().mean((2, 3)))


class RotaryTables(nn.Module):
    """Rotary tables as a tuple among the attributes, real and imaginary parts apart."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads, self.tokens = heads, nn.Embedding(VOCABULARY, dim)
        self.q, self.k, self.v, self.out = (nn.Linear(dim, dim, bias=False) for _ in range(4))
        self.head = nn.Linear(dim, VOCABULARY, bias=False)
        speeds = 1e4 ** (-torch.arange(0, dim // heads, 2) / (dim // heads))
        angles = torch.outer(torch.arange(16), speeds)
        self.tables = angles.cos(), angles.sin()

    def _turned(self, x: Tensor) -> Tensor:
        real, imaginary = x.unflatten(-1, (-1, 2)).unbind(-1)
        cos, sin = (table[: x.shape[1], None] for table in self.tables)
        return torch.stack([real * cos - imaginary * sin, real * sin + imaginary * cos], -1).flatten(-2)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids)
        q, k, v = (layer(x).unflatten(-1, (self.heads, -1)) for layer in (self.q, self.k, self.v))
        parts = (part.transpose(1, 2) for part in (self._turned(q), self._turned(k), v))
        made = F.scaled_dot_product_attention(*parts, is_causal=True)
        return self.head(x + self.out(made.transpose(1, 2).flatten(2)))


class LongConvolution(nn.Module):
    """Gates about a convolution as long as the sequence, by Fourier transforms, whose filter a small network makes."""

    def __init__(self, dim: int, width: int) -> None:
        super().__init__()
        self.tokens, self.enter = nn.Embedding(VOCABULARY, dim), nn.Linear(dim, 3 * dim)
        self.filter = nn.Sequential(nn.Linear(2, width), nn.GELU(), nn.Linear(width, dim))
        self.skip, self.head = nn.Parameter(torch.ones(dim)), nn.Linear(dim, VOCABULARY)

    def forward(self, ids: Tensor) -> Tensor:
        before, behind, value = self.enter(self.tokens(ids)).mT.chunk(3, 1)
        length = ids.shape[1]
        time = torch.linspace(0, 1, length)[:, None]
        spectrum = torch.fft.rfft(self.filter(torch.cat([time, (6 * time).sin()], -1)).mT, n=2 * length)
        value = value * before
        made = torch.fft.irfft(torch.fft.rfft(value, n=2 * length) * spectrum, n=2 * length)[..., :length]
        return self.head(((made + value * self.skip[:, None]) * behind).mT)


class SparseGraph(nn.Module):
    """Users and items whose embeddings go over a sparse graph before they meet."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.users, self.items, self.layer = nn.Embedding(_NODES, dim), nn.Embedding(_NODES, dim), nn.Linear(dim, dim)
        edges = torch.rand(2 * _NODES, 2 * _NODES, generator=torch.Generator().manual_seed(0))
        self.register_buffer("edges", (edges / edges.sum(1)).to_sparse_coo())

    def forward(self, user: Tensor, item: Tensor) -> Tensor:
        nodes = torch.cat([self.users.weight, self.items.weight])
        near = torch.sparse.mm(self.edges, nodes)
        nodes = nodes + near + self.layer(torch.sparse.mm(self.edges, near)).relu()
        users, items = nodes.split(_NODES)
        return (users[user] * items[item]).sum(-1)


class InterestsOfKnown(nn.Module):
    """Histories of several lengths: those that have one are picked by a mask, packed, and put back."""

    def __init__(self, dim: int, width: int) -> None:
        super().__init__()
        self.items, self.reads = nn.Embedding(VOCABULARY, dim), nn.GRU(dim, dim, batch_first=True)
        self.head = nn.Sequential(nn.Linear(2 * dim, width), nn.ReLU(), nn.Linear(width, 1))

    def forward(self, history: Tensor, item: Tensor, length: Tensor) -> Tensor:
        known, embedded = length > 0, self.items(history)
        picked = embedded.masked_select(known[:, None, None]).view(-1, *embedded.shape[1:])
        packed = pack_padded_sequence(picked, length[known], batch_first=True, enforce_sorted=False)
        found = pad_packed_sequence(self.reads(packed)[0], batch_first=True, total_length=history.shape[1])[0]
        interest = torch.zeros_like(embedded).index_copy(0, known.nonzero()[:, 0], found).mean(1)
        return self.head(torch.cat([interest, self.items(item)], -1))


def _model(
    name: str, grows: str, make: Callable[..., nn.Module], student: Any, ta: Any, batch: Any, source: str
) -> Model:
    return Model(name=name, source=source, grows=grows, make=make, student=student, ta=ta, batch=batch)


_HAND, _RANKERS = "hand-written", "rankers"


def _histories() -> Any:
    history = _whole(VOCABULARY, 4, LENGTH)
    return {"history": history, "item": history[:, 0], "length": torch.tensor([LENGTH, 0, 2, 3])}


MODELS: tuple[Model, ...] = (
    _model(
        "Mask in a buffer",
        "hidden size, one head to two",
        MaskedBlocks,
        {"dim": 8, "heads": 1},
        {"dim": 32, "heads": 2},
        _ids,
        _HAND,
    ),
    _model(
        "Biases apart",
        "hidden size, heads kept",
        BiasesApart,
        {"dim": 8, "heads": 2},
        {"dim": 16},
        lambda: (_random(2, LENGTH, FEATURES), None),
        _HAND,
    ),
    _model(
        "Denoising U-Net",
        "channels, frequencies",
        DenoisingUNet,
        {"channels": 8},
        {"channels": 12},
        lambda: ((_images()[0], torch.tensor([3, 70])), None),
        _HAND,
    ),
    _model("Standardised weights", "channels", NormFree, {"channels": 4}, {"channels": 7}, _images, _HAND),
    _model(
        "Rotary tables kept", "hidden size, heads kept", RotaryTables, {"dim": 8, "heads": 2}, {"dim": 16}, _ids, _HAND
    ),
    _model(
        "Long convolution",
        "hidden size, filter",
        LongConvolution,
        {"dim": 6, "width": 4},
        {"dim": 10, "width": 7},
        _ids,
        _HAND,
    ),
    _model(
        "Sparse graph",
        "embedding",
        SparseGraph,
        {"dim": 4},
        {"dim": 7},
        lambda: ((_whole(_NODES, 3), _whole(_NODES, 3).flip(0)), None),
        _RANKERS,
    ),
    _model(
        "Packed interests",
        "embedding, width",
        InterestsOfKnown,
        {"dim": 4, "width": 6},
        {"dim": 7, "width": 9},
        _histories,
        _RANKERS,
    ),
)
"""The most telling models that the third search found."""
