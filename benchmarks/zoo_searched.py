"""Models of a second search outside of the zoo: routers that grow, codes, norms over groups, functions of zero."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zoo_cases import Model
from zoo_handwritten import CLASSES, FEATURES, LENGTH, VOCABULARY
from zoo_transformers import LATENT, pixels, transformer

_SIZES = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 32,
    "pad_token_id": 2,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
_DECODER = {**_SIZES, "num_key_value_heads": 2, "head_dim": 4}
_HIDDEN = {"hidden_size": 32}


def _transformers() -> list[Model]:
    kept = "hidden size, heads kept"
    experts = {"moe_intermediate_size": 12, "num_experts": 4, "num_experts_per_tok": 2}
    deep = {
        **_SIZES,
        **experts,
        "num_key_value_heads": 4,
        "n_routed_experts": 4,
        **LATENT,
    }
    linear = {
        **_DECODER,
        **experts,
        "head_dim": 8,
        "layer_types": ["linear_attention", "full_attention"],
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 4,
        "linear_value_head_dim": 4,
        "linear_conv_kernel_dim": 2,
        "shared_expert_intermediate_size": 12,
    }
    wider = {"linear_key_head_dim": 8, "linear_value_head_dim": 8}
    landmarks = {**_SIZES, "num_landmarks": 2, "segment_means_seq_len": 6}
    images = {**{k: _SIZES[k] for k in list(_SIZES)[1:5]}, "image_size": 16, "patch_size": 4, "num_register_tokens": 2}
    positions = {"vocab_size": 32, "n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 32, "dff": 24}
    return [
        transformer("Mixtral", "experts", {**_DECODER, "num_local_experts": 4}, {"num_local_experts": 6}),
        transformer("Qwen3Moe", "experts", {**_DECODER, **experts}, {"num_experts": 6}),
        transformer("DeepseekV3", "experts, ranks", deep, {"n_routed_experts": 6, "q_lora_rank": 12}),
        transformer("Qwen3Next", "widths of linear heads", linear, wider),
        transformer("Nystromformer", kept, landmarks, _HIDDEN, kind="ForMaskedLM"),
        transformer("DINOv3ViT", kept, images, _HIDDEN, name="DINOv3ViTModel", batch=pixels()),
        transformer("CTRL", kept, positions, {"n_embd": 32}, kind="LMHeadModel"),
        transformer(
            "Falcon", "heads, one key", {**_SIZES, "multi_query": True}, {"hidden_size": 32, "num_attention_heads": 8}
        ),
    ]


def _random(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def _vectors() -> Any:
    return _random(4, FEATURES), None


def _sequences() -> Any:
    return _random(2, LENGTH, FEATURES), None


def _ids() -> Any:
    return torch.randint(0, VOCABULARY, (2, LENGTH), generator=torch.Generator().manual_seed(0)), None


class TopExperts(nn.Module):
    """A router that sends each token to the best two of the experts in a list."""

    def __init__(self, num_experts: int) -> None:
        super().__init__()
        self.router, self.head = nn.Linear(FEATURES, num_experts, bias=False), nn.Linear(FEATURES, CLASSES)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(FEATURES, 4), nn.GELU()) for _ in range(num_experts))
        self.out = nn.Linear(4, FEATURES)

    def forward(self, x: Tensor) -> Tensor:
        weights, chosen = self.router(x).softmax(-1).topk(2, -1)
        made = torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            token, slot = torch.where(chosen == i)
            made.index_add_(0, token, self.out(expert(x[token])) * weights[token, slot, None])
        return self.head(x + made)


class Codes(nn.Module):
    """A table of codes, of which the nearest stands for each place."""

    def __init__(self, num_codes: int) -> None:
        super().__init__()
        self.enter, self.codes = nn.Conv1d(FEATURES, 4, 3, padding=1), nn.Embedding(num_codes, 4)
        self.leave = nn.Conv1d(4, CLASSES, 1)

    def forward(self, x: Tensor) -> Tensor:
        found = self.enter(x.mT).mT
        apart = (self.codes.weight**2).sum(1) - 2 * found @ self.codes.weight.T
        code = self.codes(apart.argmin(-1))
        return self.leave((found + (code - found).detach()).mT)


class Retention(nn.Module):
    """Heads with a decay, and a norm over each head that has no weights."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads, self.embedding = heads, nn.Embedding(VOCABULARY, dim)
        self.q, self.k, self.v = (nn.Linear(dim, dim, bias=False) for _ in range(3))
        self.norm, self.head = nn.GroupNorm(heads, dim, affine=False), nn.Linear(dim, VOCABULARY)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        size, length, dim = x.shape
        q, k, v = (each(x).view(size, length, self.heads, -1).transpose(1, 2) for each in (self.q, self.k, self.v))
        ages = (torch.arange(length)[:, None] - torch.arange(length)).clamp(min=0)
        decay = torch.tril(0.9**ages)
        made = ((q @ k.mT) * decay @ v).transpose(1, 2).reshape(size * length, dim)
        return self.head(x + self.norm(made).view(size, length, dim))


