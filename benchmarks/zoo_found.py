"""Models that a search outside of the zoo found refused or failing, each for the kind that it stands for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from zoo_cases import Model
from zoo_handwritten import CLASSES, FEATURES, LENGTH, VOCABULARY
from zoo_transformers import both_tokens, sound, tokens, transformer

_SIZES = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "pad_token_id": 2,
}
_SOUND = {
    **_SIZES,
    "conv_dim": (8, 8),
    "conv_stride": (5, 2),
    "conv_kernel": (10, 3),
    "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2,
    "num_feat_extract_layers": 2,
}
_BART = {
    "vocab_size": 32,
    "d_model": 16,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 24,
    "max_position_embeddings": 32,
    "pad_token_id": 2,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
_XLM = {"vocab_size": 32, "emb_dim": 16, "n_layers": 2, "n_heads": 4, "max_position_embeddings": 32, "pad_index": 2}
_HIDDEN, _WIDER = {"hidden_size": 32}, {"d_model": 32}


def _transformers() -> list[Model]:
    kept = "hidden size, heads kept"
    glm = {**_SIZES, "num_key_value_heads": 2, "head_dim": 4, "partial_rotary_factor": 0.5}
    big = {**_BART, "attention_type": "block_sparse", "block_size": 2, "num_random_blocks": 1}
    convbert = {**_SIZES, "embedding_size": 8, "max_position_embeddings": 32}
    return [
        transformer("Glm4", "head_dim", glm, {"head_dim": 8}),
        transformer("Hubert", kept, _SOUND, _HIDDEN, kind="ForCTC", batch=sound()),
        transformer("WavLM", kept, _SOUND, _HIDDEN, kind="ForCTC", batch=sound()),
        transformer("Data2VecAudio", kept, _SOUND, _HIDDEN, kind="ForCTC", batch=sound()),
        transformer("Bart", kept, _BART, _WIDER),
        transformer("BigBirdPegasus", kept, big, _WIDER, kind="ForConditionalGeneration", batch=both_tokens),
        transformer("Flaubert", kept, _XLM, {"emb_dim": 32}, kind="WithLMHeadModel"),
        transformer("ConvBert", kept, convbert, _HIDDEN, kind="ForMaskedLM", batch=tokens),
    ]


def _random(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def _images() -> Any:
    return _random(2, 3, 8, 8), None


def _signals() -> Any:
    return _random(2, FEATURES, 12), None


def _lengths() -> Any:
    ids = torch.randint(0, VOCABULARY, (2, LENGTH), generator=torch.Generator().manual_seed(0))
    return {"ids": ids, "lengths": torch.tensor([3, LENGTH])}


class GroupedBottleneck(nn.Module):
    """ResNeXt: a convolution in groups between two others, norms in groups."""

    def __init__(self, width: int, groups: int) -> None:
        super().__init__()
        self.stem, self.down = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, width, 1)
        self.mix, self.norm = nn.Conv2d(width, width, 3, padding=1, groups=groups), nn.GroupNorm(groups, width)
        self.up, self.head = nn.Conv2d(width, 4, 1), nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head((x + self.up(self.norm(self.mix(self.down(x).relu())).relu())).mean((2, 3)))


class ShuffledUp(nn.Module):
    """A U-Net of one level that goes up by shuffling channels into pixels."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first, self.deep = nn.Conv2d(3, channels, 3, padding=1), nn.Conv2d(channels, 2 * channels, 3, padding=1)
        self.up, self.last = nn.Conv2d(2 * channels, 4 * channels, 1), nn.Conv2d(2 * channels, CLASSES, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).relu()
        deep = self.up(self.deep(F.max_pool2d(x, 2)).relu())
        return self.last(torch.cat([F.pixel_shuffle(deep, 2), x], 1))


class GatedDilations(nn.Module):
    """WaveNet: gates, and one convolution that makes the residual and the skip, cut apart by a number."""

    def __init__(self, residual: int, skip: int) -> None:
        super().__init__()
        self.residual, self.enter = residual, nn.Conv1d(FEATURES, residual, 1)
        self.gates = nn.ModuleList(nn.Conv1d(residual, 2 * residual, 2, dilation=2**i) for i in range(2))
        self.mixes = nn.ModuleList(nn.Conv1d(residual, residual + skip, 1) for _ in range(2))
        self.head = nn.Conv1d(skip, CLASSES, 1)

    def forward(self, x: Tensor) -> Tensor:
        x, total = self.enter(x), 0
        for gate, mix in zip(self.gates, self.mixes, strict=True):
            one, two = gate(F.pad(x, (gate.dilation[0], 0))).chunk(2, 1)
            made = mix(one.tanh() * two.sigmoid())
            x, total = x + made[:, : self.residual], total + made[:, self.residual :]
        return self.head(total)


class Packed(nn.Module):
    """A recurrent network over sequences of several lengths, packed."""

    def __init__(self, dim: int, width: int) -> None:
        super().__init__()
        self.words, self.run = nn.Embedding(VOCABULARY, dim), nn.GRU(dim, width, batch_first=True)
        self.head = nn.Linear(width, CLASSES)

    def forward(self, ids: Tensor, lengths: Tensor) -> Tensor:
        packed = pack_padded_sequence(self.words(ids), lengths, batch_first=True, enforce_sorted=False)
        states, last = self.run(packed)
        return self.head(pad_packed_sequence(states, batch_first=True)[0].sum(1) + last[-1])


class HeadsInTheBatch(nn.Module):
    """Attention with the heads beside the batch, in one view that splits and merges; a bias kept from the future."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads, self.enter = heads, nn.Linear(FEATURES, dim)
        self.qkv, self.out, self.head = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim), nn.Linear(dim, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x).transpose(0, 1)
        length, size, dim = x.shape
        q, k, v = self.qkv(x).chunk(3, -1)
        cut = length, size * self.heads, dim // self.heads
        q, k, v = (each.contiguous().view(cut).transpose(0, 1) for each in (q, k, v))
        later = torch.ones(length, length, dtype=torch.bool, device=x.device).triu(1)
        scores = (q @ k.mT / (dim // self.heads) ** 0.5).masked_fill_(later, float("-inf"))
        made = (scores.softmax(-1) @ v).transpose(0, 1).reshape(length, size, dim)
        return self.head(x + self.out(made)).transpose(0, 1)


def _model(name: str, grows: str, make: Callable[..., nn.Module], student: Any, ta: Any, batch: Any) -> Model:
    return Model(name=name, source="hand-written", grows=grows, make=make, student=student, ta=ta, batch=batch)


MODELS: tuple[Model, ...] = (
    *_transformers(),
    _model("ResNeXt", "channels, groups kept", GroupedBottleneck, {"width": 4, "groups": 2}, {"width": 8}, _images),
    _model("ResNeXt", "groups", GroupedBottleneck, {"width": 4, "groups": 2}, {"width": 8, "groups": 4}, _images),
    _model("U-Net, pixel shuffle", "channels", ShuffledUp, {"channels": 2}, {"channels": 3}, _images),
    _model(
        "WaveNet", "residual, skip", GatedDilations, {"residual": 4, "skip": 3}, {"residual": 7, "skip": 5}, _signals
    ),
    _model("Packed GRU", "embedding, width", Packed, {"dim": 3, "width": 4}, {"dim": 5, "width": 7}, _lengths),
    _model(
        "Heads in the batch",
        "hidden size, heads kept",
        HeadsInTheBatch,
        {"dim": 8, "heads": 2},
        {"dim": 16},
        lambda: (_random(2, LENGTH, FEATURES), None),
    ),
)
"""Every model that was found outside of the zoo."""
