"""What an event consists of."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, final

from matta.errors import RunError


@final
@dataclass(frozen=True, kw_only=True)
class Numeric:
    """A number, normalised by running statistics; one that is missing becomes 0 and is marked.

    It is given in standard deviations from the mean of what came before its batch, at most 10; in the first batch, and
    as long as it never changes, it is 0.

    Args:
        low: Smallest value that is accepted.
        high: Largest value that is accepted.
        required: Whether an event without it is set aside; there is then no column of marks.

    Raises:
        RunError: no number lies between `low` and `high`.

    Example:
        >>> from matta.streams import Schema
        >>> schema = Schema(columns={"distance": Numeric(low=0), "seats": Numeric(required=True)}, label="late")
        >>> schema.num_numbers  # two values, and a mark for a missing distance
        3
    """

    low: float = -math.inf
    high: float = math.inf
    required: bool = False

    def __post_init__(self) -> None:
        if not self.low <= self.high:
            raise RunError(f"received low={self.low} and high={self.high}; expected low to be at most high")


@final
@dataclass(frozen=True, kw_only=True)
class Categorical:
    """A category: text or a whole number, known by its text. Id 0 is that of a missing one.

    However they are written, 7, 7.0 and "7.0" are one category, and so are true and "True".

    Args:
        buckets: Ids from 1 are hashes: nothing is remembered, and categories may share an id.
        vocabulary: In place of `buckets`: ids from 2 are given out as categories first appear, to at most
            this many; those that come later share id 1.
        required: Whether an event without it is set aside.

    Raises:
        RunError: not one of `buckets` and `vocabulary` is given, or it is less than 1.

    Example:
        >>> Categorical(buckets=64).num_ids, Categorical(vocabulary=1000).num_ids
        (65, 1002)
    """

    buckets: int | None = None
    vocabulary: int | None = None
    required: bool = False

    def __post_init__(self) -> None:
        given = [each for each in (self.buckets, self.vocabulary) if each is not None]
        if len(given) != 1 or given[0] < 1:
            raise RunError(
                f"received buckets={self.buckets} and vocabulary={self.vocabulary}; expected one of them, from 1 up"
            )

    @property
    def num_ids(self) -> int:
        """Rows that an embedding of this column needs."""
        return self.buckets + 1 if self.buckets is not None else (self.vocabulary or 0) + 2


Column = Numeric | Categorical


@final
@dataclass(frozen=True, kw_only=True)
class Schema:
    """The columns of an event that are read, and how they become a batch; other columns are ignored.

    A batch is a mapping: ids of shape (batch, categorical columns), numbers of shape (batch, `num_numbers`),
    that is the values and then the marks of missing ones, each in the order declared, and `labels`.

    Args:
        columns: The features, by name.
        label: The column of labels. They must be there.
        num_classes: How many classes there are; None for one logit: labels from 0 to 1.
        time: The column of event times: seconds since 1970, a date, or text in ISO 8601 (UTC where it does not
            say). They must be there, if declared.
        arguments: What the modules call the ids and the numbers.

    Raises:
        RunError: a column has two roles, or there is none.

    Example:
        >>> from matta.streams import Categorical, Numeric
        >>> schema = Schema(columns={"origin": Categorical(buckets=8), "distance": Numeric(low=0)}, label="late")
        >>> schema.num_ids, schema.num_numbers
        ((9,), 2)
    """

    columns: Mapping[str, Column]
    label: str
    num_classes: int | None = None
    time: str | None = None
    arguments: tuple[str, str] = ("categorical", "numeric")

    def __post_init__(self) -> None:
        if not self.columns:
            raise RunError("received no columns; expected at least one feature")
        if strange := [name for name, each in self.columns.items() if not isinstance(each, Column)]:
            kind = type(self.columns[strange[0]]).__name__
            raise RunError(f"received a {kind} for {strange[0]!r}; expected a Numeric or Categorical")
        if self.label in self.columns or self.time in (*self.columns, self.label):
            raise RunError(f"received label={self.label!r} and time={self.time!r}; expected columns of no other role")

    @property
    def categorical(self) -> dict[str, Categorical]:
        """The categorical columns."""
        return {name: each for name, each in self.columns.items() if isinstance(each, Categorical)}

    @property
    def numeric(self) -> dict[str, Numeric]:
        """The numeric columns."""
        return {name: each for name, each in self.columns.items() if isinstance(each, Numeric)}

    @property
    def num_ids(self) -> tuple[int, ...]:
        """Rows that the embedding of each categorical column needs."""
        return tuple(each.num_ids for each in self.categorical.values())

    @property
    def num_numbers(self) -> int:
        """Numbers to an event: numeric columns, and marks for those that may be missing."""
        return len(self.numeric) + sum(not each.required for each in self.numeric.values())

    @property
    def names(self) -> tuple[str, ...]:
        """All columns that are read."""
        return (*self.columns, self.label, *(() if self.time is None else (self.time,)))

    def to_json(self) -> dict[str, Any]:
        """The schema in JSON types."""
        kinds = {name: type(each).__name__ for name, each in self.columns.items()}
        columns = {name: {"kind": kinds[name], **_finite(asdict(each))} for name, each in self.columns.items()}
        own = {"label": self.label, "num_classes": self.num_classes, "time": self.time}
        return {"columns": columns, **own, "arguments": list(self.arguments)}

    @staticmethod
    def from_json(saved: Mapping[str, Any]) -> Schema:
        """The schema that `to_json` described."""
        kinds: dict[str, Any] = {"Numeric": Numeric, "Categorical": Categorical}
        columns = {
            name: kinds[each["kind"]](**{key: value for key, value in each.items() if key != "kind"})
            for name, each in saved["columns"].items()
        }
        rest = {name: saved[name] for name in ("label", "num_classes", "time")}
        return Schema(columns=columns, arguments=tuple(saved["arguments"]), **rest)


def _finite(values: dict[str, Any]) -> dict[str, Any]:
    """Without infinities, which JSON does not have and which are the defaults."""
    return {name: value for name, value in values.items() if not (isinstance(value, float) and math.isinf(value))}