class LinearAttention(nn.Module):
    """Attention through a map that makes ones of zeros, and through einsum."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads, self.enter, self.qkv = heads, nn.Linear(FEATURES, dim), nn.Linear(dim, 3 * dim)
        self.head = nn.Linear(dim, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        q, k = F.elu(q) + 1, F.elu(k) + 1
        scale = 1 / torch.einsum("bhtd,bhd->bht", q, k.sum(2))
        made = torch.einsum("bhtd,bhde,bht->bthe", q, torch.einsum("bhtd,bhte->bhde", k, v), scale)
        return self.head((x + made.flatten(2)).mean(1))


class Capsules(nn.Module):
    """Capsules: channels cut into vectors, whose places and kinds meet a stack of matrices."""

    def __init__(self, kinds: int, dim: int, out: int) -> None:
        super().__init__()
        self.dim, self.enter = dim, nn.Conv2d(3, kinds * dim, 4, 2)
        self.turn = nn.Parameter(torch.randn(1, CLASSES, kinds * 9, out, dim) / 3)

    def forward(self, x: Tensor) -> Tensor:
        found = self.enter(x).view(len(x), -1, self.dim, 9).transpose(2, 3).reshape(len(x), -1, self.dim)
        return (self.turn @ found[:, None, :, :, None]).squeeze(-1).sum(2).tanh().norm(dim=-1)


class PartsOfBlocks(nn.Module):
    """Blocks that hold layers alone: the model runs them, and cuts heads by numbers of its own."""

    def __init__(self, heads: int, kv_heads: int, head_dim: int = 4, dim: int = 8) -> None:
        super().__init__()
        self.sizes = [heads * head_dim, kv_heads * head_dim, kv_heads * head_dim]
        self.heads, self.groups, self.embedding = heads, heads // kv_heads, nn.Embedding(VOCABULARY, dim)
        self.blocks = nn.ModuleList(
            nn.ModuleDict({"qkv": nn.Linear(dim, sum(self.sizes)), "out": nn.Linear(heads * head_dim, dim)})
            for _ in range(2)
        )
        self.head = nn.Linear(dim, VOCABULARY)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        for block in self.blocks:
            q, k, v = block["qkv"](x).split(self.sizes, -1)
            q, k, v = (each.unflatten(-1, (-1, q.shape[-1] // self.heads)).transpose(1, 2) for each in (q, k, v))
            k, v = (each.repeat_interleave(self.groups, 1) for each in (k, v))
            made = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = x + block["out"](made.transpose(1, 2).flatten(2))
        return self.head(x)


class Mapped(nn.Module):
    """A layer mapped over the rows by `torch.vmap`."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.down = nn.Parameter(torch.randn(FEATURES, width)), nn.Parameter(torch.randn(width, CLASSES))

    def forward(self, x: Tensor) -> Tensor:
        mapped: Tensor = torch.vmap(lambda row: torch.tanh(row @ self.up) @ self.down)(x)
        return mapped


def _model(
    name: str, grows: str, make: Callable[..., nn.Module], student: Any, ta: Any, batch: Any, **more: Any
) -> Model:
    return Model(name=name, source="hand-written", grows=grows, make=make, student=student, ta=ta, batch=batch, **more)


MODELS: tuple[Model, ...] = (
    *_transformers(),
    _model(
        "Top two experts",
        "experts",
        TopExperts,
        {"num_experts": 3},
        {"num_experts": 5},
        _vectors,
        options={"layers": {"experts": "first"}},
    ),
    _model("Nearest code", "codes", Codes, {"num_codes": 6}, {"num_codes": 9}, _sequences),
    _model("Retention", "hidden size, heads kept", Retention, {"dim": 8, "heads": 2}, {"dim": 16}, _ids),
    _model(
        "Linear attention", "hidden size, heads kept", LinearAttention, {"dim": 8, "heads": 2}, {"dim": 16}, _sequences
    ),
    _model(
        "Capsules",
        "kinds, widths",
        Capsules,
        {"kinds": 3, "dim": 2, "out": 3},
        {"kinds": 5, "dim": 4, "out": 5},
        lambda: (_random(2, 3, 8, 8), None),
    ),
    _model(
        "Blocks run from outside",
        "heads, groups kept",
        PartsOfBlocks,
        {"heads": 4, "kv_heads": 2},
        {"heads": 8},
        _ids,
    ),
    _model("vmap", "width", Mapped, {"width": 4}, {"width": 7}, _vectors),
)
"""Every model that the second search found."""
