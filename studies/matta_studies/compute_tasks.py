"""What the study of equal compute trains: a film ranker, or a model of flights, in eight sizes (text: `compute_text`).

A size is a word of three letters, one for each layer that a sub-model chooses: "n" is narrow, the Student's width, and
"w" is wide, the TA's.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Final, TypeVar, final

import torch
from rich.console import Console
from torch import Tensor, nn

from matta.nesting.batches import Batch
from matta.nesting.nested import Nested
from matta.objectives import Binary, Objective
from matta.sizes.submodels import SubModel, layer_names
from matta_studies.event_streams import EventStream, load_flights, load_stream, save_stream
from matta_studies.labelled_films import RelevanceData, TupleSettings
from matta_studies.rankers import EventModel, Ranker, RankerSize, WarmStart, nest_rankers
from matta_studies.relevance import DATA_FILE, copy_data, read_data, tuples_loss
from matta_studies.relevance_plan import STUDENT_SIZE
from matta_studies.trials import auc_loss

SIZES: Final = tuple("".join(each) for each in product("nw", repeat=3))
NARROWEST, WIDEST = SIZES[0], SIZES[-1]
PRUNING_EXAMPLES: Final = 8192  # whose activations say what matters; of text: tokens
FLIGHTS_FILE: Final = "flights.safetensors"
HELD_OUT_FLIGHTS: Final = 40_000  # for validation, and as many for the test
NORMALISED_BY: Final = 256  # flights: numbers are normalised by the batches of this size before


class Task(ABC):
    """Data, models of each size, and how they are judged.

    Rates rise over the first `warm_up` share of the steps. So many `pruning_rows` of the data say what matters.
    """

    objective: Objective
    num_examples: int
    warm_up: float = 0.0
    pruning_rows: int = PRUNING_EXAMPLES

    @abstractmethod
    def build(self, size: str) -> nn.Module:
        """A fresh model."""

    @abstractmethod
    def nested(self, student: nn.Module, *, ta: nn.Module | None = None, warm_start: WarmStart = False) -> Nested:
        """A Student in a TA, which is fresh if none is given."""

    @abstractmethod
    def batches(self, batch: int, generator: torch.Generator) -> Iterator[Batch]:
        """Batches without end."""

    @abstractmethod
    def losses(self, module: nn.Module) -> dict[str, float]:
        """The loss on the validation part and on the test part."""

    @abstractmethod
    def pruned(self, ta: nn.Module, size: str) -> nn.Module:
        """The part of a trained TA that matters most (Minitron: Muralidharan et al., 2024).

        The importance of a unit is its mean absolute activation on some examples, times the length of the weights
        that read it.
        """

    @abstractmethod
    def widths(self, size: str) -> str:
        """A size in words."""

    @abstractmethod
    def limited(self, num_examples: int) -> Task:
        """The task with the first examples of the training part alone."""


def spec_of(nested: Nested, size: str) -> SubModel:
    """The sub-model of a size."""
    choices = ("wide" if letter == "w" else "narrow" for letter in size)
    return SubModel(dict(zip(layer_names(nested), choices, strict=True)))


def important(values: Tensor, reading: Tensor, count: int) -> Tensor:
    """The indices of the units that matter most, in order: `values` (examples, units), `reading` (readers, units).

    Example:
        >>> important(torch.tensor([[1.0, -3.0, 2.0]]), torch.tensor([[1.0, 1.0, 0.1]]), 2)
        tensor([0, 1])
    """
    return (values.abs().mean(0) * reading.norm(dim=0)).topk(count).indices.sort().values


def ranker_size(size: str, student: RankerSize) -> RankerSize:
    """The widths of a ranker: embeddings and two hidden layers, each narrow or wide.

    Example:
        >>> str(ranker_size("nnw", STUDENT_SIZE)), str(ranker_size("www", STUDENT_SIZE))
        ('32-64, embeddings 8', '128-64, embeddings 16')
    """
    ta = student.grown()
    narrow, wide = (student.embedding, *student.hidden), (ta.embedding, *ta.hidden)
    first, *others = (
        large if letter == "w" else small for letter, small, large in zip(size, narrow, wide, strict=True)
    )
    return RankerSize(embedding=first, hidden=tuple(others))


def shuffled_rows(num_examples: int, batch: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Rows without end: every one once in each pass, the rest of a pass that fills no batch left out."""
    batch = min(batch, num_examples)
    while True:
        order = torch.randperm(num_examples, generator=generator)
        yield from order[: num_examples // batch * batch].split(batch)


ModuleT = TypeVar("ModuleT", bound=nn.Module)


def _modules(model: nn.Module, kind: type[ModuleT]) -> list[ModuleT]:
    return [each for each in model.modules() if isinstance(each, kind)]


@torch.no_grad()
def prune_ranker(ta: nn.Module, made: nn.Module, features: Tensor, columns: Sequence[Tensor]) -> None:
    """Put the part of a ranker's MLP that matters most into a smaller one.

    Args:
        ta: Three linear layers, the larger ones.
        made: The smaller ones.
        features: What the first layer sees of some examples.
        columns: Which of them are kept, group by group.
    """
    first, second, last = _modules(ta, nn.Linear)
    own = _modules(made, nn.Linear)
    hidden = first(features).relu()
    counts = [each.out_features for each in own[:2]]
    units = important(hidden, second.weight, counts[0]), important(second(hidden).relu(), last.weight, counts[1])
    taken = ((units[0], torch.cat(list(columns))), (units[1], units[0]), (torch.arange(1), units[1]))
    for layer, small, (outputs, read) in zip((first, second, last), own, taken, strict=True):
        small.weight.copy_(layer.weight[outputs][:, read])
        small.bias.copy_(layer.bias[outputs])


@final
class Films(Task):
    """The tuples of the relevance study, softly labelled."""

    def __init__(self, data: RelevanceData, student: RankerSize = STUDENT_SIZE) -> None:
        self.data, self.student = data, student
        self.objective, self.num_examples = Binary(), len(data.train)

    def build(self, size: str) -> Ranker:
        return Ranker(self.data.num_rows, ranker_size(size, self.student))

    def nested(self, student: nn.Module, *, ta: nn.Module | None = None, warm_start: WarmStart = False) -> Nested:
        ta = ta or self.build(WIDEST)
        assert isinstance(student, Ranker) and isinstance(ta, Ranker)
        return nest_rankers([student], ta, warm_start=warm_start)

    def batches(self, batch: int, generator: torch.Generator) -> Iterator[Batch]:
        train = self.data.train
        return ((train.ids[rows], train.label[rows]) for rows in shuffled_rows(len(train), batch, generator))

    def losses(self, module: nn.Module) -> dict[str, float]:
        return {part: tuples_loss(module, getattr(self.data, part)) for part in ("validation", "test")}

    @torch.no_grad()
    def pruned(self, ta: nn.Module, size: str) -> Ranker:
        made = self.build(size)
        ids, (first, *_) = self.data.train.ids[:PRUNING_EXAMPLES], _modules(ta, nn.Linear)
        columns, offset, features = [], 0, []
        for table, small, column in zip(
            _modules(ta, nn.Embedding), _modules(made, nn.Embedding), ids.unbind(1), strict=True
        ):
            width = table.embedding_dim
            features.append(table(column))
            kept = important(features[-1], first.weight[:, offset : offset + width], small.embedding_dim)
            small.weight.copy_(table.weight[:, kept])
            columns.append(offset + kept)
            offset += width
        prune_ranker(ta, made, torch.cat(features, dim=1), columns)
        return made

    def widths(self, size: str) -> str:
        return _ranker_widths(ranker_size(size, self.student))

    def limited(self, num_examples: int) -> Films:
        return Films(replace(self.data, train=self.data.train.take(slice(num_examples))), self.student)


def _ranker_widths(size: RankerSize) -> str:
    return f"{size.embedding}, {'-'.join(map(str, size.hidden))}"


@final
class Flights(Task):
    """The flights of the quality study, in no order: late or not."""

    def __init__(self, stream: EventStream, student: RankerSize = STUDENT_SIZE) -> None:
        held_out = min(HELD_OUT_FLIGHTS, len(stream) // 4)
        order = torch.randperm(len(stream), generator=torch.Generator().manual_seed(0))
        self.stream, self.student = stream, student
        self.validation, self.test, self.train = order.split([held_out, held_out, len(order) - 2 * held_out])
        self.objective, self.num_examples = Binary(), len(self.train)

    def build(self, size: str) -> EventModel:
        return EventModel(self.stream, ranker_size(size, self.student), even_pace=False)

    def nested(self, student: nn.Module, *, ta: nn.Module | None = None, warm_start: WarmStart = False) -> Nested:
        ta = ta or self.build(WIDEST)
        assert isinstance(student, EventModel) and isinstance(ta, EventModel)
        return nest_rankers([student], ta, warm_start=warm_start)

    def batches(self, batch: int, generator: torch.Generator) -> Iterator[Batch]:
        return (self._batch(self.train[rows]) for rows in shuffled_rows(self.num_examples, batch, generator))

    def _batch(self, rows: Tensor) -> tuple[tuple[Tensor, Tensor], Tensor]:
        return (self.stream.ids[rows], self.stream.numbers[rows]), self.stream.label[rows]

    @torch.no_grad()
    def losses(self, module: nn.Module) -> dict[str, float]:
        found = {}
        for name, rows in (("validation", self.validation), ("test", self.test)):
            inputs, labels = self._batch(rows)
            found[name] = auc_loss(module(*inputs), labels > 0.5)
        return found

    @torch.no_grad()
    def pruned(self, ta: nn.Module, size: str) -> EventModel:
        made = self.build(size)
        (ids, numbers), _ = self._batch(self.train[:PRUNING_EXAMPLES])
        (table,), (small,) = _modules(ta, nn.Embedding), _modules(made, nn.Embedding)
        first, *_ = _modules(ta, nn.Linear)
        rows, width = table(ids), table.embedding_dim
        num_columns = ids.shape[1]
        reading = first.weight[:, : num_columns * width].reshape(-1, width)  # all columns share the table
        kept = important(rows.reshape(-1, width), reading, small.embedding_dim)
        small.weight.copy_(table.weight[:, kept])
        columns = [column * width + kept for column in range(num_columns)]
        columns.append(torch.arange(num_columns * width, first.in_features))
        prune_ranker(ta, made, torch.cat([rows.flatten(1), numbers], dim=1), columns)
        return made

    def widths(self, size: str) -> str:
        return _ranker_widths(ranker_size(size, self.student))

    def limited(self, num_examples: int) -> Flights:
        made = Flights(self.stream, self.student)
        made.train = made.train[:num_examples]
        made.num_examples = len(made.train)
        return made


def prepare(name: str, tuples: TupleSettings, folder: Path, console: Console) -> str:
    """Put the data of a task into a folder; which they are, in a word."""
    if name == "films":
        return copy_data(tuples, folder, console)
    if name == "flights":
        save_stream(load_flights(NORMALISED_BY), folder / FLIGHTS_FILE)
        return "flights"
    from matta_studies.compute_text import write_topics  # needs Transformers

    return write_topics(folder)


def load_task(folder: Path) -> Task:
    """The task whose data `prepare` has put there."""
    if (folder / FLIGHTS_FILE).exists():
        return Flights(load_stream(folder / FLIGHTS_FILE))
    if (folder / DATA_FILE).exists():
        return Films(read_data(folder))
    from matta_studies.compute_text import load_topics  # needs Transformers

    return load_topics(folder)
