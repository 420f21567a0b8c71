"""From checked columns to tensors: ids of categories, and numbers normalised by running statistics."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Final, final
from zlib import crc32

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor

from matta.errors import RunError
from matta.streams.checking import check
from matta.streams.chunks import table_of
from matta.streams.schema import Categorical, Schema

CLIP: Final = 10.0


@final
class EventBatch(dict[str, Tensor]):
    """A batch of events, with their times beside it: float64 seconds since 1970, or None."""

    times: Tensor | None = None

    def to(self, device: torch.device | str, non_blocking: bool = False) -> EventBatch:
        """The batch on a device; the times stay."""
        moved = EventBatch({name: each.to(device, non_blocking=non_blocking) for name, each in self.items()})
        moved.times = self.times
        return moved


@final
class Statistics:
    """Count, mean and sum of squared deviations of each column, of all values so far (Chan et al., 1979)."""

    def __init__(self, num_columns: int) -> None:
        self.count, self.mean, self.squares = (np.zeros(num_columns) for _ in range(3))

    def add(self, values: NDArray[np.float64], present: NDArray[np.bool_]) -> None:
        """Take in rows; values that are not present are 0."""
        count = np.add.reduce(present, 0, dtype=np.float64)
        mean = np.add.reduce(values, 0) / np.maximum(count, 1)
        deviations = (values - mean) * present
        squares = np.einsum("ij,ij->j", deviations, deviations)
        total = np.maximum(self.count + count, 1)
        delta = (mean - self.mean) * (count > 0)
        self.squares += squares + delta * delta * self.count * count / total
        self.mean += delta * count / total
        self.count += count

    def normalise(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        """Deviations from the mean in standard deviations, at most `CLIP`; 0 where nothing is known yet."""
        deviation = np.sqrt(self.squares / np.maximum(self.count, 1))
        scale = np.divide(1.0, deviation, out=np.zeros_like(deviation), where=deviation > 0)
        scaled = (values - self.mean) * scale
        return np.clip(scaled, -CLIP, CLIP, out=scaled)


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
        self._statistics = Statistics(len(schema.numeric))
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
        batch = EventBatch()
        of_ids, of_numbers = self.schema.arguments
        if ids.shape[1]:
            batch[of_ids] = torch.from_numpy(ids)
        if numbers.shape[1]:
            batch[of_numbers] = torch.from_numpy(self._numbers(numbers, learn=learn))
        if labels is not None:
            kind = np.float32 if self.schema.num_classes is None else np.int64
            batch["labels"] = torch.from_numpy(labels.astype(kind))
        batch.times = None if times is None else torch.from_numpy(times.copy())
        return batch

    def _numbers(self, numbers: NDArray[np.float64], *, learn: bool) -> NDArray[np.float32]:
        present = ~np.isnan(numbers)
        values = np.where(present, numbers, 0.0)
        made = np.empty((len(numbers), self.schema.num_numbers), np.float32)
        width = numbers.shape[1]
        np.multiply(self._statistics.normalise(values), present, out=made[:, :width], casting="same_kind")
        if self._optional:
            np.logical_not(present[:, self._optional], out=made[:, width:], casting="unsafe")
        if learn:
            self._statistics.add(values, present)
        return made

    def encode(self, rows: Iterable[Mapping[str, Any]]) -> EventBatch:
        """A batch to predict, without labels; nothing is learned from it.

        Raises:
            RunError: a row does not fit the schema.
        """
        table, wrong = table_of([dict(each) for each in rows], tuple(self.schema.columns))
        checked = check(Schema(columns=self.schema.columns, label=_NO_LABEL), table)
        reasons = {index: [each] for index, each in wrong.items()}
        for index, found in checked.reasons.items():
            reasons.setdefault(index, []).extend(each for each in found if not each.startswith(_NO_LABEL))
        for index in sorted(index for index, each in reasons.items() if each):
            raise RunError(f"row {index} does not fit the schema: {'; '.join(reasons[index])}; mend it or leave it out")
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
        for name in ("count", "mean", "squares"):
            setattr(self._statistics, name, np.array(state["statistics"][name], np.float64))
        for name, each in state["vocabularies"].items():
            self._vocabularies[name] = {text: index + 2 for index, text in enumerate(each)}

    @staticmethod
    def from_state(state: Mapping[str, Any]) -> Encoder:
        """The encoder of a state, as a snapshot has it."""
        encoder = Encoder(Schema.from_json(state["schema"]))
        encoder.load_state_dict(state)
        return encoder


_NO_LABEL: Final = "\0label"
