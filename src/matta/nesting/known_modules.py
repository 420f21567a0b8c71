"""What is known of common classes, as data: how their axes are fused, and which way they face.

A row is keyed by class name, which is looked up along a module's classes, so that neither
Transformers nor any other library is imported. An axis is written as a tuple of factors, from the
slowest index to the fastest, or a list of such tuples for parts that follow one another; a factor
is a number or the name of a dimension read off both modules.
"""

from __future__ import annotations

from fnmatch import fnmatchcase
from math import prod
from typing import Any, Final

from torch import nn

from matta.nesting.layout import Layout, Segment

Factors = tuple[int | str, ...]
Rows = dict[str, dict[int, Factors | list[Factors]]]

_QUERY: Final[Factors] = ("kv_heads", "groups", "head_dim")
_KEY: Final[Factors] = ("kv_heads", "head_dim")
_HEADS: Final[Factors] = ("heads", "head_dim")

_SEPARATE_QKV: Final[Rows] = {
    "q_proj.*": {0: _QUERY},
    "k_proj.*": {0: _KEY},
    "v_proj.*": {0: _KEY},
    "o_proj.weight": {1: _QUERY},
    "out_proj.weight": {1: _QUERY},
}
_FUSED_GLU: Final[Rows] = {"gate_up_proj.weight": {0: (2, "rest")}}

LAYOUTS: Final[dict[str, Rows]] = {
    "MultiheadAttention": {
        "in_proj_*": {0: (3, *_HEADS)},
        "?_proj_weight": {0: _HEADS},
        "bias_?": {2: _HEADS},
        "out_proj.weight": {1: _HEADS},
    },
    "LSTM": {
        "weight_ih_l0*": {0: (4, "rest")},
        "weight_ih_l*": {0: (4, "rest"), 1: ("directions", "rest")},
        "weight_hh*": {0: (4, "rest")},
        "bias*": {0: (4, "rest")},
    },
    "GRU": {
        "weight_ih_l0*": {0: (3, "rest")},
        "weight_ih_l*": {0: (3, "rest"), 1: ("directions", "rest")},
        "weight_hh*": {0: (3, "rest")},
        "bias*": {0: (3, "rest")},
    },
    "RNN": {"weight_ih_l0*": {}, "weight_ih_l*": {1: ("directions", "rest")}},
    "LSTMCell": {"*": {0: (4, "rest")}},
    "GRUCell": {"*": {0: (3, "rest")}},
    "GPT2Attention": {
        "c_attn.weight": {1: ("rest", *_HEADS)},
        "c_attn.bias": {0: ("rest", *_HEADS)},
        "q_attn.weight": {1: _HEADS},
        "q_attn.bias": {0: _HEADS},
        "c_proj.weight": {0: _HEADS},
    },
    "GPTNeoXAttention": {"query_key_value.*": {0: ("heads", 3, "head_dim")}, "dense.weight": {1: _HEADS}},
    "BloomAttention": {"query_key_value.*": {0: ("heads", 3, "head_dim")}, "dense.weight": {1: _HEADS}},
    "Phi3Attention": {"qkv_proj.*": {0: [_QUERY, _KEY, _KEY]}, "o_proj.weight": {1: _QUERY}},
    "Phi3MLP": _FUSED_GLU,
    "GlmMLP": _FUSED_GLU,
    "Glm4MLP": _FUSED_GLU,
    "BertAttention": {
        "self.query.*": {0: _HEADS},
        "self.key.*": {0: _HEADS},
        "self.value.*": {0: _HEADS},
        "output.dense.weight": {1: _HEADS},
    },
    "T5Attention": {
        "q.weight": {0: _HEADS},
        "k.weight": {0: _HEADS},
        "v.weight": {0: _HEADS},
        "o.weight": {1: _HEADS},
    },
    "ViTAttention": {
        "attention.query.*": {0: _HEADS},
        "attention.key.*": {0: _HEADS},
        "attention.value.*": {0: _HEADS},
        "output.dense.weight": {1: _HEADS},
        **_SEPARATE_QKV,
    },
    "LlamaAttention": _SEPARATE_QKV,
    "MistralAttention": _SEPARATE_QKV,
    "MixtralAttention": _SEPARATE_QKV,
    "Qwen2Attention": _SEPARATE_QKV,
    "Qwen3Attention": _SEPARATE_QKV,
    "GemmaAttention": _SEPARATE_QKV,
    "Gemma2Attention": _SEPARATE_QKV,
    "Gemma3Attention": _SEPARATE_QKV,
    "PhiAttention": {**_SEPARATE_QKV, "dense.weight": {1: _QUERY}},
    "GPTJAttention": _SEPARATE_QKV,
    "GPTNeoSelfAttention": _SEPARATE_QKV,
    "OPTAttention": _SEPARATE_QKV,
    "BartAttention": _SEPARATE_QKV,
    "WhisperAttention": _SEPARATE_QKV,
}
LAYOUTS["RobertaAttention"] = LAYOUTS["ElectraAttention"] = LAYOUTS["BertAttention"]

ATTENTION_NAMES: Final[dict[str, tuple[str, ...]]] = {
    "heads": ("num_heads", "n_heads", "n_head", "num_attention_heads", "nhead", "heads"),
    "kv_heads": ("num_key_value_heads", "num_kv_heads", "n_kv_heads"),
    "head_dim": ("head_dim", "attention_head_size", "key_value_proj_dim", "head_size", "d_kv"),
}
"""The attributes under which classes keep the dimensions of their attention."""

