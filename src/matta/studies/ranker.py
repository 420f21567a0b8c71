"""The ranker of the relevance study: embeddings of user, film and year, an MLP, one logit."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import final

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from matta.layout import Layout
from matta.nesting import Nested, nest


@final
@dataclass(frozen=True, kw_only=True)
class RankerSize:
    """Widths of a ranker. The TA of a Student is `grown()`: hidden layers 4x, embeddings 2x as wide.

    Example:
        >>> RankerSize(embedding=8, hidden=(32, 16)).grown()
        RankerSize(embedding=16, hidden=(128, 64))
    """

    embedding: int
    hidden: tuple[int, ...]

    def grown(self) -> RankerSize:
        """The size of the Teaching Assistant."""
        return RankerSize(embedding=2 * self.embedding, hidden=tuple(4 * width for width in self.hidden))


@final
class Ranker(nn.Module):
    """One logit for each tuple of indices, one index into each table.

    Args:
        num_rows: Rows of each embedding table.
        size: Width of the embeddings and of the hidden layers.
    """

    def __init__(self, num_rows: tuple[int, ...], size: RankerSize) -> None:
        super().__init__()
        self.size = size
        tables = [nn.Embedding(rows, size.embedding) for rows in num_rows]
        for table in tables:
            nn.init.normal_(table.weight, std=0.1)
        self.tables = nn.ModuleList(tables)
        widths = (len(num_rows) * size.embedding, *size.hidden)
        hidden = [layer for pair in pairwise(widths) for layer in (nn.Linear(*pair), nn.ReLU())]
        self.mlp = nn.Sequential(*hidden, nn.Linear(widths[-1], 1))

    def forward(self, ids: Int[Tensor, "batch tables"]) -> Float[Tensor, " batch"]:
        rows = [table(ids[:, column]) for column, table in enumerate(self.tables)]
        return self.mlp(torch.cat(rows, dim=-1)).squeeze(-1)


def nest_rankers(student: Ranker, ta: Ranker, share: str = "all") -> Nested:
    """Nest two rankers; the first layer's input is one embedding after the other.

    Example:
        >>> size = RankerSize(embedding=2, hidden=(4, 3))
        >>> nested = nest_rankers(Ranker((5, 6), size), Ranker((5, 6), size.grown()))
        >>> import matta
        >>> matta.layer_names(nested)
        ('tables.0', 'mlp.0', 'mlp.2')
    """
    if share != "all":
        return nest(student, ta, share=share)
    inputs = Layout.equal(len(student.tables), axis=1)
    return nest(student, ta, layouts={"mlp.0.weight": inputs})
