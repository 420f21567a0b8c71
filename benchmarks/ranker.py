"""A small ranker for the benchmarks: embeddings of user and item, dense features, an MLP, one logit."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import matta

NUM_ROWS, NUM_DENSE = 1000, 8


class Ranker(nn.Module):
    """Logits of shape (batch) for ids (batch, 2) and dense features (batch, NUM_DENSE)."""

    def __init__(self, hidden: tuple[int, int] = (64, 32), embedding: int = 16) -> None:
        super().__init__()
        self.user, self.item = nn.Embedding(NUM_ROWS, embedding), nn.Embedding(NUM_ROWS, embedding)
        self.mlp = nn.Sequential(
            nn.Linear(2 * embedding + NUM_DENSE, hidden[0]),
            nn.ReLU(),
            nn.Linear(hidden[0], hidden[1]),
            nn.ReLU(),
            nn.Linear(hidden[1], 1),
        )

    def forward(self, ids: Tensor, dense: Tensor) -> Tensor:
        parts = [self.user(ids[:, 0]), self.item(ids[:, 1]), dense]
        return self.mlp(torch.cat(parts, dim=-1)).squeeze(-1)


def ranker_pair(seed: int = 0) -> tuple[Ranker, Ranker]:
    """Student MLP 64-32 and its TA: hidden layers 4x, embeddings 2x as wide."""
    torch.manual_seed(seed)
    return Ranker(), Ranker((256, 128), 32)


def nest_rankers(student: Ranker, ta: Ranker) -> matta.Nested:
    """The nesting of two rankers; the first layer's input is two embeddings and the dense features."""
    small, large = student.user.embedding_dim, ta.user.embedding_dim
    inputs = matta.Layout.concat([(small, large), (small, large), (NUM_DENSE, NUM_DENSE)], axis=1)
    return matta.nest(student, ta, layouts={"mlp.0.weight": inputs})


def ranker_batch(size: int = 512, seed: int = 1) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """Made events: inputs and 0/1 labels."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(NUM_ROWS, (size, 2), generator=generator)
    dense = torch.randn(size, NUM_DENSE, generator=generator)
    return (ids, dense), torch.randint(2, (size,), generator=generator).float()
