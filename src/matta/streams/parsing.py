"""Blocks of lines as columns: CSV and JSONL, one event a line."""

from __future__ import annotations

import csv
import io
import json
from dataclasses import dataclass, field
from typing import Any, Final, final

import pyarrow as pa
import pyarrow.csv
import pyarrow.json

from matta.streams.chunks import table_of, text_of

MISSING: Final = ["", "NA", "NaN", "nan", "null", "NULL", "None"]
_PIECES: Final = 16
_SMALLEST: Final = 64


@final
@dataclass(kw_only=True)
class Parsed:
    """The lines that could be parsed as a table, their indices, and what is wrong with the others."""

    table: pa.Table
    indices: list[int] = field(default_factory=list)
    bad: dict[int, str] = field(default_factory=dict)


def parse_header(line: bytes) -> list[str]:
    """The column names of a CSV file.

    Raises:
        ValueError: they are not text, or not distinct.
    """
    names = next(csv.reader([line.decode("utf-8-sig").rstrip("\r\n")]), [])
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"the header names {', '.join(twice)} more than once")
    return names


def _is_text(data: bytes) -> bool:
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True


def parse_csv(lines: list[bytes], header: list[str], names: tuple[str, ...]) -> Parsed:
    """Lines of CSV; all cells are still text, null where they are missing."""
    bad = {index: "unbalanced quotes" for index, line in enumerate(lines) if line.count(b'"') % 2}
    whole = b"\n".join(lines)
    if b"\r" in whole:  # Arrow would begin a row there
        bad |= {index: "a carriage return in a line" for index, line in enumerate(lines) if b"\r" in line[:-1]}
    if not _is_text(whole):
        bad |= {index: "not text in UTF-8" for index, line in enumerate(lines) if not _is_text(line)}
    kept = [index for index in range(len(lines)) if index not in bad]
    wrong: dict[int, str] = {}

    def refuse(row: Any) -> str:
        wrong[kept[row.number - 1]] = f"{row.actual_columns} cells; expected {row.expected_columns}"
        return "skip"

    text = b"\n".join(lines[index] for index in kept) if bad else whole
    if not kept:
        return Parsed(table=table_of([], names, frozenset())[0], bad=bad)
    table = pyarrow.csv.read_csv(
        io.BytesIO(text + b"\n"),
        read_options=pyarrow.csv.ReadOptions(use_threads=False, column_names=header, block_size=len(text) + 2),
        parse_options=pyarrow.csv.ParseOptions(invalid_row_handler=refuse, ignore_empty_lines=False),
        convert_options=pyarrow.csv.ConvertOptions(
            column_types={name: pa.string() for name in names},
            include_columns=list(names),
            null_values=MISSING,
            strings_can_be_null=True,
        ),
    )
    indices = [index for index in kept if index not in wrong] if wrong or bad else kept
    assert table.num_rows == len(indices), "every line is a row or refused"
    return Parsed(table=table, indices=indices, bad={**bad, **wrong})


def parse_json(lines: list[bytes], names: tuple[str, ...], texts: frozenset[str]) -> Parsed:
    """Lines of JSON; the columns `texts` are text unless the first line says otherwise.

    What Arrow refuses is cut into pieces, and only a small piece is parsed line by line.
    """
    table = _parse_json_block(lines, names, texts)
    if table is not None:
        return Parsed(table=table, indices=list(range(len(lines))))
    if len(lines) <= _SMALLEST:
        return _parse_json_lines(lines, names, texts)
    size = max(_SMALLEST, -(-len(lines) // _PIECES))
    parts = [(start, parse_json(lines[start : start + size], names, texts)) for start in range(0, len(lines), size)]
    return Parsed(
        table=_joined([part.table for _, part in parts], names),
        indices=[start + index for start, part in parts for index in part.indices],
        bad={start + index: reason for start, part in parts for index, reason in part.bad.items()},
    )


def _parse_json_block(lines: list[bytes], names: tuple[str, ...], texts: frozenset[str]) -> pa.Table | None:
    try:
        first = json.loads(lines[0])
        kinds = {name: _json_kind(first.get(name), is_text=name in texts) for name in names}
        text = b"\n".join(lines)
        if b"}{" in text or b"} {" in text or not _is_text(text):  # several objects on a line, or what Arrow lets by
            return None
        table = pyarrow.json.read_json(
            io.BytesIO(text),
            read_options=pyarrow.json.ReadOptions(use_threads=False, block_size=len(text) + 1),
            parse_options=pyarrow.json.ParseOptions(
                explicit_schema=pa.schema(list(kinds.items())), unexpected_field_behavior="ignore"
            ),
        )
    except (pa.ArrowException, ValueError, AttributeError, RecursionError):
        return None
    return table if table.num_rows == len(lines) else None


def _json_kind(first: Any, *, is_text: bool) -> pa.DataType:
    if isinstance(first, bool):
        return pa.bool_()
    if is_text:
        return pa.int64() if isinstance(first, int) else pa.string()
    return pa.string() if isinstance(first, str) else pa.float64()


def _parse_json_lines(lines: list[bytes], names: tuple[str, ...], texts: frozenset[str]) -> Parsed:
    rows, indices, bad = [], [], {}
    for index, line in enumerate(lines):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            bad[index] = f"not JSON: {error}"
            continue
        if isinstance(row, dict):
            rows.append(row)
            indices.append(index)
        else:
            bad[index] = f"received a {type(row).__name__}; expected an object"
    table, wrong = table_of(rows, names, texts)
    bad |= {indices[index]: reason for index, reason in wrong.items()}
    keep = [index for index in range(len(rows)) if index not in wrong]
    return Parsed(table=table.take(pa.array(keep, pa.int64())), indices=[indices[index] for index in keep], bad=bad)


def _joined(tables: list[pa.Table], names: tuple[str, ...]) -> pa.Table:
    """Tables whose columns may differ in type, one after the other; columns that do are bytes."""
    columns = {}
    for name in names:
        parts = [part.column(name).combine_chunks() for part in tables if part.num_rows]
        kinds = {part.type for part in parts} - {pa.null()}
        kind = kinds.pop() if len(kinds) == 1 else pa.null() if not kinds else pa.binary()
        columns[name] = pa.chunked_array([_as(part, kind) for part in parts], kind)
    return pa.table(columns)


def _as(part: pa.Array, kind: pa.DataType) -> pa.Array:
    if part.type == kind or kind == pa.null():
        return part
    if part.type == pa.null():
        return pa.nulls(len(part), kind)
    cells = part.to_pylist()
    return pa.array([text_of(cell, is_category=False) for cell in cells], kind)
