"""A small decoder for the benchmarks: pre-norm blocks, learned positions, head tied to the embedding."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F


class Block(nn.Module):
    def __init__(self, width: int, hidden: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.attention_norm, self.hidden_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, stream: Tensor) -> Tensor:
        normed = self.attention_norm(stream)
        query, key, value = (
            layer(normed).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        stream = stream + self.out(mixed.transpose(1, 2).flatten(2))
        return stream + self.down(F.gelu(self.up(self.hidden_norm(stream))))


class TinyGPT(nn.Module):
    def __init__(
        self,
        *,
        num_layers: int = 4,
        width: int = 256,
        hidden: int = 1024,
        num_heads: int = 4,
        vocabulary: int = 512,
        context: int = 128,
    ) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocabulary, width), nn.Embedding(context, width)
        self.h = nn.ModuleList(Block(width, hidden, num_heads) for _ in range(num_layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.tokens.weight
        self.apply(_initialise)

    def forward(self, ids: Tensor) -> Tensor:
        stream = self.tokens(ids) + self.positions.weight[: ids.shape[1]]
        for block in self.h:
            stream = block(stream)
        return self.head(self.norm(stream))


def next_token_loss(model: nn.Module, ids: Tensor) -> Tensor:
    """Cross-entropy of the next token, in nats."""
    return F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)
