"""Models written by hand, of kinds that people write and no library holds."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zoo_cases import Model

VOCABULARY, LENGTH, CLASSES, FEATURES = 16, 6, 3, 5


def _random(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def _ids() -> Any:
    return torch.randint(0, VOCABULARY, (2, LENGTH), generator=torch.Generator().manual_seed(0)), None


def _sequences() -> Any:
    return _random(2, LENGTH, FEATURES), None


def _vectors() -> Any:
    return _random(4, FEATURES), None


class StackedExperts(nn.Module):
    """Experts as stacked tensors with a fused gate, each token sent to one of them."""

    def __init__(self, width: int, num_experts: int = 3) -> None:
        super().__init__()
        self.router = nn.Linear(FEATURES, num_experts)
        self.up = nn.Parameter(torch.randn(num_experts, FEATURES, 2 * width))
        self.down = nn.Parameter(torch.randn(num_experts, width, CLASSES))

    def forward(self, x: Tensor) -> Tensor:
        weights = self.router(x).softmax(-1)
        gate, value = torch.einsum("bti,eio->bteo", x, self.up).chunk(2, -1)
        made = torch.einsum("bteo,eoc->btec", F.silu(gate) * value, self.down)
        return (made * weights[..., None]).sum(2).mean(1)


class RoutedExperts(nn.Module):
    """Experts as modules with a fused gate, of which the example reaches only some."""

    def __init__(self, width: int, num_experts: int = 8) -> None:
        super().__init__()
        self.router = nn.Linear(FEATURES, num_experts)
        self.ups = nn.ModuleList(nn.Linear(FEATURES, 2 * width) for _ in range(num_experts))
        self.downs = nn.ModuleList(nn.Linear(width, CLASSES) for _ in range(num_experts))

    def forward(self, x: Tensor) -> Tensor:
        made = x.new_zeros(len(x), CLASSES)
        chosen = self.router(x).argmax(-1)
        for i in chosen.unique().tolist():
            gate, value = self.ups[i](x[chosen == i]).chunk(2, -1)
            made[chosen == i] = self.downs[i](F.silu(gate) * value)
        return made


class GroupedAttention(nn.Module):
    """Grouped queries in one projection with keys and values, rotary positions in complex numbers."""

    def __init__(self, dim: int, heads: int, kv_heads: int, head_dim: int) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = heads, kv_heads, head_dim
        self.embedding = nn.Embedding(VOCABULARY, dim)
        self.qkv = nn.Linear(dim, (heads + 2 * kv_heads) * head_dim, bias=False)
        self.out, self.head = nn.Linear(heads * head_dim, dim), nn.Linear(dim, VOCABULARY)

    def _rotated(self, x: Tensor) -> Tensor:
        speed = 1 / 10000 ** (torch.arange(0, self.head_dim, 2, device=x.device) / self.head_dim)
        angle = torch.arange(x.shape[1], device=x.device)[:, None] * speed
        turned = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2).contiguous())
        turned = turned * torch.polar(torch.ones_like(angle), angle)[:, None]
        return torch.view_as_real(turned).flatten(-2).to(x.dtype)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        sizes = [self.heads * self.head_dim, self.kv_heads * self.head_dim, self.kv_heads * self.head_dim]
        q, k, v = (each.unflatten(-1, (-1, self.head_dim)) for each in self.qkv(x).split(sizes, -1))
        q, k, v = (each.transpose(1, 2) for each in (self._rotated(q), self._rotated(k), v))
        k, v = (each.repeat_interleave(self.heads // self.kv_heads, 1) for each in (k, v))
        made = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.head(x + self.out(made.transpose(1, 2).flatten(2)))


class MultiQuery(nn.Module):
    """Many query heads, one key and value; queries laid out with head_dim slowest; a scale from the width."""

    def __init__(self, dim: int, heads: int, head_dim: int) -> None:
        super().__init__()
        self.heads, self.head_dim = heads, head_dim
        self.enter, self.q = nn.Linear(FEATURES, dim), nn.Linear(dim, heads * head_dim)
        self.kv, self.out = nn.Linear(dim, 2 * head_dim), nn.Linear(heads * head_dim, dim)
        self.norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        q = self.q(x).unflatten(-1, (self.head_dim, self.heads))
        k, v = self.kv(x).chunk(2, -1)
        weights = (torch.einsum("bidh,bjd->bhij", q, k) / math.sqrt(self.head_dim)).softmax(-1)
        made = torch.einsum("bhij,bjd->bidh", weights, v).flatten(2)
        return self.head(self.norm(x + self.out(made)).mean(1))


class Windows(nn.Module):
    """Attention in windows of an image, with a table of relative positions, all in one fused projection."""

    def __init__(self, dim: int, heads: int, window: int = 2) -> None:
        super().__init__()
        self.heads, self.window = heads, window
        self.patch, self.qkv, self.out = nn.Conv2d(3, dim, 2, 2), nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.bias = nn.Parameter(torch.randn((2 * window - 1) ** 2, heads))
        places = torch.stack(torch.meshgrid(torch.arange(window), torch.arange(window), indexing="ij")).flatten(1)
        apart = places[:, :, None] - places[:, None, :] + window - 1
        self.register_buffer("index", apart[0] * (2 * window - 1) + apart[1])
        self.head = nn.Linear(dim, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x, w = self.patch(x), self.window
        b, c, h, _ = x.shape
        x = x.view(b, c, h // w, w, h // w, w).permute(0, 2, 4, 3, 5, 1).reshape(-1, w * w, c)
        q, k, v = self.qkv(x).view(len(x), w * w, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4)
        scores = q @ k.mT * (c // self.heads) ** -0.5 + self.bias[self.index].permute(2, 0, 1)
        made = (scores.softmax(-1) @ v).transpose(1, 2).reshape(len(x), w * w, c)
        return self.head((x + self.out(made)).view(b, -1, c).mean(1))


class StateSpace(nn.Module):
    """A diagonal state space with complex poles, scanned step by step."""

    def __init__(self, dim: int, state: int = 4) -> None:
        super().__init__()
        self.enter = nn.Linear(FEATURES, dim)
        self.poles = nn.Parameter(torch.randn(dim, state, dtype=torch.complex64) / 2)
        self.read = nn.Parameter(torch.randn(dim, state, dtype=torch.complex64))
        self.skip, self.head = nn.Parameter(torch.ones(dim)), nn.Linear(dim, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        state = x.new_zeros(len(x), *self.poles.shape).to(self.poles.dtype)
        turn, made = torch.exp(-self.poles.abs() + 1j * self.poles.imag), []
        for t in range(x.shape[1]):
            state = state * turn + x[:, t, :, None]
            made.append((state * self.read).sum(-1).real)
        return self.head((torch.stack(made, 1) + x * self.skip).mean(1))


class WeightNormed(nn.Module):
    """Convolutions with weight norm of the older and of the newer kind."""

    def __init__(self, channels: int, norm: str) -> None:
        super().__init__()
        wrap = nn.utils.weight_norm if norm == "old" else nn.utils.parametrizations.weight_norm
        self.body = nn.Sequential(
            wrap(nn.Conv1d(FEATURES, channels, 3, padding=1)),
            nn.ReLU(),
            wrap(nn.Conv1d(channels, channels, 3, padding=1)),
        )
        self.head = wrap(nn.Linear(channels, CLASSES))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x.mT).mean(2))


class Listed(nn.Module):
    """Weights in a ParameterList and a ParameterDict, used by hand."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weights = nn.ParameterList([torch.randn(FEATURES, width), torch.randn(width, width)])
        self.more = nn.ParameterDict({"shift": torch.randn(width), "out": torch.randn(CLASSES, width)})

    def forward(self, x: Tensor) -> Tensor:
        x = (x @ self.weights[0] + self.more["shift"]).relu()
        return F.linear((x @ self.weights[1]).tanh(), self.more["out"])


