"""Tiny modules of many architectures, written as users write theirs: nothing in here knows of matta."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.parametrizations import weight_norm

LENGTH, VOCABULARY, CLASSES = 5, 11, 4

# ------------------------------------------------------------------------ rankers


class Perceptron(nn.Module):
    """Hidden layers in a ModuleList and one logit; `hidden` gives their widths."""

    def __init__(self, hidden: Sequence[int]) -> None:
        super().__init__()
        sizes = [LENGTH, *hidden]
        self.hidden = nn.ModuleList(nn.Linear(i, o) for i, o in pairwise(sizes))
        self.logit = nn.Linear(sizes[-1], 1)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.hidden:
            x = layer(x).tanh()
        return self.logit(x).squeeze(-1)


class ResidualPerceptron(nn.Module):
    """Blocks of inner width `width` around a stream of width `dim`."""

    def __init__(self, dim: int, width: int, depth: int) -> None:
        super().__init__()
        self.stem = nn.Linear(LENGTH, dim)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, width), nn.GELU(), nn.Linear(width, dim))
            for _ in range(depth)
        )
        self.head = nn.Linear(dim, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = x + block(x)
        return self.head(x)


class Ranker(nn.Module):
    """DLRM: embeddings and dense features, their pairwise dot products, and an MLP over the concatenation.

    With `interact` false, the vectors themselves are concatenated.
    """

    def __init__(self, dim: int, width: int, *, interact: bool) -> None:
        super().__init__()
        self.embeddings = nn.ModuleList(nn.Embedding(VOCABULARY, dim) for _ in range(3))
        self.dense = nn.Sequential(nn.Linear(LENGTH, width), nn.ReLU(), nn.Linear(width, dim))
        self.interact = interact
        self.top = nn.Sequential(nn.Linear(dim + 6 if interact else 4 * dim, width), nn.ReLU())
        self.logit = nn.Linear(width, 1)

    def forward(self, dense: Tensor, ids: Tensor) -> Tensor:
        bottom = self.dense(dense)
        x = torch.stack([bottom, *(e(ids[:, i]) for i, e in enumerate(self.embeddings))], dim=1)
        if self.interact:
            upper = torch.triu_indices(4, 4, offset=1)
            dots = (x @ x.transpose(1, 2))[:, upper[0], upper[1]]
            joined = torch.cat([bottom, dots], dim=-1)
        else:
            joined = x.flatten(1)
        return self.logit(self.top(joined)).squeeze(-1)


class DeepAndCross(nn.Module):
    """DCN-v2: cross layers x0 * (W x + b) + x beside a deep part, joined before the logit."""

    def __init__(self, dim: int, width: int, depth: int) -> None:
        super().__init__()
        self.embeddings = nn.ModuleList(nn.Embedding(VOCABULARY, dim) for _ in range(3))
        joined = 3 * dim + LENGTH
        self.cross = nn.ModuleList(nn.Linear(joined, joined) for _ in range(depth))
        self.deep = nn.Sequential(nn.Linear(joined, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU())
        self.logit = nn.Linear(width + joined, 1)

    def forward(self, dense: Tensor, ids: Tensor) -> Tensor:
        start = torch.cat([*(e(ids[:, i]) for i, e in enumerate(self.embeddings)), dense], dim=-1)
        x = start
        for layer in self.cross:
            x = start * layer(x) + x
        return self.logit(torch.cat([self.deep(start), x], dim=-1)).squeeze(-1)


# ------------------------------------------------------------------------ attention


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Softmax attention of (batch, heads, length, head_dim), heads merged."""
    scores = (q @ k.transpose(-1, -2)) * q.shape[-1] ** -0.5
    return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)


class Attention(nn.Module):
    """Attention with q, k and v apart, or fused in the order (3, heads, hd) or (heads, 3, hd)."""

    def __init__(self, dim: int, heads: int, head_dim: int, order: str) -> None:
        super().__init__()
        self.heads, self.head_dim, self.order = heads, head_dim, order
        inner = heads * head_dim
        if order == "apart":
            self.q, self.k, self.v = (nn.Linear(dim, inner) for _ in range(3))
        else:
            self.qkv = nn.Linear(dim, 3 * inner)
        self.out = nn.Linear(inner, dim)

    def forward(self, x: Tensor) -> Tensor:
        if self.order == "apart":
            parts = [p(x).unflatten(-1, (self.heads, -1)) for p in (self.q, self.k, self.v)]
        elif self.order == "3 heads hd":
            parts = list(self.qkv(x).unflatten(-1, (3, self.heads, -1)).unbind(-3))
        else:
            parts = list(self.qkv(x).unflatten(-1, (self.heads, 3, -1)).unbind(-2))
        return self.out(attend(*(p.transpose(1, 2) for p in parts)))


