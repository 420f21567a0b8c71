"""Columns of a chunk against the schema: by column, and by row only where a column does not fit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from matta.streams.schema import Categorical, Numeric, Schema

Reasons = dict[int, list[str]]
_FIRST, _LAST = -62135596800.0, 253402300799.0  # the years 1 to 9999
_SHOWN: Final = 60
_LARGEST: Final = 1e100  # one whose square is infinite would silence its column for good


@final
@dataclass(frozen=True, kw_only=True)
class Checked:
    """The columns of a chunk, all rows, and what is wrong with which."""

    categories: dict[str, pa.Array]
    numbers: NDArray[np.float64]
    labels: NDArray[np.float64]
    times: NDArray[np.float64] | None
    reasons: Reasons


def check(schema: Schema, table: pa.Table) -> Checked:
    """Convert the columns and collect what is wrong."""
    reasons: Reasons = {}
    categories = {name: _category(table, name, each, reasons) for name, each in schema.categorical.items()}
    numbers = [_number(table, name, each, reasons) for name, each in schema.numeric.items()]
    return Checked(
        categories=categories,
        numbers=np.stack(numbers, axis=1) if numbers else np.zeros((table.num_rows, 0)),
        labels=_label(table, schema, reasons),
        times=None if schema.time is None else _time(table, schema.time, reasons),
        reasons=reasons,
    )


def column_of(table: pa.Table, name: str) -> pa.Array:
    """A column in one piece; one that is not there is all missing."""
    if name not in table.column_names:
        return pa.nulls(table.num_rows)
    column = table.column(name).combine_chunks()
    if isinstance(column, pa.ChunkedArray):
        column = pa.concat_arrays(column.chunks) if column.num_chunks else pa.array([], column.type)
    if isinstance(column.type, pa.UuidType):
        return pa.array([None if cell is None else str(cell) for cell in column.to_pylist()], pa.string())
    if isinstance(column.type, pa.BaseExtensionType):
        column = column.storage
    return column.dictionary_decode() if pa.types.is_dictionary(column.type) else column


def _category(table: pa.Table, name: str, column: Categorical, reasons: Reasons) -> pa.Array:
    """Text, encoded as a dictionary; null where it is missing."""
    given = column_of(table, name)
    if pa.types.is_floating(given.type):
        given = pc.if_else(pc.is_nan(given), None, given)
    encoded = _distinct(given)
    values = _converted(encoded.dictionary, _to_text, pa.string(), lambda _: None)
    bad = pc.and_(pc.is_valid(encoded.dictionary), pc.is_null(values)).to_numpy(zero_copy_only=False)
    bad = np.append(bad, False)  # something to point at where all are missing, and the dictionary is empty
    _note(reasons, given, bad[_indices(encoded)] & _valid(given), name, "text in UTF-8 or a whole number")
    text = pa.DictionaryArray.from_arrays(encoded.indices, pc.fill_null(values, "")).dictionary_decode()
    text = pc.if_else(pc.equal(text, ""), None, text)
    if column.required:
        _note(reasons, given, ~_valid(text), name, "a category")
    return text


def _number(table: pa.Table, name: str, column: Numeric, reasons: Reasons) -> NDArray[np.float64]:
    given = column_of(table, name)
    values, bad = _floats(given, _to_float)
    _note(reasons, given, bad, name, "a number")
    _note(reasons, given, np.abs(values) > _LARGEST, name, f"a finite number, to {_LARGEST:g}")
    with np.errstate(invalid="ignore"):
        out = np.isfinite(values) & ((values < column.low) | (values > column.high))
    _note(reasons, given, out, name, f"{column.low:g} to {column.high:g}")
    if column.required:
        _note(reasons, given, np.isnan(values) & ~bad, name, "a number")
    return values


def _label(table: pa.Table, schema: Schema, reasons: Reasons) -> NDArray[np.float64]:
    given = column_of(table, schema.label)
    values, bad = _floats(given, _to_float)
    if schema.num_classes is None:
        good, expected = (values >= 0) & (values <= 1), "0 to 1"
    else:
        good = (values >= 0) & (values < schema.num_classes) & (values == np.floor(values))
        expected = f"a class from 0 to {schema.num_classes - 1}"
    _note(reasons, given, ~good | bad, schema.label, f"a label, {expected}")
    return values


def _time(table: pa.Table, name: str, reasons: Reasons) -> NDArray[np.float64]:
    given = column_of(table, name)
    values, bad = _floats(given, _to_seconds)
    _note(reasons, given, bad | ~((values >= _FIRST) & (values <= _LAST)), name, "a time")
    return values


def are_written_dates(times: NDArray[np.float64] | None) -> bool:
    """Whether all of them, as seconds in August 1970, are dates from 1900 to 2100 that were written as 20130131."""
    if times is None or not len(times):
        return False
    years, months, days = times // 10_000, times // 100 % 100, times % 100
    found = (years >= 1900) & (years <= 2100) & (months >= 1) & (months <= 12) & np.isin(days, np.arange(1, 32))
    return bool(found.all())


def _floats(given: pa.Array, convert: Callable[[pa.Array], pa.Array]) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """The values, NaN where they are missing, and which were there but could not be converted."""
    refused: list[int] = []
    values = _converted(given, convert, pa.float64(), refused.append)
    bad = np.zeros(len(given), bool)
    bad[refused] = True
    return values.to_numpy(zero_copy_only=False), bad


def _converted(
    given: pa.Array, convert: Callable[[pa.Array], pa.Array], kind: pa.DataType, refuse: Callable[[int], None]
) -> pa.Array:
    """All at once if that goes; else by halves, so that only what is bad is looked at one by one."""

    def part(array: pa.Array, offset: int) -> list[pa.Array]:
        try:
            return [convert(array)]
        except (pa.ArrowException, NotImplementedError):
            if len(array) == 1:
                refuse(offset)
                return [pa.nulls(1, kind)]
            half = len(array) // 2
            return part(array.slice(0, half), offset) + part(array.slice(half), offset + half)

    return pa.concat_arrays(part(given, 0)) if len(given) else pa.nulls(0, kind)


def _distinct(array: pa.Array) -> pa.DictionaryArray:
    """The distinct values; all of them where Arrow cannot compare them."""
    try:
        return array.dictionary_encode()
    except pa.ArrowNotImplementedError:  # lists and mappings
        return pa.DictionaryArray.from_arrays(pa.array(np.arange(len(array)), mask=~_valid(array)), array)


def _to_text(array: pa.Array) -> pa.Array:
    """Categories as text, in whatever way a whole number or a truth is written: pandas writes 7.0 and True to CSV."""
    kind = array.type
    if pa.types.is_nested(kind):
        raise pa.ArrowInvalid("nested")
    if pa.types.is_floating(kind) or pa.types.is_decimal(kind):
        array = pc.cast(array, pa.int64())
    text = pc.cast(array, pa.string())
    if pa.types.is_temporal(kind):
        return pc.replace_substring_regex(text, r"\.0+$", "")
    text = pc.replace_substring_regex(text, r"^(-?[0-9]+)\.0+$", r"\1")
    return pc.replace_substring_regex(pc.replace_substring_regex(text, "^True$", "true"), "^False$", "false")


def _to_float(array: pa.Array) -> pa.Array:
    if _is_text(array):
        array = pc.utf8_lower(pc.utf8_trim_whitespace(pc.cast(array, pa.string())))
        array = pc.if_else(pc.equal(array, ""), None, array)
        array = pc.if_else(pc.equal(array, "true"), "1", pc.if_else(pc.equal(array, "false"), "0", array))
    elif not (pa.types.is_null(array.type) or _is_number(array)):
        raise pa.ArrowInvalid("no number")
    return pc.cast(array, pa.float64(), safe=False)


def _to_seconds(array: pa.Array) -> pa.Array:
    """Seconds since 1970 of numbers, dates, and text of one form."""
    if _is_text(array):
        text = pc.utf8_trim_whitespace(pc.cast(array, pa.string()))
        found = _times_of(text)
        if found is None:  # perhaps of more digits than microseconds have, as Go and .NET write them
            found = _times_of(pc.replace_substring_regex(text, r"(:\d\d\.\d{6})\d+", r"\1"))
        if found is None:
            raise pa.ArrowInvalid("no time")
        return _to_seconds(found)
    if pa.types.is_temporal(array.type):
        micros = pc.cast(pc.cast(array, pa.timestamp("us"), safe=False), pa.int64())
        return pc.divide(pc.cast(micros, pa.float64(), safe=False), 1e6)
    return _to_float(array)


def _times_of(text: pa.Array) -> pa.Array | None:
    for kind in (pa.float64(), pa.timestamp("us"), pa.timestamp("us", "UTC")):
        try:
            return pc.cast(text, kind)
        except pa.ArrowException:
            continue
    return None


def _is_text(array: pa.Array) -> bool:
    kind = array.type
    is_large = pa.types.is_large_string(kind) or pa.types.is_large_binary(kind) or pa.types.is_string_view(kind)
    return pa.types.is_string(kind) or pa.types.is_binary(kind) or is_large


def _is_number(array: pa.Array) -> bool:
    kind = array.type
    is_plain = pa.types.is_integer(kind) or pa.types.is_floating(kind)
    return is_plain or pa.types.is_boolean(kind) or pa.types.is_decimal(kind)


def _valid(array: pa.Array) -> NDArray[np.bool_]:
    return array.is_valid().to_numpy(zero_copy_only=False)


def _indices(encoded: pa.DictionaryArray) -> NDArray[np.int64]:
    return pc.fill_null(encoded.indices, 0).to_numpy(zero_copy_only=False)


def _note(reasons: Reasons, given: pa.Array, bad: NDArray[np.bool_], name: str, expected: str) -> None:
    for index in np.flatnonzero(bad).tolist() if bad.any() else ():
        value = given[index].as_py()
        if isinstance(value, bytes):
            value = value.decode("utf-8", "backslashreplace")
        shown = "nothing" if value is None else repr(value)[:_SHOWN]
        reasons.setdefault(index, []).append(f"{name}: received {shown}; expected {expected}")