class Shared(nn.Module):
    """One block that runs three times, and a decoder tied to the embedding."""

    def __init__(self, dim: int, width: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, dim)
        block = nn.Sequential(nn.Linear(dim, width), nn.GELU(), nn.Linear(width, dim))
        self.blocks = nn.ModuleList([block, block, block])
        self.head = nn.Linear(dim, VOCABULARY, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        for block in self.blocks:
            x = x + block(x)
        return self.head(x)


class Adapted(nn.Module):
    """A linear layer with a low-rank adapter; the weight itself is frozen."""

    def __init__(self, inputs: int, outputs: int, rank: int) -> None:
        super().__init__()
        self.base = nn.Linear(inputs, outputs)
        self.base.weight.requires_grad_(False)
        self.down, self.up = nn.Linear(inputs, rank, bias=False), nn.Linear(rank, outputs, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + 2.0 * self.up(self.down(x))


def _adapted(width: int, rank: int) -> nn.Module:
    return nn.Sequential(Adapted(FEATURES, width, rank), nn.ReLU(), Adapted(width, CLASSES, rank))


def _peft(**sizes: Any) -> nn.Module:
    """GPT-2 wrapped by PEFT."""
    from peft import LoraConfig, get_peft_model
    from transformers import GPT2Config, GPT2LMHeadModel

    base = GPT2Config(vocab_size=VOCABULARY, n_positions=LENGTH, n_embd=8, n_layer=2, n_head=2, n_inner=sizes["width"])
    wrapped: nn.Module = get_peft_model(
        GPT2LMHeadModel(base), LoraConfig(r=sizes["rank"], target_modules=["c_attn", "c_fc"], fan_in_fan_out=True)
    )
    return wrapped


class Keeping(nn.Module):
    """A recurrence that keeps its last state, with its graph, among its attributes and in a list."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.enter, self.turn, self.head = (
            nn.Linear(FEATURES, width),
            nn.Linear(width, width),
            nn.Linear(width, CLASSES),
        )
        self.state: Tensor | None = None
        self.history: list[Any] = []

    def forward(self, x: Tensor) -> Tensor:
        self.state, self.history = x.new_zeros(len(x), self.turn.in_features), []
        for t in range(x.shape[1]):
            self.state = (self.enter(x[:, t]) + self.turn(self.state)).tanh()
            self.history.append({"state": self.state})
        return self.head(self.state)


class InPlainList(nn.Module):
    """Layers in a Python list, which torch does not see."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers: Any = [nn.Linear(FEATURES, width), nn.Linear(width, CLASSES)]
        self.scale = nn.Parameter(torch.ones(CLASSES))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers[1](self.layers[0](x).relu()) * self.scale


def _in_module_list(width: int) -> nn.Module:
    model = InPlainList(width)
    model.layers = nn.ModuleList(model.layers)
    return model


def _plain(width: int) -> nn.Module:
    return nn.Sequential(nn.Linear(FEATURES, width), nn.ReLU(), nn.Linear(width, CLASSES))


def _quantised(width: int) -> nn.Module:
    made: nn.Module = torch.ao.quantization.quantize_dynamic(_plain(width), {nn.Linear}, dtype=torch.qint8)
    return made


class Bilinear(nn.Module):
    """Two towers joined by a bilinear form, an outer product and a concatenation."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(FEATURES, width), nn.Linear(FEATURES, width)
        self.form, self.head = nn.Bilinear(width, width, 4), nn.Linear(4 + width * width + 2 * width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        one, two = self.one(x).relu(), self.two(x).tanh()
        outer = (one[:, :, None] * two[:, None, :]).flatten(1)
        return self.head(torch.cat([self.form(one, two), outer, one, two], -1))


class HyperNetwork(nn.Module):
    """One network makes the weights of another."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width, self.make, self.head = width, nn.Linear(FEATURES, FEATURES * width), nn.Linear(width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        weights = self.make(x).view(len(x), FEATURES, self.width)
        return self.head((x[:, None] @ weights)[:, 0].relu())


def _model(
    name: str, grows: str, make: Callable[..., nn.Module], student: Any, ta: Any, batch: Any, **more: Any
) -> Model:
    return Model(name=name, source="hand-written", grows=grows, make=make, student=student, ta=ta, batch=batch, **more)


MODELS: tuple[Model, ...] = (
    _model("Stacked experts", "expert width", StackedExperts, {"width": 4}, {"width": 7}, _sequences),
    _model("Routed experts", "expert width", RoutedExperts, {"width": 4}, {"width": 7}, _vectors),
    _model(
        "Grouped queries, rotary",
        "heads, head_dim, hidden size",
        GroupedAttention,
        {"dim": 8, "heads": 4, "kv_heads": 2, "head_dim": 4},
        {"dim": 12, "heads": 8, "kv_heads": 4, "head_dim": 8},
        _ids,
    ),
    _model(
        "Grouped queries, rotary",
        "groups",
        GroupedAttention,
        {"dim": 8, "heads": 4, "kv_heads": 2, "head_dim": 4},
        {"heads": 8},
        _ids,
    ),
    _model(
        "Multi-query, head_dim slowest",
        "heads, head_dim",
        MultiQuery,
        {"dim": 8, "heads": 2, "head_dim": 3},
        {"heads": 4, "head_dim": 5},
        _sequences,
    ),
    _model(
        "Windows",
        "hidden size, heads kept",
        Windows,
        {"dim": 8, "heads": 2},
        {"dim": 16},
        lambda: (_random(2, 3, 8, 8), None),
    ),
    _model(
        "Windows",
        "hidden size, heads",
        Windows,
        {"dim": 8, "heads": 2},
        {"dim": 16, "heads": 4},
        lambda: (_random(2, 3, 8, 8), None),
    ),
    _model("State space", "channels, states", StateSpace, {"dim": 4}, {"dim": 7, "state": 6}, _sequences),
    _model("Weight norm, older", "channels", WeightNormed, {"channels": 4, "norm": "old"}, {"channels": 7}, _sequences),
    _model("Weight norm, newer", "channels", WeightNormed, {"channels": 4, "norm": "new"}, {"channels": 7}, _sequences),
    _model("ParameterList, ParameterDict", "width", Listed, {"width": 4}, {"width": 7}, _vectors),
    _model("Shared block, tied head", "width", Shared, {"dim": 6, "width": 4}, {"width": 7}, _ids),
    _model("Shared block, tied head", "hidden size", Shared, {"dim": 6, "width": 4}, {"dim": 9, "width": 7}, _ids),
    _model("LoRA by hand", "width, rank", _adapted, {"width": 6, "rank": 2}, {"width": 9, "rank": 3}, _vectors),
    _model(
        "LoRA by PEFT",
        "width, rank",
        _peft,
        {"width": 6, "rank": 2},
        {"width": 9, "rank": 3},
        lambda: {"input_ids": _ids()[0]},
    ),
    _model("Keeps its state", "width", Keeping, {"width": 4}, {"width": 7}, _sequences),
    _model("Bilinear and outer product", "width", Bilinear, {"width": 3}, {"width": 5}, _vectors),
    _model("Hypernetwork", "width", HyperNetwork, {"width": 3}, {"width": 5}, _vectors),
    _model(
        "Layers in a plain list",
        "width",
        InPlainList,
        {"width": 4},
        {"width": 7},
        _vectors,
        mended=_in_module_list,
        advice="keep them in an `nn.ModuleList`",
    ),
    _model(
        "Quantised",
        "width",
        _quantised,
        {"width": 4},
        {"width": 7},
        _vectors,
        mended=_plain,
        advice="nest first, quantise what is extracted",
    ),
)
"""Every model that is written by hand in the zoo."""