class Block(nn.Module):
    """A pre-norm Transformer block."""

    def __init__(self, dim: int, heads: int, head_dim: int, width: int, order: str) -> None:
        super().__init__()
        self.attention_norm, self.mlp_norm = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attention = Attention(dim, heads, head_dim, order)
        self.mlp = nn.Sequential(nn.Linear(dim, width), nn.GELU(), nn.Linear(width, dim))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x))
        return x + self.mlp(self.mlp_norm(x))


class Transformer(nn.Module):
    """An encoder of tokens with learned positions and a head over the mean."""

    def __init__(
        self,
        dim: int = 6,
        heads: int = 2,
        head_dim: int = 3,
        width: int = 8,
        depth: int = 2,
        order: str = "apart",
    ) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, dim)
        self.positions = nn.Parameter(torch.randn(LENGTH, dim))
        self.blocks = nn.ModuleList(Block(dim, heads, head_dim, width, order) for _ in range(depth))
        self.norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, CLASSES)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids) + self.positions
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x).mean(1))


class VisionTransformer(nn.Module):
    """A patch convolution, a class token and blocks with fused QKV."""

    def __init__(self, dim: int, heads: int, width: int, depth: int) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, dim, 4, stride=4)
        self.class_token = nn.Parameter(torch.randn(1, 1, dim))
        self.positions = nn.Parameter(torch.randn(1, 5, dim))
        self.blocks = nn.ModuleList(Block(dim, heads, 2, width, "3 heads hd") for _ in range(depth))
        self.norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.class_token.expand(len(x), -1, -1), x], dim=1) + self.positions
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x[:, 0]))


class SwiGlu(nn.Module):
    """down(silu(gate(x)) * up(x)), with gate and up apart or as the halves of one projection."""

    def __init__(self, dim: int, width: int, *, fused: bool) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(dim)
        self.fused = fused
        if fused:
            self.gate_up = nn.Linear(dim, 2 * width, bias=False)
        else:
            self.gate, self.up = (nn.Linear(dim, width, bias=False) for _ in range(2))
        self.down = nn.Linear(width, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        gate, up = self.gate_up(h).chunk(2, -1) if self.fused else (self.gate(h), self.up(h))
        return x + self.down(functional.silu(gate) * up)


class GatedAttentionUnit(nn.Module):
    """The unit of Hua et al. 2022, "Transformer Quality in Linear Time", figure 1 and appendix.

    One projection gives u and v of width `expanded` and a shared representation z of width `shared`;
    query and key are scales and offsets (two heads of gamma and beta) of z; attention is the square
    of relu; the output is u * (A v), projected back.
    """

    def __init__(self, dim: int, expanded: int, shared: int) -> None:
        super().__init__()
        self.sizes = [expanded, expanded, shared]
        self.norm = nn.LayerNorm(dim)
        self.uvz = nn.Linear(dim, sum(self.sizes))
        self.gamma = nn.Parameter(torch.randn(2, shared))
        self.beta = nn.Parameter(torch.randn(2, shared))
        self.relative = nn.Parameter(torch.randn(2 * LENGTH - 1))
        self.out = nn.Linear(expanded, dim)

    def forward(self, x: Tensor) -> Tensor:
        u, v, z = functional.silu(self.uvz(self.norm(x))).split(self.sizes, -1)
        q, k = (torch.einsum("bnr,hr->bnhr", z, self.gamma) + self.beta).unbind(-2)
        steps = torch.arange(LENGTH)
        bias = self.relative[steps[:, None] - steps[None, :] + LENGTH - 1]
        kernel = functional.relu(torch.einsum("bns,bms->bnm", q, k) / LENGTH + bias).square()
        return x + self.out(u * torch.einsum("bnm,bme->bne", kernel, v))


class Experts(nn.Module):
    """A router and experts: the two best experts of each token, weighted by its softmax over all."""

    def __init__(self, dim: int, width: int, num_experts: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.router = nn.Linear(dim, num_experts)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(dim, width), nn.SiLU(), nn.Linear(width, dim)) for _ in range(num_experts)
        )

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        weights = self.router(h).softmax(-1)
        kept = torch.zeros_like(weights).scatter(-1, weights.topk(2).indices, 1.0)
        outputs = torch.stack([expert(h) for expert in self.experts], dim=-1)
        return x + (outputs * (weights * kept).unsqueeze(-2)).sum(-1)


class LanguageModel(nn.Module):
    """Blocks of any kind between an embedding and a head that is tied to it."""

    def __init__(self, dim: int, blocks: Sequence[nn.Module]) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, dim)
        self.blocks = nn.ModuleList(blocks)
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, VOCABULARY, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


