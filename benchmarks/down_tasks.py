"""The work of `benchmarks/down.py`: a ranker of films, a small CNN on digits, a byte GPT.

The data of each come with a package.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from itertools import product
from pydoc_data import topics
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import matta
from matta.objectives import Objective

Sizes = tuple[int, ...]
CONTEXT = 32


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class Task:
    """What is trained, and how it is judged: `quality` is the held-out cross-entropy in nats, lower is better.

    `uneven` gives sizes of as many parameters whose blocks are not alike.
    """

    name: str
    build: Callable[[Sizes], nn.Module]
    objective: Objective
    train: Callable[[int, torch.Generator], Any]
    test: Any
    kept: tuple[str, ...]
    batch: int
    heads: Callable[[nn.Module], dict[nn.Module, int]]
    layouts: Callable[[Sizes, Sizes], dict[str, Any]]
    count: Callable[[Sizes], int]
    units: Sizes
    full: Sizes
    rate: float
    uneven: Callable[[Sizes], list[Sizes]] = lambda sizes: []

    def batches(self, seed: int) -> Iterator[Any]:
        """Batches without end."""
        generator = torch.Generator().manual_seed(seed)
        while True:
            yield self.train(self.batch, generator)

    def example(self) -> Any:
        """A batch of a few examples."""
        return self.train(4, torch.Generator().manual_seed(0))

    @torch.no_grad()
    def quality(self, module: nn.Module) -> float:
        """The held-out loss."""
        inputs, labels = self.test
        return float(self.objective.cross_entropy(module.eval()(*inputs), labels))

    def shapes(self, share: float, num: int) -> list[Sizes]:
        """So many sizes with about that share of the parameters, and not more: some dimensions wider, some narrower."""
        return _shapes(self, share)[:num]

    def scaled(self, ratios: tuple[float, ...]) -> Sizes:
        """The sizes at these shares of the full ones, in whole units."""
        parts = zip(self.full, ratios, self.units, strict=True)
        return tuple(max(unit, round(size * ratio / unit) * unit) for size, ratio, unit in parts)


def num_parameters(module: nn.Module) -> int:
    """Parameters, tied ones once."""
    return sum(parameter.numel() for parameter in module.parameters())


@cache
def _shapes(task: Task, share: float) -> list[Sizes]:
    ratios = [0.1 + 0.05 * step for step in range(19)]
    fitting = []
    most = task.count(task.full) * share
    for first, second in product(ratios, repeat=2):
        low, high = 0, 100  # percent of the third
        while high - low > 1:
            middle = (low + high) // 2
            fits = task.count(task.scaled((first, second, middle / 100))) <= most
            low, high = (middle, high) if fits else (low, middle)
        sizes = task.scaled((first, second, high / 100))
        sizes = sizes if task.count(sizes) <= most else task.scaled((first, second, low / 100))
        if 0.97 * most < task.count(sizes) <= most:
            fitting.append(sizes)
    return sorted(dict.fromkeys(fitting), key=lambda sizes: _unevenness(sizes, task.full))


def _unevenness(sizes: Sizes, full: Sizes) -> float:
    ratios = [size / whole for size, whole in zip(sizes, full, strict=True)]
    return max(ratios) - min(ratios)


def _no_heads(module: nn.Module) -> dict[nn.Module, int]:
    return {}


# --- a ranker -------------------------------------------------------------------------------------


class FilmRanker(nn.Module):
    """Embeddings of user and film, and an MLP; one logit."""

    def __init__(self, num_users: int, num_films: int, sizes: Sizes) -> None:
        super().__init__()
        embedding, first, second = sizes
        self.user, self.film = nn.Embedding(num_users, embedding), nn.Embedding(num_films, embedding)
        self.first, self.second = nn.Linear(2 * embedding, first), nn.Linear(first, second)
        self.logit = nn.Linear(second, 1)

    def forward(self, user: Tensor, film: Tensor) -> Tensor:
        joined = torch.cat([self.user(user), self.film(film)], dim=-1)
        return self.logit(F.relu(self.second(F.relu(self.first(joined))))).squeeze(-1)


def ranker() -> Task:
    """Who liked which film, from the ratings of the studies."""
    from matta_studies.labelled_films import load_ratings

    ratings = load_ratings()
    train, test = (~ratings.is_held_out).nonzero().flatten(), ratings.is_held_out.nonzero().flatten()

    def rows(index: Tensor) -> Any:
        return (ratings.user[index], ratings.film[index]), ratings.liked[index]

    return Task(
        name="ranker",
        build=lambda sizes: FilmRanker(ratings.num_users, ratings.num_films, sizes),
        count=lambda s: (
            (ratings.num_users + ratings.num_films) * s[0] + (2 * s[0] + 1) * s[1] + (s[1] + 1) * s[2] + s[2] + 1
        ),
        full=(16, 256, 128),
        units=(1, 4, 4),
        layouts=lambda small, large: {
            "first.weight": matta.Layout.concat([(small[0], large[0])] * 2, axis=1)
            | matta.Layout.concat([(small[1], large[1])]),
            "*": 1,
        },
        objective=matta.objectives.Binary(),
        train=lambda size, generator: rows(train[torch.randint(len(train), (size,), generator=generator)]),
        test=rows(test),
        kept=("logit",),
        batch=512,
        heads=_no_heads,
        rate=1e-3,
    )


# --- a convolutional network ------------------------------------------------------------------------


class DigitNetwork(nn.Module):
    """Two convolutions with batch norms, a hidden layer, ten classes; 8x8 images."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        first, second, hidden = sizes
        self.conv1, self.norm1 = nn.Conv2d(1, first, 3, padding=1), nn.BatchNorm2d(first)
        self.conv2, self.norm2 = nn.Conv2d(first, second, 3, padding=1), nn.BatchNorm2d(second)
        self.hidden, self.classes = nn.Linear(4 * second, hidden), nn.Linear(hidden, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.norm1(self.conv1(x))), 2)
        x = F.max_pool2d(F.relu(self.norm2(self.conv2(x))), 2)
        return self.classes(F.relu(self.hidden(x.flatten(1))))


