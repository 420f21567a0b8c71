"""Checked columns become tensors: ids of categories, and numbers normalised by running statistics."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, final
from zlib import crc32

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor

from matta.errors import RunError
from matta.streams.chunks import table_of
from matta.streams.row_checks import check
from matta.streams.schema import Categorical, Schema

CLIP: Final = 10.0


@final
class EventBatch(dict[str, Tensor]):
    """A batch of events, with their times beside it: float64 seconds since 1970, or None.

    Example:
        >>> batch = EventBatch(numeric=torch.zeros(2, 1), labels=torch.ones(2))
        >>> batch.times = torch.tensor([1.0, 2.0], dtype=torch.float64)
        >>> batch.to("cpu").times
        tensor([1., 2.], dtype=torch.float64)
    """

    times: Tensor | None = None

    def to(self, device: torch.device | str, non_blocking: bool = False) -> EventBatch:
        """The batch on a device; the times stay."""
        moved = EventBatch({name: each.to(device, non_blocking=non_blocking) for name, each in self.items()})
        moved.times = self.times
        return moved


@final
@dataclass(frozen=True, kw_only=True)
class Statistics:
    """Count, mean and sum of squared deviations of each column, of all values so far (Chan et al., 1979)."""

    count: NDArray[np.float64]
    mean: NDArray[np.float64]
    squares: NDArray[np.float64]

    @staticmethod
    def of_nothing(num_columns: int) -> Statistics:
        """The statistics of no rows."""
        return Statistics(count=np.zeros(num_columns), mean=np.zeros(num_columns), squares=np.zeros(num_columns))

    def with_rows(self, values: NDArray[np.float64], present: NDArray[np.bool_]) -> Statistics:
        """The statistics with some more rows, whose values are 0 where they are not present."""
        count = np.add.reduce(present, 0, dtype=np.float64)
        first = values[present.argmax(0), np.arange(values.shape[1])]
        shifted = (values - first) * present  # else the rounding of a constant's mean would pass for its deviation
        offset = np.add.reduce(shifted, 0) / np.maximum(count, 1)
        mean, deviations = first + offset, (shifted - offset) * present
        squares = np.einsum("ij,ij->j", deviations, deviations)
        total = np.maximum(self.count + count, 1)
        delta = (mean - self.mean) * (count > 0)
        return Statistics(
            count=self.count + count,
            mean=self.mean + delta * (count / total),
            squares=self.squares + squares + delta * delta * self.count * count / total,
        )

    def scale(self) -> NDArray[np.float64]:
        """One over the standard deviation; 0 where nothing is known yet."""
        deviation = np.sqrt(self.squares / np.maximum(self.count, 1))
        return np.divide(1.0, deviation, out=np.zeros_like(deviation), where=deviation > 0)


@final
class Encoder:
    """Schema, vocabularies and running statistics: what a server needs beside a module to predict events.

    Example:
        >>> from matta.streams import Categorical, Schema
        >>> encoder = Encoder(Schema(columns={"origin": Categorical(vocabulary=9)}, label="late"))
        >>> encoder.encode([{"origin": "JFK"}, {"origin": None}])["categorical"].tolist()
        [[1], [0]]
    """

    def __init__(self, schema: Schema) -> None:
        self.schema = schema
        names = [name for name, each in schema.categorical.items() if each.vocabulary is not None]
        self._vocabularies: dict[str, dict[str, int]] = {name: {} for name in names}
        self._statistics = Statistics.of_nothing(len(schema.numeric))
        self._optional = [index for index, each in enumerate(schema.numeric.values()) if not each.required]

    def ids(self, categories: Mapping[str, pa.Array], *, grow: bool) -> NDArray[np.int64]:
        """Ids of shape (rows, categorical columns); with `grow` new categories join the vocabularies."""
        columns = [
            self._column_ids(name, each, categories[name], grow=grow) for name, each in self.schema.categorical.items()
        ]
        return np.stack(columns, axis=1) if columns else np.zeros((0, 0), np.int64)

    def _column_ids(self, name: str, column: Categorical, text: pa.Array, *, grow: bool) -> NDArray[np.int64]:
        encoded = text.dictionary_encode()
        distinct = encoded.dictionary.to_pylist()
        if column.buckets is not None:
            known = [1 + crc32(each.encode()) % column.buckets for each in distinct]
        else:
            vocabulary = self._vocabularies[name]
            known = [vocabulary.get(each, 1) for each in distinct]
            if grow:
                room = column.num_ids - 2
                for index, each in enumerate(distinct):
                    if known[index] == 1 and len(vocabulary) < room:
                        known[index] = vocabulary[each] = len(vocabulary) + 2
        ids = np.array([*known, 0], np.int64)  # the last is that of a missing one
        return ids[encoded.indices.fill_null(len(known)).to_numpy(zero_copy_only=False)]

    def batch(
        self,
        ids: NDArray[np.int64],
        numbers: NDArray[np.float64],
        labels: NDArray[np.float64] | None,
        times: NDArray[np.float64] | None,
        *,
        learn: bool,
    ) -> EventBatch:
        """A batch, normalised by the statistics as of before it; with `learn` they then take it in."""
        made = None
        if numbers.shape[1]:
            values, present = _known(numbers)
            made = self._normalised(values, present, [self._statistics])
            if learn:
                self._statistics = self._statistics.with_rows(values, present)
        return self._assembled(ids, made, None if labels is None else labels.astype(self._label_type), times)

    def batches(
        self,
        ids: NDArray[np.int64],
        numbers: NDArray[np.float64],
        labels: NDArray[np.float64],
        times: NDArray[np.float64] | None,
        *,
        size: int,
    ) -> Iterator[EventBatch]:
        """All full batches of some rows, as `batch` gives them when it learns, but normalised in one go.

        The statistics are at each moment those of the rows up to the batch last given out.
        """
        starts = range(0, len(labels) - size + 1, size)
        labels, made = labels.astype(self._label_type), None
        after = [self._statistics]
        if numbers.shape[1] and starts:
            values, present = _known(numbers[: len(starts) * size])
            for start in starts:
                rows = slice(start, start + size)
                after.append(after[-1].with_rows(values[rows], present[rows]))
            made = self._normalised(values, present, after[:-1])
        for index, start in enumerate(starts):
            rows = slice(start, start + size)
            if made is not None:
                self._statistics = after[index + 1]
            own = None if made is None else made[rows].copy()  # aligned as any batch is, so that it computes alike
            yield self._assembled(ids[rows], own, labels[rows], None if times is None else times[rows])

    @property
    def _label_type(self) -> type[np.float32] | type[np.int64]:
        return np.float32 if self.schema.num_classes is None else np.int64

    def _assembled(
        self,
        ids: NDArray[np.int64],
        numbers: NDArray[np.float32] | None,
        labels: NDArray[Any] | None,
        times: NDArray[np.float64] | None,
    ) -> EventBatch:
        batch = EventBatch()
        of_ids, of_numbers = self.schema.arguments
        if ids.shape[1]:
            batch[of_ids] = torch.from_numpy(ids)
        if numbers is not None:
            batch[of_numbers] = torch.from_numpy(numbers)
        if labels is not None:
            batch["labels"] = torch.from_numpy(labels)
        batch.times = None if times is None else torch.from_numpy(times.copy())
        return batch

    def _normalised(
        self, values: NDArray[np.float64], present: NDArray[np.bool_], before: Sequence[Statistics]
    ) -> NDArray[np.float32]:
        """Deviations from the mean in standard deviations, at most `CLIP`, and the marks of what is missing.

        The rows are as many batches of one size as there are statistics, those before each batch.
        """
        width = values.shape[1]
        mean, scale = (np.stack(each)[:, None] for each in zip(*((at.mean, at.scale()) for at in before), strict=True))
        scaled = (values.reshape(len(before), -1, width) - mean) * scale
        np.clip(scaled, -CLIP, CLIP, out=scaled)
        made = np.empty((len(values), self.schema.num_numbers), np.float32)
        np.multiply(scaled.reshape(-1, width), present, out=made[:, :width], casting="same_kind")
        if self._optional:
            np.logical_not(present[:, self._optional], out=made[:, width:], casting="unsafe")
        return made

    def encode(self, rows: Iterable[Mapping[str, Any]]) -> EventBatch:
        """A batch to predict, without labels; nothing is learned from it.

        Raises:
            RunError: no rows, or one that does not fit the schema.
        """
        given = list(rows)
        if isinstance(rows, Mapping) or not given:
            raise RunError(f"received {rows!r:.100}; expected a list of rows, such as [{{'price': 1.0}}]")
        names = tuple(self.schema.columns)
        table, wrong = table_of([dict(each) for each in given], names, frozenset(self.schema.categorical))
        checked = check(Schema(columns=self.schema.columns, label=_NO_LABEL), table)
        reasons = {index: [each] for index, each in wrong.items()}
        for index, found in checked.reasons.items():
            reasons.setdefault(index, []).extend(each for each in found if not each.startswith(_NO_LABEL))
        for index in sorted(index for index, each in reasons.items() if each):
            raise RunError(f"row {index} does not fit the schema: {'; '.join(reasons[index])}; fix it or leave it out")
        ids = self.ids(checked.categories, grow=False).reshape(table.num_rows, -1)
        return self.batch(ids, checked.numbers, None, None, learn=False)

    def state_dict(self) -> dict[str, Any]:
        """Everything, in JSON types."""
        own = self._statistics
        numbers = {"count": own.count.tolist(), "mean": own.mean.tolist(), "squares": own.squares.tolist()}
        vocabularies = {name: list(each) for name, each in self._vocabularies.items()}
        return {"schema": self.schema.to_json(), "statistics": numbers, "vocabularies": vocabularies}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state.

        Raises:
            RunError: it is that of another schema.
        """
        if state["schema"] != self.schema.to_json():
            raise RunError(
                f"the run was begun with the schema {state['schema']}, and now it is {self.schema.to_json()}; "
                f"expected the same"
            )
        columns = {name: np.array(each, np.float64) for name, each in state["statistics"].items()}
        self._statistics = Statistics(**columns)
        for name, each in state["vocabularies"].items():
            self._vocabularies[name] = {text: index + 2 for index, text in enumerate(each)}

    @staticmethod
    def from_state(state: Mapping[str, Any]) -> Encoder:
        """The encoder of a state, as a snapshot has it."""
        encoder = Encoder(Schema.from_json(state["schema"]))
        encoder.load_state_dict(state)
        return encoder


def _known(numbers: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """The numbers, 0 where they are missing, and which are there."""
    present = ~np.isnan(numbers)
    return np.where(present, numbers, 0.0), present


_NO_LABEL: Final = "\0label"
