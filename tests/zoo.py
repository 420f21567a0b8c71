"""The matrix of architectures times width, depth and d_model: every case that the identities run over."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

import matta
from architectures import (
    CLASSES,
    LENGTH,
    VOCABULARY,
    ConvolutionalNetwork,
    DeepAndCross,
    EarlyExit,
    Experts,
    GatedAttentionUnit,
    InvertedResiduals,
    LanguageModel,
    Looped,
    Oddity,
    Perceptron,
    Ranker,
    Recurrent,
    ResidualPerceptron,
    SwiGlu,
    TorchEncoder,
    Transformer,
    VisionTransformer,
)
from cases import Case, equal, fields, images, pixels, prompt, prompt_and_answer, tokens, vectors


def _pair(build: Callable[..., nn.Module], small: dict[str, Any], large: dict[str, Any]) -> Any:
    return lambda: (build(**small), build(**{**small, **large}))


def _language_model(block: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    def build(dim: int, depth: int = 2, **sizes: Any) -> nn.Module:
        return LanguageModel(dim, [block(dim, **sizes) for _ in range(depth)])

    return build


def _perceptrons() -> list[Case]:
    residual = {"dim": 4, "width": 6, "depth": 2}
    deeper = _pair(ResidualPerceptron, residual, {"width": 10, "depth": 4})
    return [
        Case(
            id="mlp-width",
            width_only=True,
            make=_pair(Perceptron, {"hidden": (6, 4)}, {"hidden": (12, 9)}),
            inputs=vectors,
            target="binary",
        ),
        Case(
            id="mlp-depth",
            make=_pair(Perceptron, {"hidden": (6, 6)}, {"hidden": (6, 6, 6, 6)}),
            inputs=vectors,
            target="binary",
            soft=True,
            layers={"hidden": "first"},
            depth={"hidden": (0, 1)},
        ),
        Case(
            id="residual_mlp-width",
            width_only=True,
            make=_pair(ResidualPerceptron, residual, {"width": 10}),
            inputs=vectors,
            soft=True,
            mixed="blocks",
        ),
        Case(
            id="residual_mlp-d_model-width-depth",
            make=_pair(ResidualPerceptron, residual, {"dim": 7, "width": 10, "depth": 3}),
            inputs=vectors,
            layers={"blocks": "last"},
            depth={"blocks": (1, 2)},
        ),
        *(
            Case(
                id=f"residual_mlp-depth-{rule if isinstance(rule, str) else 'list'}",
                make=deeper,
                inputs=vectors,
                soft=True,
                layers={"blocks": rule},
                depth={"blocks": indices},
                mixed="blocks",
            )
            for rule, indices in (("first", (0, 1)), ("last", (2, 3)), ("ends", (0, 3)), ([1, 3], (1, 3)))
        ),
    ]


def _rankers() -> list[Case]:
    dlrm, dcn = {"dim": 3, "width": 6, "interact": True}, {"dim": 2, "width": 6, "depth": 2}
    joined = (*equal(3, 2, 4), (LENGTH, LENGTH))
    shared: dict[str, Any] = {"inputs": fields, "target": "binary", "soft": True}
    return [
        Case(id="dlrm-width", width_only=True, make=_pair(Ranker, dlrm, {"width": 14}), **shared),
        Case(
            id="dlrm-embeddings",
            width_only=True,
            make=_pair(Ranker, dlrm, {"dim": 5, "width": 14}),
            cuts={"top.0.weight": {1: ((3, 5), (6, 6))}},
            **shared,
        ),
        Case(
            id="dlrm-concat",
            width_only=True,
            make=_pair(Ranker, {**dlrm, "interact": False}, {"dim": 5, "width": 14}),
            cuts={"top.0.weight": {1: equal(4, 3, 5)}},
            layouts={"top.0.weight": matta.Layout.equal(4, axis=1)},
            **shared,
        ),
        Case(
            id="dcn-width",
            width_only=True,
            make=_pair(DeepAndCross, dcn, {"width": 9}),
            cuts={"logit.weight": {1: ((6, 9), (6 + LENGTH, 6 + LENGTH))}},
            **shared,
        ),
        Case(
            id="dcn-depth",
            make=_pair(DeepAndCross, dcn, {"depth": 4}),
            layers={"cross": "last"},
            depth={"cross": (2, 3)},
            mixed="cross",
            **shared,
        ),
        Case(
            id="dcn-embeddings-width-depth",
            make=_pair(DeepAndCross, dcn, {"dim": 4, "width": 9, "depth": 3}),
            layers={"cross": "first"},
            depth={"cross": (0, 1)},
            cuts={
                "cross.*.weight": {0: joined, 1: joined},
                "cross.*.bias": {0: joined},
                "deep.0.weight": {1: joined},
                "logit.weight": {1: ((6, 9), *joined)},
            },
            **shared,
        ),
    ]


def _transformers_of_ours() -> list[Case]:
    qkv = "blocks.*.attention.qkv.*"
    more_heads: dict[str, Any] = {"heads": 4, "width": 12}
    blocks = {"blocks": "even"}
    heads_first = {"order": "heads 3 hd"}
    three_first = {"order": "3 heads hd"}
    return [
        Case(
            id="transformer-width",
            width_only=True,
            make=_pair(Transformer, {}, {"width": 14}),
            inputs=tokens,
            mixed="blocks",
        ),
        Case(
            id="transformer-heads",
            width_only=True,
            make=_pair(Transformer, {}, more_heads),
            inputs=tokens,
            mixed="blocks",
        ),
        Case(
            id="transformer-head_dim",
            make=_pair(Transformer, {}, {"head_dim": 5}),
            inputs=tokens,
            cuts={
                "blocks.*.attention.[qkv].*": {0: equal(2, 3, 5)},
                "blocks.*.attention.out.weight": {1: equal(2, 3, 5)},
            },
            layouts={
                "blocks.*.attention.[qkv].*": 2,
                "blocks.*.attention.out.weight": matta.Layout.factors([(2, 2), (3, 5)], axis=1),
            },
            mixed="blocks",
        ),
        Case(
            id="transformer-d_model-heads-depth",
            make=_pair(Transformer, {}, {**more_heads, "dim": 10, "depth": 3}),
            inputs=tokens,
            soft=True,
            layers={"blocks": "first"},
            depth={"blocks": (0, 1)},
        ),
        Case(
            id="fused_qkv-heads",
            width_only=True,
            make=_pair(Transformer, three_first, more_heads),
            inputs=tokens,
            cuts={qkv: {0: equal(3, 6, 12)}},
            mixed="blocks",
        ),
        Case(
            id="fused_qkv-head_dim",
            make=_pair(Transformer, three_first, {"head_dim": 5}),
            inputs=tokens,
            cuts={qkv: {0: equal(6, 3, 5)}, "blocks.*.attention.out.weight": {1: equal(2, 3, 5)}},
        ),
        Case(
            id="fused_qkv-heads_and_head_dim",
            make=_pair(Transformer, three_first, {"heads": 3, "head_dim": 5}),
            inputs=tokens,
            cuts={
                qkv: {0: (*equal(2, 3, 5), (0, 5)) * 3},
                "blocks.*.attention.out.weight": {1: (*equal(2, 3, 5), (0, 5))},
            },
            layouts={
                qkv: matta.Layout.factors([(3, 3), (2, 3), (3, 5)]),
                "blocks.*.attention.out.weight": matta.Layout.factors([(2, 3), (3, 5)], axis=1),
            },
            mixed="blocks",
        ),
        Case(
            id="fused_qkv-d_model-depth",
            make=_pair(Transformer, three_first, {**more_heads, "dim": 10, "depth": 4}),
            inputs=tokens,
            layers=blocks,
            depth={"blocks": (0, 3)},
            cuts={qkv: {0: equal(3, 6, 12)}},
        ),
        Case(
            id="heads_first_qkv-heads",
            width_only=True,
            make=_pair(Transformer, heads_first, more_heads),
            inputs=tokens,
            layouts={qkv: 1, "blocks.*.attention.out.weight": 1},
            mixed="blocks",
        ),
        Case(
            id="heads_first_qkv-head_dim",
            make=_pair(Transformer, heads_first, {"head_dim": 5}),
            inputs=tokens,
            cuts={qkv: {0: equal(6, 3, 5)}, "blocks.*.attention.out.weight": {1: equal(2, 3, 5)}},
        ),
        Case(
            id="vit-width-heads-depth",
            make=_pair(
                VisionTransformer,
                {"dim": 4, "heads": 2, "width": 6, "depth": 2},
                {"heads": 3, "width": 10, "depth": 3},
            ),
            inputs=images,
            layers={"blocks": "ends"},
            depth={"blocks": (0, 2)},
            cuts={qkv: {0: equal(3, 4, 6)}},
            mixed="blocks",
        ),
        Case(
            id="vit-d_model",
            make=_pair(VisionTransformer, {"dim": 4, "heads": 2, "width": 6, "depth": 2}, {"dim": 7, "heads": 3}),
            inputs=images,
            soft=True,
            cuts={qkv: {0: equal(3, 4, 6)}},
        ),
    ]


def _gated_and_routed() -> list[Case]:
    glu, gau, moe = _language_model(SwiGlu), _language_model(GatedAttentionUnit), _language_model(Experts)
    unit = {"dim": 4, "expanded": 6, "shared": 128}
    routed = {"dim": 4, "width": 5, "num_experts": 3}
    shared: dict[str, Any] = {"inputs": tokens, "target": "tokens"}
    halves = {"blocks.*.gate_up.weight": {0: equal(2, 5, 9)}}
    uvz = {"blocks.*.uvz.*": {0: ((6, 10), (6, 10), (128, 128))}}
    return [
        Case(
            id="swiglu-width",
            width_only=True,
            make=_pair(glu, {"dim": 4, "width": 5, "fused": False}, {"width": 9}),
            mixed="blocks",
            **shared,
        ),
        Case(
            id="swiglu_fused-width-depth",
            make=_pair(glu, {"dim": 4, "width": 5, "fused": True}, {"width": 9, "depth": 3}),
            layers={"blocks": "first"},
            depth={"blocks": (0, 1)},
            cuts=halves,
            mixed="blocks",
            **shared,
        ),
        Case(
            id="swiglu_fused-d_model",
            make=_pair(glu, {"dim": 4, "width": 5, "fused": True}, {"dim": 6, "width": 9}),
            cuts=halves,
            **shared,
        ),
        Case(
            id="gau-width",
            width_only=True,
            make=_pair(gau, unit, {"expanded": 10}),
            cuts=uvz,
            mixed="blocks",
            **shared,
        ),
        Case(
            id="gau-depth",
            make=_pair(gau, unit, {"depth": 3}),
            layers={"blocks": "first"},
            depth={"blocks": (0, 1)},
            mixed="blocks",
            **shared,
        ),
        Case(id="gau-d_model-width", make=_pair(gau, unit, {"dim": 7, "expanded": 10}), cuts=uvz, **shared),
        Case(
            id="gau-shared",
            make=_pair(gau, {**unit, "shared": 8}, {"expanded": 10, "shared": 12}),
            cuts={"blocks.*.uvz.*": {0: ((6, 10), (6, 10), (8, 12))}},
            mixed="blocks",
            **shared,
        ),
        Case(id="moe-width", width_only=True, make=_pair(moe, routed, {"width": 8}), mixed="blocks", **shared),
        Case(
            id="moe-experts",
            make=_pair(moe, {**routed, "depth": 1}, {"num_experts": 5}),
            layers={"blocks.0.experts": "first"},
            depth={"blocks.0.experts": (0, 1, 2)},
            layouts={"blocks.0.router.weight": 1},
            **shared,
        ),
        Case(
            id="moe-experts-width-d_model",
            make=_pair(moe, routed, {"dim": 6, "width": 8, "num_experts": 4}),
            layers={"blocks.*.experts": "first"},
            layouts={"blocks.*.router.weight": 1},
            **shared,
        ),
    ]


def _torch_modules() -> list[Case]:
    cnn, rnn = {"channels": 4, "width": 5, "depth": 2}, {"kind": nn.LSTM, "dim": 3, "width": 4}
    gru = {**rnn, "kind": nn.GRU}
    encoder = {"dim": 4, "heads": 2, "width": 6, "depth": 2}
    in_proj = {"encoder.layers.*.self_attn.in_proj_*": {0: equal(3, 4, 8)}}
    return [
        Case(
            id="cnn-width",
            width_only=True,
            make=_pair(ConvolutionalNetwork, cnn, {"width": 9}),
            inputs=images,
            mixed="blocks",
        ),
        Case(
            id="cnn-depth",
            make=_pair(ConvolutionalNetwork, cnn, {"width": 9, "depth": 3}),
            inputs=images,
            layers={"blocks": "first"},
            depth={"blocks": (0, 1)},
            mixed="blocks",
        ),
        Case(
            id="mobilenet-width-depth",
            make=_pair(InvertedResiduals, cnn, {"width": 9, "depth": 3}),
            inputs=images,
            layers={"blocks": "ends"},
            depth={"blocks": (0, 2)},
            mixed="blocks",
        ),
        Case(
            id="cnn-channels-flatten",
            make=_pair(ConvolutionalNetwork, {**cnn, "flatten": True}, {"channels": 6, "width": 9}),
            inputs=images,
            soft=True,
            cuts={"head.weight": {1: equal(9, 4, 6)}},
        ),
        Case(
            id="lstm-width-declared",
            width_only=True,
            make=_pair(Recurrent, rnn, {"width": 6}),
            inputs=tokens,
            cuts={"rnn.*": {0: equal(4, 4, 6)}},
        ),
        Case(
            id="lstm-embeddings-width-depth",
            make=_pair(Recurrent, rnn, {"dim": 5, "width": 6, "depth": 2}),
            inputs=tokens,
            cuts={"rnn.*": {0: equal(4, 4, 6)}},
            layouts={},
        ),
        Case(
            id="lstm-bidirectional",
            width_only=True,
            make=_pair(Recurrent, {**rnn, "depth": 2, "both": True}, {"width": 6}),
            inputs=tokens,
            cuts={
                "rnn.weight_ih_l1*": {0: equal(4, 4, 6), 1: equal(2, 4, 6)},
                "rnn.*": {0: equal(4, 4, 6)},
                "head.weight": {1: equal(2, 4, 6)},
            },
            layouts={"head.weight": matta.Layout.equal(2, axis=1)},
        ),
        Case(
            id="gru-width",
            width_only=True,
            make=_pair(Recurrent, gru, {"width": 6}),
            inputs=tokens,
            cuts={"rnn.*": {0: equal(3, 4, 6)}},
            layouts={},
        ),
        Case(
            id="torch_encoder-width",
            width_only=True,
            make=_pair(TorchEncoder, encoder, {"width": 10}),
            inputs=tokens,
            mixed="encoder.layers",
        ),
        Case(
            id="torch_encoder-d_model-heads-depth",
            make=_pair(TorchEncoder, encoder, {"dim": 8, "heads": 4, "width": 10, "depth": 3}),
            inputs=tokens,
            layers={"encoder.layers": "first"},
            depth={"encoder.layers": (0, 1)},
            cuts=in_proj,
            layouts={},
        ),
        Case(
            id="torch_encoder-d_model-head_dim",
            make=_pair(TorchEncoder, encoder, {"dim": 6}),
            inputs=tokens,
            cuts={
                "encoder.layers.*.self_attn.in_proj_*": {0: equal(6, 2, 3)},
                "encoder.layers.*.self_attn.out_proj.weight": {1: equal(2, 2, 3)},
            },
            layouts={},
        ),
    ]


def _unheard_of() -> list[Case]:
    shared: dict[str, Any] = {"inputs": tokens, "target": "tokens"}
    early = {"dim": 4, "width": 5, "depth": 1}

    def early_exit() -> tuple[nn.Module, nn.Module]:
        return EarlyExit(**early, exits=True), EarlyExit(4, 7, 3, exits=False)

    return [
        Case(
            id="oddity-width",
            width_only=True,
            make=_pair(Oddity, {"dim": 4, "width": 3}, {"width": 6}),
            **shared,
        ),
        Case(
            id="oddity-d_model-width",
            make=_pair(Oddity, {"dim": 4, "width": 3}, {"dim": 6, "width": 6}),
            **shared,
        ),
        Case(
            id="looped-width",
            width_only=True,
            make=_pair(Looped, {"dim": 4, "width": 3, "num_times": 3}, {"width": 6}),
            inputs=vectors,
            target="binary",
        ),
        Case(
            id="early_exit-private",
            make=early_exit,
            layers={"blocks": "first"},
            depth={"blocks": (0,)},
            private=("exit_norm.*", "head.*"),
            **shared,
        ),
    ]


# ------------------------------------------------------------------------ Transformers


def _hugging_face(model: str, config: str, fixed: dict[str, Any]) -> Callable[..., nn.Module]:
    def build(**sizes: Any) -> nn.Module:
        import transformers

        settings = getattr(transformers, config)(**{**fixed, **sizes})
        built: nn.Module = getattr(transformers, model)(settings)
        return built

    return build


_IDS = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2, "vocab_size": VOCABULARY}


def _gpt2() -> list[Case]:
    build = _hugging_face(
        "GPT2LMHeadModel",
        "GPT2Config",
        {**_IDS, "n_positions": LENGTH, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
    )
    small = {"n_embd": 4, "n_layer": 2, "n_head": 2, "n_inner": 6}
    shared: dict[str, Any] = {"inputs": prompt, "target": "tokens"}
    fused = {
        "*.c_attn.weight": {1: equal(3, 4, 8)},
        "*.c_attn.bias": {0: equal(3, 4, 8)},
    }
    rules = {"first": (0, 1, 2), "last": (2, 3, 4), "even": (0, 2, 4), "ends": (0, 1, 4)}
    return [
        Case(
            id="gpt2-width",
            width_only=True,
            make=_pair(build, small, {"n_inner": 10}),
            mixed="transformer.h",
            **shared,
        ),
        *(
            Case(
                id=f"gpt2-width-depth-{rule}",
                make=_pair(build, {**small, "n_layer": 3}, {"n_inner": 10, "n_layer": 5}),
                layers={"transformer.h": rule},
                depth={"transformer.h": indices},
                mixed="transformer.h",
                **shared,
            )
            for rule, indices in rules.items()
        ),
        Case(
            id="gpt2-d_model-heads",
            make=_pair(build, small, {"n_embd": 8, "n_head": 4, "n_inner": 10}),
            cuts=fused,
            layouts={},
            **shared,
        ),
        Case(
            id="gpt2-d_model-head_dim",
            make=_pair(build, small, {"n_embd": 6, "n_inner": 10}),
            cuts={
                "*.c_attn.weight": {1: equal(6, 2, 3)},
                "*.c_attn.bias": {0: equal(6, 2, 3)},
                "*.attn.c_proj.weight": {0: equal(2, 2, 3)},
            },
            layouts={},
            **shared,
        ),
        Case(
            id="gpt2-d_model-heads-declared",
            make=_pair(build, small, {"n_embd": 8, "n_head": 4, "n_inner": 10, "n_layer": 3}),
            layers={"transformer.h": "last"},
            depth={"transformer.h": (1, 2)},
            cuts=fused,
            layouts={"*.c_attn.*": 3},
            **shared,
        ),
    ]


def _llamas() -> list[Case]:
    small = {
        "hidden_size": 4,
        "intermediate_size": 6,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 2,
        "max_position_embeddings": 8,
    }
    even = {**small, "hidden_size": 8}  # Llama wants it to be a multiple of the number of heads
    llama = _hugging_face("LlamaForCausalLM", "LlamaConfig", _IDS)
    qwen = _hugging_face("Qwen3ForCausalLM", "Qwen3Config", {**_IDS, "tie_word_embeddings": True})
    phi = _hugging_face("Phi3ForCausalLM", "Phi3Config", _IDS)
    neox = _hugging_face("GPTNeoXForCausalLM", "GPTNeoXConfig", {**_IDS, "max_position_embeddings": 8})
    wider = {"num_attention_heads": 8, "num_key_value_heads": 4, "intermediate_size": 10}
    shared: dict[str, Any] = {"inputs": prompt, "target": "tokens"}
    return [
        Case(
            id="llama_gqa-width-heads",
            width_only=True,
            make=_pair(llama, even, wider),
            mixed="model.layers",
            **shared,
        ),
        Case(
            id="llama_gqa-groups",
            width_only=True,
            make=_pair(llama, even, {"num_attention_heads": 8}),
            cuts={
                "*.q_proj.weight": {0: equal(2, 4, 8)},
                "*.o_proj.weight": {1: equal(2, 4, 8)},
            },
            layouts={},
            mixed="model.layers",
            **shared,
        ),
        Case(
            id="llama_gqa-head_dim",
            make=_pair(llama, small, {"head_dim": 4}),
            cuts={
                "*.q_proj.weight": {0: equal(4, 2, 4)},
                "*.[kv]_proj.weight": {0: equal(2, 2, 4)},
                "*.o_proj.weight": {1: equal(4, 2, 4)},
            },
            layouts={},
            **shared,
        ),
        Case(
            id="llama_gqa-d_model-heads-depth",
            make=_pair(llama, even, {**wider, "hidden_size": 16, "num_hidden_layers": 3}),
            layers={"model.layers": "first"},
            depth={"model.layers": (0, 1)},
            **shared,
        ),
        Case(
            id="qwen3-width-depth",
            make=_pair(qwen, small, {"intermediate_size": 10, "num_hidden_layers": 3}),
            layers={"model.layers": "ends"},
            depth={"model.layers": (0, 2)},
            mixed="model.layers",
            **shared,
        ),
        Case(id="qwen3-d_model-heads", make=_pair(qwen, small, {**wider, "hidden_size": 6}), **shared),
        Case(
            id="phi3-heads-width",
            width_only=True,
            make=_pair(phi, small, wider),
            cuts={
                "*.qkv_proj.weight": {0: ((8, 16), (4, 8), (4, 8))},
                "*.gate_up_proj.weight": {0: equal(2, 6, 10)},
            },
            layouts={},
            mixed="model.layers",
            **shared,
        ),
        Case(
            id="gpt_neox-d_model-head_dim-depth",
            make=_pair(
                neox,
                {"hidden_size": 4, "intermediate_size": 6, "num_hidden_layers": 2, "num_attention_heads": 2},
                {"hidden_size": 8, "intermediate_size": 10, "num_hidden_layers": 3},
            ),
            layers={"gpt_neox.layers": "first"},
            depth={"gpt_neox.layers": (0, 1)},
            cuts={
                "*.query_key_value.*": {0: equal(6, 2, 4)},
                "*.attention.dense.weight": {1: equal(2, 2, 4)},
            },
            layouts={},
            **shared,
        ),
    ]


def _encoders() -> list[Case]:
    small = {"hidden_size": 4, "intermediate_size": 6, "num_hidden_layers": 2, "num_attention_heads": 2}
    off = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "num_labels": CLASSES}
    bert = _hugging_face("BertForSequenceClassification", "BertConfig", {**_IDS, **off, "max_position_embeddings": 8})
    vit = _hugging_face(
        "ViTForImageClassification",
        "ViTConfig",
        {**off, "image_size": 8, "patch_size": 4, "num_channels": 1},
    )
    deeper = {"intermediate_size": 10, "num_hidden_layers": 3}
    wider = {"hidden_size": 8, "num_attention_heads": 4, "intermediate_size": 10}
    return [
        Case(
            id="bert-width-depth",
            make=_pair(bert, small, deeper),
            inputs=prompt,
            layers={"bert.encoder.layer": "first"},
            depth={"bert.encoder.layer": (0, 1)},
            mixed="bert.encoder.layer",
        ),
        Case(id="bert-d_model-heads", make=_pair(bert, small, wider), inputs=prompt, soft=True),
        Case(
            id="hf_vit-width-depth",
            make=_pair(vit, small, deeper),
            inputs=pixels,
            layers={"vit.layers": "last"},
            depth={"vit.layers": (1, 2)},
            mixed="vit.layers",
        ),
        Case(id="hf_vit-d_model-heads", make=_pair(vit, small, wider), inputs=pixels, soft=True),
    ]


def _t5() -> list[Case]:
    build = _hugging_face(
        "T5ForConditionalGeneration",
        "T5Config",
        {**_IDS, "dropout_rate": 0.0, "decoder_start_token_id": 0, "relative_attention_num_buckets": 4},
    )
    small = {"d_model": 4, "d_kv": 2, "d_ff": 6, "num_layers": 2, "num_decoder_layers": 2, "num_heads": 2}
    lists = ("encoder.block", "decoder.block")
    shared: dict[str, Any] = {"inputs": prompt_and_answer, "target": "tokens"}
    return [
        Case(
            id="t5-width-depth",
            make=_pair(build, small, {"d_ff": 10, "num_layers": 4, "num_decoder_layers": 3}),
            layers={lists[0]: [0, 2], lists[1]: "first"},
            depth={lists[0]: (0, 2), lists[1]: (0, 1)},
            **shared,
        ),
        Case(
            id="t5-d_model-heads-depth",
            make=_pair(
                build,
                small,
                {"d_model": 6, "num_heads": 4, "d_ff": 10, "num_layers": 3, "num_decoder_layers": 3},
            ),
            layers=dict.fromkeys(lists, "first"),
            depth=dict.fromkeys(lists, (0, 1)),
            **shared,
        ),
        Case(
            id="t5-head_dim",
            make=_pair(build, small, {"d_kv": 3}),
            cuts={
                "*Attention.[qkv].weight": {0: equal(2, 2, 3)},
                "*Attention.o.weight": {1: equal(2, 2, 3)},
            },
            layouts={},
            **shared,
        ),
    ]


CASES: tuple[Case, ...] = (
    *_perceptrons(),
    *_rankers(),
    *_transformers_of_ours(),
    *_gated_and_routed(),
    *_torch_modules(),
    *_unheard_of(),
    *_gpt2(),
    *_llamas(),
    *_encoders(),
    *_t5(),
)
"""Every case of the matrix."""


def case(name: str) -> Case:
    """The case of that id."""
    return next(case for case in CASES if case.id == name)