# ------------------------------------------------------------------------ convolutions, recurrence


class ResidualConvolutions(nn.Module):
    """Two convolutions with BatchNorm around an inner width, added to the input."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(channels, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(channels),
        )

    def forward(self, x: Tensor) -> Tensor:
        return functional.relu(x + self.body(x))


class ConvolutionalNetwork(nn.Module):
    """A stem, residual blocks and a head over the mean or, with `flatten`, over every position."""

    def __init__(self, channels: int, width: int, depth: int, *, flatten: bool = False) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, channels, 3, stride=2), nn.BatchNorm2d(channels), nn.ReLU())
        self.blocks = nn.ModuleList(ResidualConvolutions(channels, width) for _ in range(depth))
        self.flatten = flatten
        self.head = nn.Linear(9 * channels if flatten else channels, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x.permute(0, 2, 3, 1).flatten(1) if self.flatten else x.mean((2, 3)))


class InvertedResiduals(nn.Module):
    """MobileNet's blocks: expand, convolve each channel by itself, project back; with GroupNorm."""

    def __init__(self, channels: int, width: int, depth: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, channels, 3, stride=2)
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(channels, width, 1),
                nn.Conv2d(width, width, 3, padding=1, groups=width),
                nn.ReLU6(),
                nn.Conv2d(width, channels, 1),
                nn.GroupNorm(2, channels),
            )
            for _ in range(depth)
        )
        self.head = nn.Linear(channels, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = x + block(x)
        return self.head(x.mean((2, 3)))


class Recurrent(nn.Module):
    """An embedding, an nn.LSTM or nn.GRU and a head over the last outputs."""

    def __init__(self, kind: type[nn.RNNBase], dim: int, width: int, depth: int = 1, *, both: bool = False) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, dim)
        self.rnn = kind(dim, width, num_layers=depth, batch_first=True, bidirectional=both)
        self.head = nn.Linear((1 + both) * width, CLASSES)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.rnn(self.embedding(ids))[0][:, -1])


class TorchEncoder(nn.Module):
    """nn.TransformerEncoder, whose layers hold nn.MultiheadAttention."""

    def __init__(self, dim: int, heads: int, width: int, depth: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, dim)
        layer = nn.TransformerEncoderLayer(dim, heads, width, dropout=0.0, batch_first=True, norm_first=False)
        self.encoder = nn.TransformerEncoder(layer, depth, enable_nested_tensor=False)
        self.head = nn.Linear(dim, CLASSES)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.encoder(self.embedding(ids)).mean(1))


# ------------------------------------------------------------------------ classes that nobody has heard of


class Oddity(nn.Module):
    """Raw parameters in einsums, a ParameterList, weight normalisation and tied embeddings."""

    def __init__(self, dim: int, width: int) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(VOCABULARY, dim))
        self.mix = nn.Parameter(torch.randn(2, dim, width))
        self.back = nn.Parameter(torch.randn(width, 2, dim) / width)
        self.gains = nn.ParameterList([torch.randn(dim), torch.randn(width)])
        self.normed = weight_norm(nn.Linear(dim, dim))
        self.read_out = nn.Linear(dim, VOCABULARY)
        self.read_out.weight = self.table
        self.temperature = nn.Parameter(torch.tensor(1.5))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table[ids] * self.gains[0]
        h = torch.einsum("bnd,kdw->bnkw", x, self.mix).sin() * self.gains[1]
        x = x + torch.einsum("bnkw,wkd->bnd", h, self.back)
        return self.read_out(self.normed(x)) / self.temperature


class Looped(nn.Module):
    """One block that runs several times, as in ALBERT; it stands in the list under several names."""

    def __init__(self, dim: int, width: int, num_times: int) -> None:
        super().__init__()
        self.stem = nn.Linear(LENGTH, dim)
        block = nn.Sequential(nn.Linear(dim, width), nn.Tanh(), nn.Linear(width, dim))
        self.blocks = nn.ModuleList([block] * num_times)
        self.logit = nn.Linear(dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = x + block(x)
        return self.logit(x).squeeze(-1)


class EarlyExit(nn.Module):
    """A language model whose Student leaves early, by a norm and a head that only it has."""

    def __init__(self, dim: int, width: int, depth: int, *, exits: bool) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, dim)
        self.blocks = nn.ModuleList(SwiGlu(dim, width, fused=False) for _ in range(depth))
        name = "exit" if exits else "final"
        self.add_module(f"{name}_norm", nn.LayerNorm(dim))
        self.head = nn.Linear(dim, VOCABULARY)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        for block in self.blocks:
            x = block(x)
        norm = self.exit_norm if hasattr(self, "exit_norm") else self.final_norm
        return self.head(norm(x))