def digits() -> Task:
    """Handwritten digits, 1,797 images of 8x8 that scikit-learn ships; every fifth is held out."""
    from sklearn.datasets import load_digits

    found = load_digits()
    images = torch.tensor(found.images, dtype=torch.float32)[:, None] / 16
    labels = torch.tensor(found.target)
    held_out = torch.arange(len(labels)) % 5 == 0
    train = (~held_out).nonzero().flatten()

    def draw(size: int, generator: torch.Generator) -> Any:
        index = train[torch.randint(len(train), (size,), generator=generator)]
        return (images[index],), labels[index]

    return Task(
        name="cnn",
        build=DigitNetwork,
        count=lambda s: 12 * s[0] + (9 * s[0] + 3) * s[1] + (4 * s[1] + 1) * s[2] + 10 * s[2] + 10,
        full=(16, 32, 64),
        units=(1, 1, 2),
        layouts=lambda small, large: {
            "hidden.weight": matta.Layout.factors([(small[1], large[1]), (4, 4)], axis=1)
            | matta.Layout.concat([(small[2], large[2])]),
            "*": 1,
        },
        objective=matta.objectives.Classification(),
        train=draw,
        test=((images[held_out],), labels[held_out]),
        kept=("classes",),
        batch=64,
        heads=_no_heads,
        rate=3e-3,
    )


# --- a language model -------------------------------------------------------------------------------


class ByteBlock(nn.Module):
    """A pre-norm block whose heads are 16 wide."""

    def __init__(self, width: int, hidden: int, num_heads: int) -> None:
        super().__init__()
        self.attention_norm, self.hidden_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query, self.key, self.value = (nn.Linear(width, 16 * num_heads) for _ in range(3))
        self.out = nn.Linear(16 * num_heads, width)
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, stream: Tensor) -> Tensor:
        normed = self.attention_norm(stream)
        query, key, value = (
            layer(normed).unflatten(-1, (-1, 16)).transpose(1, 2) for layer in (self.query, self.key, self.value)
        )
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        stream = stream + self.out(mixed.transpose(1, 2).flatten(2))
        return stream + self.down(F.gelu(self.up(self.hidden_norm(stream))))


class ByteModel(nn.Module):
    """A decoder over bytes, by its width, heads and hidden units, and how many units more the first block has."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        width, num_heads, hidden, *more = sizes
        units = [hidden + sum(more), hidden - sum(more)]
        self.tokens, self.positions = nn.Embedding(256, width), nn.Embedding(CONTEXT, width)
        self.blocks = nn.ModuleList(ByteBlock(width, each, num_heads) for each in units)
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 256, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        stream = self.tokens(ids) + self.positions(torch.arange(ids.shape[1]))
        for block in self.blocks:
            stream = block(stream)
        return self.head(self.norm(stream))


def byte_model() -> Task:
    """The next byte of CPython's help on topics; the last tenth is held out."""
    text = torch.tensor(list("\n".join(topics.topics[name] for name in sorted(topics.topics)).encode()))
    cut = len(text) * 9 // 10

    def rows(data: Tensor, starts: Tensor) -> Any:
        windows = data[starts[:, None] + torch.arange(CONTEXT + 1)]
        return (windows[:, :-1],), windows[:, 1:]

    def draw(size: int, generator: torch.Generator) -> Any:
        return rows(text[:cut], torch.randint(cut - CONTEXT - 1, (size,), generator=generator))

    return Task(
        name="gpt",
        build=ByteModel,
        count=lambda s: (
            (512 + CONTEXT + 2) * s[0]
            + 2 * (48 * s[1] * (s[0] + 1) + 16 * s[1] * s[0] + (2 * s[0] + 1) * s[2] + 6 * s[0])
        ),
        full=(64, 4, 256),
        units=(2, 1, 4),
        layouts=lambda small, large: {"*": 1},
        uneven=lambda s: [
            (*s, more) for more in range(-128, 129, 8) if s[2] + abs(more) <= 256 and s[2] > abs(more) > 0
        ],
        objective=matta.objectives.Classification(),
        train=draw,
        test=rows(text[cut:], torch.arange(0, len(text) - cut - CONTEXT - 1, 4 * CONTEXT)),
        kept=("head",),
        batch=16,
        heads=lambda module: {
            layer: layer.out_features // 16
            for block in module.blocks
            for layer in (block.query, block.key, block.value)
        },
        rate=3e-3,
    )