ROLES: Final[dict[str, dict[int, str]]] = {
    "Linear": {0: "out", 1: "in"},
    "Conv1d": {0: "out", 1: "in"},
    "Conv2d": {0: "out", 1: "in"},
    "Conv3d": {0: "out", 1: "in"},
    "ConvTranspose1d": {0: "in", 1: "out"},
    "ConvTranspose2d": {0: "in", 1: "out"},
    "ConvTranspose3d": {0: "in", 1: "out"},
    "Embedding": {0: "rows", 1: "embedding"},
    "EmbeddingBag": {0: "rows", 1: "embedding"},
    "Conv1D": {0: "in", 1: "out"},
}
"""Which axis of a class's weight is its output and which its input."""

SIZES: Final[dict[str, dict[str, int]]] = {
    "Linear": {"out_features": 0, "in_features": 1},
    "Conv1D": {"nx": 0, "nf": 1},
    "Conv1d": {"out_channels": 0, "in_channels": 1},
    "Conv2d": {"out_channels": 0, "in_channels": 1},
    "Conv3d": {"out_channels": 0, "in_channels": 1},
    "Embedding": {"num_embeddings": 0, "embedding_dim": 1},
    "EmbeddingBag": {"num_embeddings": 0, "embedding_dim": 1},
    "BatchNorm1d": {"num_features": 0},
    "BatchNorm2d": {"num_features": 0},
    "BatchNorm3d": {"num_features": 0},
    "LayerNorm": {"normalized_shape": 0},
    "RMSNorm": {"normalized_shape": 0},
    "GroupNorm": {"num_channels": 0},
    "PReLU": {"num_parameters": 0},
}
"""The attributes that repeat the size of an axis of the weight, by class."""


LAYER_INDICES: Final[tuple[str, ...]] = ("layer_idx", "layer_id", "layer_index", "layer_number", "block_idx")
"""The attributes under which a block knows its place in the stack."""

DEPTHS: Final[tuple[str, ...]] = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")
"""The names under which a config states how many layers there are."""


def _row(table: dict[str, Any], module: nn.Module) -> Any:
    return next((table[kind.__name__] for kind in type(module).__mro__ if kind.__name__ in table), None)


def axis_role(owner: nn.Module, parameter: str, axis: int) -> str:
    """What an axis is for: "out", "in", "rows", "embedding", or "unknown"."""
    roles = _row(ROLES, owner) if parameter == "weight" else None
    return str((roles or {}).get(axis, "unknown"))


def output_axis(owner: nn.Module, parameter: str, num_axes: int) -> int:
    """The axis of a parameter on which its module's outputs lie."""
    roles = _row(ROLES, owner) if parameter == "weight" and num_axes > 1 else None
    return next((axis for axis, role in (roles or {}).items() if role in ("out", "embedding")), 0)


def size_attributes(owner: nn.Module) -> dict[str, int] | None:
    """The attributes of `owner` that repeat the size of an axis of its weight."""
    found: dict[str, int] | None = _row(SIZES, owner)
    return found


def is_patchable(owner: nn.Module) -> bool:
    """Whether a module can be built at any mixture of widths by cutting its parameters."""
    return not any(True for _ in owner.children()) and size_attributes(owner) is not None


def known_layout(student: nn.Module, ta: nn.Module, name: str, axis: int, sizes: tuple[int, int]) -> Layout | None:
    """The layout of an axis of parameter `name` below `student`, where its class is in the table.

    `sizes` are the axis's lengths in the Student and in the TA.
    """
    for pattern, axes in (_row(LAYOUTS, student) or {}).items():
        if fnmatchcase(name, pattern):
            parts = axes.get(axis, ("rest",))
            parts = parts if isinstance(parts, list) else [parts]
            both = [
                [_factors(module, part, size) for part in parts]
                for module, size in zip((student, ta), sizes, strict=True)
            ]
            if any(factors is None for found in both for factors in found):
                return None
            return Layout({axis: tuple(Segment(s, t) for s, t in zip(*both, strict=True))})
    return None


def attention_dimensions(module: nn.Module) -> dict[str, int]:
    """The numbers of heads and the width of a head that a module or its config states."""
    found: dict[str, int] = {}
    for dimension, names in ATTENTION_NAMES.items():
        for holder in (module, *module.children(), getattr(module, "config", None)):
            values = [getattr(holder, name, None) for name in names]
            value = next((v for v in values if isinstance(v, int) and not isinstance(v, bool)), None)
            if value is not None:
                found[dimension] = value
                break
    if "heads" in found:
        found.setdefault("kv_heads", found["heads"])
        found["groups"] = found["heads"] // found["kv_heads"]
    if isinstance(module, nn.RNNBase):
        found["directions"] = 2 if module.bidirectional else 1
    return found


def _factors(module: nn.Module, part: Factors, size: int) -> tuple[int, ...] | None:
    known = attention_dimensions(module)
    named = [name for name in part if isinstance(name, str) and name not in known]
    if len(named) > 1:
        return None
    values = [known.get(f, 0) if isinstance(f, str) else f for f in part]
    if named:
        at = part.index(named[0])
        rest = prod(value for i, value in enumerate(values) if i != at)
        if not rest or size % rest:
            return None
        values[at] = size // rest
    return tuple(values)
