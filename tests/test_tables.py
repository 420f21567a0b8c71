"""The table of known classes: every row fits real modules, and what it lays out is what the class computes."""

from __future__ import annotations

import re
from fnmatch import fnmatchcase
from typing import Any

import pytest
import torch
from torch import nn

import matta
from matta.nesting import known_modules as tables
from matta.nesting.layout import Segment

CONFIGS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "GPT2": ("GPT2", {"n_inner": 12}, {"num_attention_heads": 4, "hidden_size": 16, "n_inner": 20}),
    "GPTNeoX": ("GPTNeoX", {}, {"num_attention_heads": 4, "hidden_size": 16}),
    "Bloom": ("Bloom", {"n_layer": 1, "n_head": 2}, {"n_head": 4, "hidden_size": 16}),
    "Phi3": ("Phi3", {"num_key_value_heads": 1, "pad_token_id": 0}, {"intermediate_size": 20}),
    "Glm": ("Glm", {"num_key_value_heads": 1, "head_dim": 4, "pad_token_id": 0}, {"intermediate_size": 20}),
    "Llama": ("Llama", {"num_key_value_heads": 1}, {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 4}),
    "Qwen3": ("Qwen3", {"num_key_value_heads": 1, "head_dim": 4}, {"num_attention_heads": 4, "num_key_value_heads": 2}),
    "Llama of one key head": (
        "Llama",
        {"num_key_value_heads": 1},
        {"num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 4},
    ),
    "Mistral": ("Mistral", {"num_key_value_heads": 1}, {"intermediate_size": 20}),
    "Gemma": ("Gemma", {"num_key_value_heads": 1, "head_dim": 4}, {"num_attention_heads": 4, "intermediate_size": 20}),
    "OPT": ("OPT", {"ffn_dim": 12, "word_embed_proj_dim": 8}, {"ffn_dim": 20}),
}
COMMON = {
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "vocab_size": 11,
    "max_position_embeddings": 16,
}


def _build(name: str, sizes: dict[str, Any]) -> nn.Module:
    import transformers

    config = getattr(transformers, f"{name}Config")(**{**COMMON, **sizes})
    config._attn_implementation = "eager"
    torch.manual_seed(0)
    kind = f"{name}LMHeadModel" if name == "GPT2" else f"{name}ForCausalLM"
    return getattr(transformers, kind)(config).eval()


def _cuts(nested: matta.Nested) -> dict[str, list[Any]]:
    return {name: [axis.positions() for axis in each.axes] for name, each in nested.plan.placements.items()}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_transformers_model_nests_without_declarations_and_the_probe_agrees(name: str) -> None:
    kind, small, larger = CONFIGS[name]
    nested = matta.nest(_build(kind, small), _build(kind, {**small, **larger}))
    tokens = {"input_ids": torch.randint(11, (2, 5), generator=torch.Generator().manual_seed(0))}
    matta.probe(nested, tokens)
    by_run = matta.nest(_build(kind, small), _build(kind, {**small, **larger}), example=tokens)
    assert _cuts(by_run) == _cuts(nested)
    assert any(placement.grows for placement in nested.plan.placements.values())


RECURRENT = [
    ("LSTM", {}),
    ("GRU", {}),
    ("RNN", {}),
    ("LSTM", {"bidirectional": True, "num_layers": 2}),
    ("GRU", {"bidirectional": True, "num_layers": 2}),
    ("RNN", {"bidirectional": True, "num_layers": 2}),
    ("LSTM", {"proj_size": 2}),
]


@pytest.mark.parametrize(("name", "options"), RECURRENT)
def test_recurrent_modules_nest_gate_by_gate(name: str, options: dict[str, Any]) -> None:
    """With all but the Student's slices zeroed, the larger one computes the smaller one."""
    torch.manual_seed(0)
    small, large = (getattr(nn, name)(3, width, **options) for width in (4, 6))
    nested = matta.nest(small, large)
    x = torch.randn(5, 2, 3)
    expected = nested.student.eval()(x)[0]
    kept = {key: live.read(contiguous=True).detach() for key, live in nested.sources().items()}
    with torch.no_grad():
        for key, parameter in large.named_parameters():
            whole = torch.zeros_like(parameter)
            axes = [torch.tensor(axis.positions()) for axis in nested.plan.placements[key].axes]
            whole[torch.meshgrid(*axes, indexing="ij")] = kept[key]
            parameter.copy_(whole)
    found = large.eval()(x)[0].unflatten(-1, (1 + ("bidirectional" in options), -1))
    width = expected.shape[-1] // found.shape[-2]
    torch.testing.assert_close(found[..., :width].flatten(-2), expected)


