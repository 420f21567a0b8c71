"""Models of other packages in the zoo; those whose package is not installed are left out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from zoo_cases import Model

VOCABULARY, LENGTH, CLASSES = 32, 8, 3


def _random(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def _ids() -> Tensor:
    return torch.randint(0, VOCABULARY, (2, LENGTH), generator=torch.Generator().manual_seed(0))


def _batch(*inputs: Callable[[], Any]) -> Callable[[], Any]:
    return lambda: (tuple(each() for each in inputs), None)


class _Pooled(nn.Module):
    """A body that returns a sequence, between a first layer and a head over its mean."""

    def __init__(self, body: nn.Module, dim: int) -> None:
        super().__init__()
        self.enter, self.body, self.head = nn.Linear(5, dim), body, nn.Linear(dim, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(self.enter(x)).mean(1))


def _from(module: str, build: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    return lambda **sizes: build(import_module(module), **sizes)


def _decoder(x: Any, *, dim: int, heads: int = 2, depth: int = 2, **more: Any) -> nn.Module:
    layers = x.Decoder(dim=dim, depth=depth, heads=heads, attn_dim_head=4, **more)
    wrapper: nn.Module = x.TransformerWrapper(num_tokens=VOCABULARY, max_seq_len=LENGTH, attn_layers=layers)
    return wrapper


def _encoder(x: Any, *, dim: int, heads: int = 2, **more: Any) -> nn.Module:
    layers = x.Encoder(dim=dim, depth=2, heads=heads, attn_dim_head=4, **more)
    wrapper: nn.Module = x.TransformerWrapper(num_tokens=VOCABULARY, max_seq_len=LENGTH, attn_layers=layers)
    return wrapper


def _image_encoder(x: Any, *, dim: int, heads: int = 2) -> nn.Module:
    layers = x.Encoder(dim=dim, depth=2, heads=heads, attn_dim_head=4)
    wrapper: nn.Module = x.ViTransformerWrapper(image_size=8, patch_size=4, num_classes=CLASSES, attn_layers=layers)
    return wrapper


def _continuous(x: Any, *, dim: int, heads: int = 2) -> nn.Module:
    layers = x.Encoder(dim=dim, depth=2, heads=heads, attn_dim_head=4, ff_glu=True, use_rmsnorm=True)
    wrapper: nn.Module = x.ContinuousTransformerWrapper(
        dim_in=5, dim_out=CLASSES, max_seq_len=LENGTH, attn_layers=layers
    )
    return wrapper


class _Kind(NamedTuple):
    name: str
    package: str
    grows: str
    build: Callable[..., nn.Module]
    student: Mapping[str, Any]
    ta: Mapping[str, Any]
    batch: Callable[[], Any]


def _kinds() -> list[_Kind]:
    ids, features, images = _batch(_ids), _batch(lambda: _random(2, LENGTH, 5)), _batch(lambda: _random(2, 3, 8, 8))
    wide, more_heads = {"dim": 16}, {"dim": 16, "heads": 4}
    hidden = {"dim": 8}
    x = "x_transformers"
    return [
        _Kind("x_transformers decoder", x, "hidden size, heads", _from(x, _decoder), hidden, more_heads, ids),
        _Kind(
            "x_transformers rotary, GLU, RMSNorm",
            x,
            "hidden size, heads",
            _from(
                x, lambda m, **s: _decoder(m, rotary_pos_emb=True, rotary_emb_dim=4, ff_glu=True, use_rmsnorm=True, **s)
            ),
            hidden,
            more_heads,
            ids,
        ),
        _Kind(
            "x_transformers one key head, ALiBi",
            x,
            "hidden size",
            _from(x, lambda m, **s: _decoder(m, attn_one_kv_head=True, alibi_pos_bias=True, **s)),
            hidden,
            wide,
            ids,
        ),
        _Kind(
            "x_transformers grouped queries",
            x,
            "hidden size, T5 bias",
            _from(x, lambda m, **s: _decoder(m, attn_kv_heads=1, rel_pos_bias=True, **s)),
            hidden,
            wide,
            ids,
        ),
        _Kind(
            "x_transformers encoder, QK norm",
            x,
            "hidden size",
            _from(x, lambda m, **s: _encoder(m, attn_qk_norm=True, **s)),
            hidden,
            wide,
            ids,
        ),
        _Kind("x_transformers ViT", x, "hidden size, heads", _from(x, _image_encoder), hidden, more_heads, images),
        _Kind("x_transformers of numbers", x, "hidden size", _from(x, _continuous), hidden, wide, features),
        _Kind(
            "conformer",
            "conformer",
            "hidden size",
            _from("conformer", lambda m, *, dim: _Pooled(m.Conformer(dim, depth=1, dim_head=4, heads=2), dim)),
            hidden,
            wide,
            features,
        ),
        _Kind(
            "conformer, width",
            "conformer",
            "expansion",
            _from(
                "conformer",
                lambda m, *, factor: _Pooled(
                    m.Conformer(8, depth=2, dim_head=4, heads=2, ff_mult=factor, conv_expansion_factor=factor), 8
                ),
            ),
            {"factor": 2},
            {"factor": 4},
            features,
        ),
        _Kind(
            "Linformer",
            "linformer",
            "hidden size, heads",
            _from(
                "linformer",
                lambda m, *, dim, heads=2: m.LinformerLM(
                    num_tokens=VOCABULARY, dim=dim, seq_len=LENGTH, depth=2, heads=heads, k=4
                ),
            ),
            hidden,
            more_heads,
            ids,
        ),
        _Kind(
            "MLP-Mixer",
            "mlp_mixer_pytorch",
            "hidden size",
            _from(
                "mlp_mixer_pytorch",
                lambda m, *, dim: m.MLPMixer(
                    image_size=8, channels=3, patch_size=4, dim=dim, depth=2, num_classes=CLASSES
                ),
            ),
            hidden,
            wide,
            images,
        ),
        _Kind(
            "gMLP",
            "g_mlp_pytorch",
            "hidden size",
            _from(
                "g_mlp_pytorch",
                lambda m, *, dim: m.gMLP(num_tokens=VOCABULARY, dim=dim, depth=2, seq_len=LENGTH, ff_mult=2),
            ),
            hidden,
            wide,
            ids,
        ),
        _Kind(
            "Perceiver IO",
            "perceiver_pytorch",
            "latents, heads kept",
            _from(
                "perceiver_pytorch.perceiver_io",
                lambda m, *, dim: m.PerceiverLM(
                    num_tokens=VOCABULARY,
                    dim=8,
                    max_seq_len=LENGTH,
                    depth=1,
                    num_latents=4,
                    latent_dim=dim,
                    cross_heads=1,
                    latent_heads=2,
                    cross_dim_head=4,
                    latent_dim_head=4,
                ),
            ),
            hidden,
            wide,
            ids,
        ),
        _Kind(
            "Local attention",
            "local_attention",
            "hidden size, heads",
            _from(
                "local_attention",
                lambda m, *, dim, heads=2: m.LocalTransformer(
                    num_tokens=VOCABULARY,
                    max_seq_len=LENGTH,
                    dim=dim,
                    depth=2,
                    dim_head=4,
                    heads=heads,
                    local_attn_window_size=4,
                ),
            ),
            hidden,
            more_heads,
            ids,
        ),
        _Kind(
            "FT-Transformer",
            "rtdl_revisiting_models",
            "hidden size, heads kept",
            _from(
                "rtdl_revisiting_models",
                lambda m, *, dim: m.FTTransformer(
                    n_cont_features=4,
                    cat_cardinalities=[3, 5],
                    d_out=CLASSES,
                    n_blocks=2,
                    d_block=dim,
                    attention_n_heads=2,
                    attention_dropout=0.0,
                    ffn_d_hidden=None,
                    ffn_d_hidden_multiplier=2,
                    ffn_dropout=0.0,
                    residual_dropout=0.0,
                ),
            ),
            hidden,
            wide,
            _batch(lambda: _random(4, 4), lambda: torch.tensor([[0, 1], [2, 4], [1, 0], [0, 3]])),
        ),
        _Kind(
            "ResNet of tables",
            "rtdl_revisiting_models",
            "hidden size",
            _from(
                "rtdl_revisiting_models",
                lambda m, *, dim: m.ResNet(
                    d_in=4,
                    d_out=CLASSES,
                    n_blocks=2,
                    d_block=dim,
                    d_hidden=None,
                    d_hidden_multiplier=2.0,
                    dropout1=0.0,
                    dropout2=0.0,
                ),
            ),
            hidden,
            wide,
            _batch(lambda: _random(4, 4)),
        ),
        _Kind(
            "TCN",
            "pytorch_tcn",
            "channels",
            _from(
                "pytorch_tcn",
                lambda m, *, dim: m.TCN(
                    num_inputs=5, num_channels=[dim, dim], kernel_size=3, output_projection=CLASSES
                ),
            ),
            hidden,
            wide,
            _batch(lambda: _random(2, 5, LENGTH)),
        ),
        _Kind(
            "Mamba",
            "mambapy",
            "hidden size",
            _from(
                "mambapy.mamba",
                lambda m, *, dim: _Pooled(m.Mamba(m.MambaConfig(d_model=dim, n_layers=2, d_state=4, dt_rank=2)), dim),
            ),
            hidden,
            wide,
            features,
        ),
        _Kind(
            "Mamba, expansion",
            "mambapy",
            "inner width",
            _from(
                "mambapy.mamba",
                lambda m, *, factor: _Pooled(
                    m.Mamba(m.MambaConfig(d_model=8, n_layers=2, d_state=4, dt_rank=2, expand_factor=factor)), 8
                ),
            ),
            {"factor": 2},
            {"factor": 3},
            features,
        ),
    ]


MODELS: tuple[Model, ...] = tuple(
    Model(
        name=kind.name,
        source=kind.package.replace("_", "-"),
        grows=kind.grows,
        make=kind.build,
        student=kind.student,
        ta=kind.ta,
        batch=kind.batch,
    )
    for kind in _kinds()
    if find_spec(kind.package) is not None
)
"""Every model of another package in the zoo."""
