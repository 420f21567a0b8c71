"""The models of the case studies: embeddings, hidden layers, one logit; of tuples of ids, or of events."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Final, Literal, final

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from matta.nesting.layout import Layout
from matta.nesting.nested import Nested, nest
from matta_studies.event_streams import EventStream

WarmStart = bool | Literal["ta"]
"""What `matta.nest` starts from."""

EVEN_WIDTH: Final = 32  # hidden units of a layer whose output an even pace leaves as it is


@final
@dataclass(frozen=True, kw_only=True)
class RankerSize:
    """Widths of a ranker. The TA of a Student is `grown()`: hidden layers 4x, embeddings 2x as wide.

    With `blocks`, `hidden` is (width, inner width) of that many residual blocks, and the width does not grow.

    Example:
        >>> RankerSize(embedding=8, hidden=(32, 16)).grown()
        RankerSize(embedding=16, hidden=(128, 64), blocks=0)
        >>> str(_)
        '128-64, embeddings 16'
    """

    embedding: int
    hidden: tuple[int, ...]
    blocks: int = 0

    def __str__(self) -> str:
        return f"{'-'.join(map(str, self.hidden))}, embeddings {self.embedding}"

    def grown(self, hidden: float = 4, embedding: float = 2, blocks: int = 0) -> RankerSize:
        """The size of a Teaching Assistant: factors of the widths, and how many blocks more it has."""
        first, *others = self.hidden
        kept = (first,) if self.blocks else (int(hidden * first),)
        return RankerSize(
            embedding=int(embedding * self.embedding),
            hidden=(*kept, *(int(hidden * width) for width in others)),
            blocks=self.blocks + blocks,
        )

    def network(self, inputs: int, activation: Callable[[int], nn.Module] = lambda width: nn.ReLU()) -> nn.Module:
        """The hidden layers and the logit, over `inputs` features."""
        if self.blocks:
            width, inner = self.hidden
            return ResidualTower(inputs, width=width, inner=inner, num_blocks=self.blocks)
        widths = (inputs, *self.hidden)
        hidden = [layer for pair in pairwise(widths) for layer in (nn.Linear(*pair), activation(pair[1]))]
        return nn.Sequential(*hidden, nn.Linear(widths[-1], 1))


@final
class ResidualBlock(nn.Module):
    """x + B·relu(A·x): what grows in a TA is the inner width, as in the FFN of a Transformer."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.widen = nn.Linear(width, inner)
        self.narrow = nn.Linear(inner, width)

    def forward(self, values: Float[Tensor, "batch width"]) -> Float[Tensor, "batch width"]:
        return values + self.narrow(self.widen(values).relu())


@final
class ResidualTower(nn.Module):
    """Features to one logit through residual blocks; a TA may have more of them, and wider ones (3.2.2).

    Example:
        >>> ResidualTower(5, width=4, inner=8, num_blocks=2)(torch.zeros(3, 5)).shape
        torch.Size([3, 1])
    """

    def __init__(self, inputs: int, *, width: int, inner: int, num_blocks: int) -> None:
        super().__init__()
        self.entrance = nn.Linear(inputs, width)
        self.blocks = nn.ModuleList(ResidualBlock(width, inner) for _ in range(num_blocks))
        self.head = nn.Linear(width, 1)

    def forward(self, values: Float[Tensor, "batch inputs"]) -> Float[Tensor, "batch one"]:
        values = self.entrance(values)
        for block in self.blocks:
            values = block(values)
        return self.head(values)


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
        self.mlp = size.network(len(num_rows) * size.embedding)

    def forward(self, ids: Int[Tensor, "batch tables"]) -> Float[Tensor, " batch"]:
        rows = [table(ids[:, column]) for column, table in enumerate(self.tables)]
        return self.mlp(torch.cat(rows, dim=-1)).squeeze(-1)


@final
class PacedReLU(nn.Module):
    """ReLU, times a factor that gives layers of all widths the same pace.

    Steps of Adagrad and Adam are as long for each weight, so that a layer's output moves by the rate times the
    number of its inputs: a TA four times as wide runs four times as fast as the Student in it, and no rate suits
    both. Inputs divided by their number make up for it.
    """

    def __init__(self, width: int, *, even: bool) -> None:
        super().__init__()
        self.factor = EVEN_WIDTH / width if even else 1.0

    def forward(self, values: Float[Tensor, "batch width"]) -> Float[Tensor, "batch width"]:
        return values.relu() * self.factor


@final
class EventModel(nn.Module):
    """One logit for each event of a stream: embeddings of its categories, its numbers, an MLP."""

    def __init__(self, stream: EventStream, size: RankerSize, *, even_pace: bool) -> None:
        super().__init__()
        self.size = size
        self.columns, self.numbers = stream.ids.shape[1], stream.numbers.shape[1]
        self.table = nn.Embedding(stream.num_rows, size.embedding)
        nn.init.normal_(self.table.weight, std=0.05)
        inputs = self.columns * size.embedding + self.numbers
        self.mlp = size.network(inputs, lambda width: PacedReLU(width, even=even_pace))

    def forward(
        self, ids: Int[Tensor, "batch columns"], numbers: Float[Tensor, "batch numbers"]
    ) -> Float[Tensor, " batch"]:
        return self.mlp(torch.cat([self.table(ids).flatten(1), numbers], dim=1)).squeeze(-1)


def nest_rankers(
    students: Sequence[Ranker] | Sequence[EventModel],
    ta: Ranker | EventModel,
    share: str = "all",
    place: str = "first",
    *,
    warm_start: WarmStart = False,
) -> Nested:
    """Nest rankers, or models of events; the first layer's input is one embedding after the other, then the numbers.

    `place` says which of the TA's residual blocks hold the Student's, if there are any.

    Example:
        >>> size = RankerSize(embedding=2, hidden=(4, 3))
        >>> nested = nest_rankers([Ranker((5, 6), size)], Ranker((5, 6), size.grown()))
        >>> import matta
        >>> matta.layer_names(nested)
        ('tables.0', 'mlp.0', 'mlp.2')
    """
    if share != "all":
        return nest(students, ta, share=share)
    first = "mlp.entrance.weight" if ta.size.blocks else "mlp.0.weight"
    layers = {"mlp.blocks": place} if ta.size.blocks else None
    inputs = _inputs(students[0].size.embedding, ta)
    return nest(students, ta, layouts={first: inputs} if inputs else None, layers=layers, warm_start=warm_start)


def _inputs(embedding: int, ta: Ranker | EventModel) -> Layout | None:
    """The features as the first layer sees them; None: as many in the Student as in the TA, or nothing to tell."""
    if isinstance(ta, Ranker):
        return Layout.equal(len(ta.tables), axis=1)
    if embedding == ta.size.embedding:
        return None
    sizes = [(embedding, ta.size.embedding)] * ta.columns + [(ta.numbers, ta.numbers)]
    return Layout.concat(sizes, axis=1)