@pytest.mark.parametrize(("name", "gates"), [("LSTMCell", 4), ("GRUCell", 3)])
def test_cells_nest_gate_by_gate(name: str, gates: int) -> None:
    nested = matta.nest(*(getattr(nn, name)(3, width) for width in (4, 6)))
    expected = nested.ta.weight_ih.unflatten(0, (gates, 6))[:, :4].flatten(0, 1)
    assert torch.equal(nested.student.weight_ih, expected)


@pytest.mark.parametrize("name", [*tables.LAYOUTS])
def test_every_row_is_written_in_known_words(name: str) -> None:
    words = {"rest", "directions", "groups", *tables.ATTENTION_NAMES}
    for pattern, axes in tables.LAYOUTS[name].items():
        assert fnmatchcase(re.sub(r"[*?]", "x", pattern), pattern)
        for axis, parts in axes.items():
            assert axis in (0, 1, 2)
            for part in parts if isinstance(parts, list) else [parts]:
                assert {factor for factor in part if isinstance(factor, str)} <= words
                assert part.count("rest") <= 1


@pytest.mark.parametrize("name", sorted(name for name in tables.LAYOUTS if not hasattr(nn, name)))
def test_every_class_of_transformers_in_the_table_exists(name: str) -> None:
    """A row for a class that is gone would go unnoticed."""
    from importlib import import_module

    family = re.sub(r"(Self)?(Attention|MLP)$", "", name)
    path = {"GPT2": "gpt2", "GPTNeoX": "gpt_neox", "GPTNeo": "gpt_neo", "GPTJ": "gptj"}.get(family, family.lower())
    assert hasattr(import_module(f"transformers.models.{path}.modeling_{path}"), name)


@pytest.mark.parametrize(
    ("module", "roles", "output"),
    [
        (nn.Linear(2, 3), ["out", "in"], 0),
        (nn.Conv2d(2, 3, 1), ["out", "in", "unknown", "unknown"], 0),
        (nn.ConvTranspose2d(2, 3, 1), ["in", "out", "unknown", "unknown"], 1),
        (nn.Embedding(2, 3), ["rows", "embedding"], 1),
        (nn.Bilinear(2, 2, 3), ["unknown", "unknown", "unknown"], 0),
    ],
)
def test_the_axes_of_a_weight_face_where_the_class_computes(module: nn.Module, roles: list[str], output: int) -> None:
    weight = module.weight
    assert isinstance(weight, torch.Tensor)
    assert [tables.axis_role(module, "weight", axis) for axis in range(weight.ndim)] == roles
    assert tables.output_axis(module, "weight", weight.ndim) == output
    assert tables.output_axis(module, "bias", 1) == 0


def test_a_users_subclass_is_what_it_extends() -> None:
    class Scaled(nn.Linear):
        pass

    class Gated(nn.LSTM):
        pass

    assert tables.axis_role(Scaled(2, 3), "weight", 1) == "in"
    layout = tables.known_layout(Gated(2, 3), Gated(2, 4), "weight_hh_l0", 0, (12, 16))
    assert layout is not None
    assert layout.axes[0] == (Segment((4, 3), (4, 4)),)


@pytest.mark.parametrize(
    ("module", "sizes"),
    [
        (nn.Linear(2, 3), {"out_features": 3, "in_features": 2}),
        (nn.Conv1d(2, 3, 5), {"out_channels": 3, "in_channels": 2}),
        (nn.Embedding(2, 3), {"num_embeddings": 2, "embedding_dim": 3}),
        (nn.BatchNorm2d(3), {"num_features": 3}),
        (nn.GroupNorm(1, 3), {"num_channels": 3}),
        (nn.PReLU(3), {"num_parameters": 3}),
    ],
)
def test_the_attributes_that_repeat_a_size_hold_it(module: nn.Module, sizes: dict[str, int]) -> None:
    weight = module.weight
    assert isinstance(weight, torch.Tensor)
    found = tables.size_attributes(module)
    assert found is not None
    assert {name: weight.shape[axis] for name, axis in found.items()} == sizes
    assert all(getattr(module, name) == size for name, size in sizes.items())


def test_numbers_of_heads_are_read_off_the_module_or_its_config() -> None:
    module = nn.MultiheadAttention(8, 2)
    assert tables.attention_dimensions(module) == {"heads": 2, "head_dim": 4, "kv_heads": 2, "groups": 1}
    model = _build("Llama", {"num_attention_heads": 4, "num_key_value_heads": 2})
    attention = model.get_submodule("model.layers.0.self_attn")
    assert tables.attention_dimensions(attention) == {"heads": 4, "kv_heads": 2, "head_dim": 2, "groups": 2}
    assert tables.attention_dimensions(nn.Linear(2, 2)) == {}
