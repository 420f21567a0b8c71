"""The models of Transformers in the zoo, at tiny sizes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from zoo_cases import Model

VOCABULARY, LENGTH, CLASSES = 32, 6, 3
_IDS = {"vocab_size": VOCABULARY, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
LATENT = {  # latent attention, and experts in one group, as DeepSeek has them
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4,
    "v_head_dim": 4,
}
_LM = {
    **_IDS,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
}
_WIDER = {"intermediate_size": 40}
_HIDDEN = {"hidden_size": 32}
_HEADS = {"hidden_size": 32, "num_attention_heads": 8, "num_key_value_heads": 4}
_ENCODER = {**{key: value for key, value in _LM.items() if key != "num_key_value_heads"}, "num_labels": CLASSES}


def tokens() -> dict[str, Any]:
    """A batch of token ids."""
    generator = torch.Generator().manual_seed(0)
    return {"input_ids": torch.randint(3, VOCABULARY, (2, LENGTH), generator=generator)}


def both_tokens() -> dict[str, Any]:
    """Token ids for an encoder and a decoder."""
    ids = tokens()["input_ids"]
    return {"input_ids": ids, "decoder_input_ids": ids.flip(1)}


def pixels(size: int = 16, channels: int = 3) -> Callable[[], dict[str, Any]]:
    """A batch of images."""
    return lambda: {"pixel_values": torch.randn(2, channels, size, size, generator=torch.Generator().manual_seed(0))}


def sound(length: int = 400) -> Callable[[], dict[str, Any]]:
    """A batch of sound."""
    return lambda: {"input_values": torch.randn(2, length, generator=torch.Generator().manual_seed(0))}


def series(length: int = 16, channels: int = 3) -> Callable[[], dict[str, Any]]:
    """A batch of series of numbers."""
    return lambda: {"past_values": torch.randn(2, length, channels, generator=torch.Generator().manual_seed(0))}


def _build(name: str, config: str) -> Callable[..., nn.Module]:
    def build(**sizes: Any) -> nn.Module:
        import transformers

        settings = getattr(transformers, f"{config}Config")(**sizes)
        module: nn.Module = getattr(transformers, name)(settings)
        return module

    return build


def transformer(
    config: str,
    grows: str,
    student: Mapping[str, Any],
    ta: Mapping[str, Any],
    *,
    kind: str = "ForCausalLM",
    batch: Callable[[], Any] = tokens,
    name: str | None = None,
    **more: Any,
) -> Model:
    """A model of Transformers, by the name of its configuration and by its kind."""
    build = _build(name or f"{config}{kind}", config)
    return Model(
        name=name or f"{config}{kind}",
        source="transformers",
        grows=grows,
        make=build,
        student=student,
        ta=ta,
        batch=batch,
        **more,
    )


def _experts() -> list[Model]:
    width = {"moe_intermediate_size": 12, "num_experts": 4, "num_experts_per_tok": 2}
    local = {"num_local_experts": 4, "num_experts_per_tok": 2}
    deep = {
        **_LM,
        "num_key_value_heads": 4,
        "moe_intermediate_size": 12,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        **LATENT,
    }
    jamba = {**_LM, **local, "num_experts": 4, "mamba_d_state": 4, "mamba_dt_rank": 4, "use_mamba_kernels": False}
    jamba |= {"num_hidden_layers": 2, "attn_layer_period": 2, "attn_layer_offset": 1}
    jamba |= {"expert_layer_period": 2, "expert_layer_offset": 1}
    return [
        transformer("Mixtral", "expert width", {**_LM, **local}, _WIDER),
        transformer("Qwen3Moe", "expert width", {**_LM, **width, "head_dim": 4}, {"moe_intermediate_size": 20}),
        transformer(
            "Qwen2Moe",
            "expert width",
            {**_LM, **width, "shared_expert_intermediate_size": 12},
            {"moe_intermediate_size": 20, "shared_expert_intermediate_size": 20},
        ),
        transformer("DeepseekV3", "expert width", deep, {"moe_intermediate_size": 20}),
        transformer("GraniteMoe", "expert width", {**_LM, **local}, _WIDER),
        transformer("Jamba", "expert width", jamba, _WIDER),
        transformer("Olmoe", "expert width", {**_LM, "num_experts": 4, "num_experts_per_tok": 2}, _WIDER),
        transformer("GptOss", "expert width", {**_LM, **local, "head_dim": 4}, _WIDER),
        transformer("Phimoe", "expert width", {**_LM, **local}, _WIDER),
    ]


def _decoders() -> list[Model]:
    return [
        transformer("Llama", "hidden size, heads, width", _LM, {**_HEADS, **_WIDER}),
        transformer("Llama", "hidden size, heads kept", _LM, _HIDDEN),
        transformer("Starcoder2", "hidden size, heads kept", _LM, _HIDDEN),
        transformer("Qwen3", "hidden size, head_dim", {**_LM, "head_dim": 4}, {"hidden_size": 24, "head_dim": 8}),
        transformer("Gemma2", "width, heads", {**_LM, "head_dim": 4}, {**_WIDER, "num_attention_heads": 8}),
        transformer("Phi3", "heads, width", _LM, {**_HEADS, **_WIDER}),
        transformer("Cohere", "hidden size, heads kept", _LM, _HIDDEN),
        transformer("StableLm", "hidden size, heads", _LM, _HEADS),
        transformer("Olmo2", "hidden size, heads", _LM, _HEADS),
        transformer("Falcon", "hidden size, heads kept", {**_ENCODER, "num_kv_heads": 2}, _HIDDEN),
        transformer(
            "Mpt",
            "hidden size, heads",
            {**_IDS, "d_model": 16, "n_heads": 4, "n_layers": 2, "max_seq_len": 32},
            {"d_model": 32, "n_heads": 8},
        ),
        transformer(
            "CodeGen",
            "hidden size, heads kept",
            {**_IDS, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 32, "rotary_dim": 4},
            {"n_embd": 64},
        ),
        transformer(
            "GPTBigCode",
            "hidden size, heads",
            {**_IDS, "n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 32, "multi_query": True},
            {"n_embd": 32, "n_head": 8},
        ),
        transformer(
            "XLNet",
            "hidden size, heads kept",
            {**_IDS, "d_model": 16, "n_head": 4, "n_layer": 2, "d_inner": 24},
            {"d_model": 32},
            name="XLNetLMHeadModel",
        ),
        transformer("GPTNeoX", "hidden size, heads kept", _ENCODER, _HIDDEN),
    ]


def _state_spaces() -> list[Model]:
    mamba2 = {
        **_IDS,
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_heads": 4,
        "head_dim": 8,
        "n_groups": 2,
        "state_size": 4,
        "chunk_size": 4,
        "expand": 2,
    }
    recurrent = {
        **_LM,
        "num_key_value_heads": 1,
        "lru_width": 16,
        "attention_window_size": 8,
        "block_types": ["recurrent", "attention"],
    }
    return [
        transformer(
            "Mamba",
            "hidden size",
            {**_IDS, "hidden_size": 16, "num_hidden_layers": 2, "state_size": 4, "time_step_rank": 2},
            {"hidden_size": 32},
        ),
        transformer("Mamba2", "hidden size, more heads", mamba2, {"hidden_size": 32, "num_heads": 8}),
        transformer("RecurrentGemma", "width", recurrent, _WIDER),
        transformer(
            "FalconMamba",
            "hidden size",
            {**_IDS, "hidden_size": 16, "num_hidden_layers": 2, "state_size": 4, "time_step_rank": 2},
            {"hidden_size": 32},
        ),
        transformer(
            "Rwkv",
            "width",
            {**_IDS, "hidden_size": 16, "num_hidden_layers": 2, "intermediate_size": 24, "attention_hidden_size": 16},
            _WIDER,
        ),
        transformer(
            "Bamba",
            "width",
            {
                **_LM,
                "mamba_n_heads": 4,
                "mamba_d_head": 8,
                "mamba_n_groups": 1,
                "mamba_d_state": 4,
                "attn_layer_indices": [1],
            },
            _WIDER,
        ),
    ]


def _encoders() -> list[Model]:
    labels = {"kind": "ForSequenceClassification"}
    deberta = {**_ENCODER, "pos_att_type": ["p2c", "c2p"], "relative_attention": True, "position_buckets": 4}
    return [
        transformer("Deberta", "hidden size, heads kept", {**deberta, "type_vocab_size": 0}, _HIDDEN, **labels),
        transformer("DebertaV2", "hidden size, heads kept", deberta, _HIDDEN, **labels),
        transformer(
            "Albert",
            "hidden size, heads",
            {**_ENCODER, "embedding_size": 8},
            {"hidden_size": 32, "num_attention_heads": 8},
            **labels,
        ),
        transformer(
            "Roberta",
            "width, blocks",
            _ENCODER,
            {**_WIDER, "num_hidden_layers": 3},
            **labels,
            options={"layers": {"roberta.encoder.layer": "first"}},
        ),
        transformer(
            "DistilBert",
            "hidden size, heads kept",
            {**_IDS, "dim": 16, "n_layers": 2, "n_heads": 4, "hidden_dim": 24, "num_labels": CLASSES},
            {"dim": 32},
            **labels,
        ),
        transformer(
            "ModernBert", "width", {**_ENCODER, "local_attention": 4, "reference_compile": False}, _WIDER, **labels
        ),
        transformer("MPNet", "hidden size, heads kept", _ENCODER, _HIDDEN, **labels),
        transformer(
            "Electra",
            "hidden size, heads",
            {**_ENCODER, "embedding_size": 8},
            {"hidden_size": 32, "num_attention_heads": 8},
            **labels,
        ),
        transformer("FNet", "hidden size", _ENCODER, _HIDDEN, **labels),
        transformer(
            "BigBird", "hidden size, heads kept", {**_ENCODER, "attention_type": "original_full"}, _HIDDEN, **labels
        ),
        transformer("ConvBert", "width", _ENCODER, _WIDER, **labels),
        transformer("SqueezeBert", "width", {**_ENCODER, "embedding_size": 16}, _WIDER, **labels),
    ]


def _encoder_decoders() -> list[Model]:
    bart = {
        **_IDS,
        "d_model": 16,
        "encoder_layers": 2,
        "decoder_layers": 2,
        "encoder_ffn_dim": 24,
        "decoder_ffn_dim": 24,
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 4,
        "max_position_embeddings": 32,
        "decoder_start_token_id": 0,
        "forced_eos_token_id": None,
    }
    wider = {"encoder_ffn_dim": 40, "decoder_ffn_dim": 40}
    return [
        transformer(
            "Bart", "hidden size, heads kept", bart, {"d_model": 32}, kind="ForConditionalGeneration", batch=both_tokens
        ),
        transformer("Marian", "width", bart, wider, name="MarianMTModel", batch=both_tokens),
        transformer("Pegasus", "width", bart, wider, kind="ForConditionalGeneration", batch=both_tokens),
    ]


def _vision_and_sound() -> list[Model]:
    images = {"kind": "ForImageClassification", "batch": pixels()}
    small = {"image_size": 16, "patch_size": 4, "num_channels": 3, "num_labels": CLASSES}
    plain = {
        key: _ENCODER[key] for key in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    }
    swin = {**small, "embed_dim": 8, "depths": [2, 2], "num_heads": [2, 4], "window_size": 2, "patch_size": 2}
    return [
        transformer("Swin", "hidden size, heads kept", swin, {"embed_dim": 16}, **images),
        transformer("Swinv2", "hidden size, heads", swin, {"embed_dim": 16, "num_heads": [4, 8]}, **images),
        transformer(
            "Beit", "hidden size, heads kept", {**plain, **small, "use_relative_position_bias": True}, _HIDDEN, **images
        ),
        transformer(
            "DeiT", "hidden size, heads", {**plain, **small}, {"hidden_size": 32, "num_attention_heads": 8}, **images
        ),
        transformer(
            "ConvNext",
            "hidden sizes",
            {
                "num_channels": 3,
                "patch_size": 2,
                "hidden_sizes": [8, 16],
                "depths": [1, 1],
                "num_stages": 2,
                "num_labels": CLASSES,
            },
            {"hidden_sizes": [12, 24]},
            **images,
        ),
        transformer(
            "ResNet",
            "hidden sizes",
            {
                "embedding_size": 8,
                "hidden_sizes": [8, 16],
                "depths": [1, 1],
                "layer_type": "basic",
                "num_labels": CLASSES,
            },
            {"embedding_size": 12, "hidden_sizes": [12, 24]},
            **images,
        ),
        transformer(
            "PoolFormer",
            "hidden sizes",
            {
                "hidden_sizes": [8, 16],
                "depths": [1, 1],
                "num_encoder_blocks": 2,
                "patch_sizes": [3, 3],
                "strides": [2, 2],
                "padding": [1, 1],
                "num_labels": CLASSES,
            },
            {"hidden_sizes": [12, 24]},
            **images,
        ),
        transformer(
            "MobileNetV2",
            "depth multiplier",
            {"num_labels": CLASSES, "image_size": 16, "depth_multiplier": 0.35},
            {"depth_multiplier": 0.5},
            **{**images, "batch": pixels(32)},
        ),
        transformer(
            "Wav2Vec2",
            "width",
            {
                **plain,
                "vocab_size": VOCABULARY,
                "conv_dim": [8, 8],
                "conv_stride": [5, 2],
                "conv_kernel": [10, 3],
                "num_feat_extract_layers": 2,
                "num_conv_pos_embeddings": 4,
                "num_conv_pos_embedding_groups": 2,
                "feat_extract_norm": "group",
            },
            _WIDER,
            kind="ForCTC",
            batch=sound(),
        ),
        transformer(
            "PatchTST",
            "hidden size, heads kept",
            {
                "num_input_channels": 3,
                "context_length": 16,
                "patch_length": 4,
                "patch_stride": 4,
                "d_model": 16,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "ffn_dim": 24,
                "num_targets": CLASSES,
                "use_cls_token": True,
            },
            {"d_model": 32},
            kind="ForClassification",
            batch=series(),
        ),
    ]


MODELS: tuple[Model, ...] = (
    *_experts(),
    *_decoders(),
    *_state_spaces(),
    *_encoders(),
    *_encoder_decoders(),
    *_vision_and_sound(),
)
"""Every model of Transformers in the zoo."""
