"""Items of text, JSON and Parquet files, and of data sets of the hub: texts, and what is wrong where there is none."""

from __future__ import annotations

import gzip
import json
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, Final, NamedTuple, cast, final

from matta.errors import RunError

TEXT: Final = (".txt", ".txt.gz")
LINES: Final = (".jsonl", ".jsonl.gz", ".json", ".json.gz")
SUFFIXES: Final = (*TEXT, *LINES, ".parquet")
_DAMAGED: Final = (OSError, EOFError, zlib.error)
_BOM: Final = b"\xef\xbb\xbf"
_ROWS: Final = 256


class Bad(NamedTuple):
    """What cannot be used: the reason by which it is counted, how much of it, and what more is known."""

    reason: str
    num: int = 1
    detail: str = ""


class Item(NamedTuple):
    """A document or a piece of one; `row` is the document's number in the file, from 0."""

    value: str | Bad
    row: int
    is_first: bool = True
    is_last: bool = True


def reader_of(
    file: Path, *, field: str, separator: str | None, piece_bytes: int, max_line_bytes: int
) -> Iterator[Item]:
    """The items of a file; one that is damaged ends where it cannot be read any more."""
    name = file.name.lower()
    last = None
    try:
        if name.endswith(TEXT):
            items = _text(file, separator, piece_bytes)
        elif name.endswith(LINES):
            items = items_of(_json(file, field, max_line_bytes), piece_bytes)
        else:
            items = items_of(_parquet(file, field), piece_bytes)
        for item in items:
            last = item
            yield item
    except _DAMAGED as error:
        bad = Bad("file that cannot be read to its end", detail=short(error))
        if last is None or last.is_last:
            yield Item(bad, 0 if last is None else last.row + 1)
        else:
            yield Item(bad, last.row, is_first=False)


def items_of(values: Iterator[Any], piece_bytes: int) -> Iterator[Item]:
    """Values of rows as items: text in pieces, and a reason for what is none."""
    row = 0
    for value in values:
        checked = _checked(value)
        if isinstance(checked, Bad):
            yield Item(checked, row)
            row += checked.num
            continue
        pieces = _pieces(checked, piece_bytes)
        for index, piece in enumerate(pieces):
            yield Item(piece, row, index == 0, index == len(pieces) - 1)
        row += 1


def short(error: BaseException) -> str:
    """The first line of an error."""
    return f"{type(error).__name__}: {error}".split("\n")[0][:160]


def _checked(value: Any) -> str | Bad:
    if isinstance(value, bytes):
        return _decoded(value)
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError:
            return Bad("not UTF-8", detail="half of a surrogate pair")
    return cast("str | Bad", value)


def _decoded(value: bytes) -> str | Bad:
    try:
        return value.decode()
    except UnicodeDecodeError as error:
        return Bad("not UTF-8", detail=str(error))


def _pieces(text: str, most: int) -> list[str]:
    """The text cut before spaces, where a tokenizer would cut it too, into pieces of at most so many bytes."""
    if len(text) * 4 <= most or len(text.encode()) <= most:
        return [text]
    data, pieces = text.encode(), []
    while len(data) > most:
        at = _cut(data, most)
        pieces.append(data[:at].decode())
        data = data[at:]
    return [*pieces, data.decode()]


def _cut(data: bytes, most: int) -> int:
    """Where to cut within the first `most` bytes: before the last space or line end, else between characters."""
    for mark in (b" ", b"\n"):
        if (at := data.rfind(mark, most // 2, most)) > 0:
            return at
    at = most
    while at > most - 4 and data[at] & 0xC0 == 0x80:
        at -= 1
    return at


def _opened(file: Path) -> IO[bytes]:
    return cast("IO[bytes]", gzip.open(file)) if file.name.lower().endswith(".gz") else file.open("rb")


def _text(file: Path, separator: str | None, piece_bytes: int) -> Iterator[Item]:
    """The documents of a text file. No more than a piece and a block is held."""
    mark = separator.encode() if separator is not None else None
    row, is_first, is_over = 0, True, False
    data, at = b"", 0  # what has been read, and how far it is used: to cut it at each document would copy the rest
    with _opened(file) as opened:
        if (head := opened.read(len(_BOM))) != _BOM:
            data = head
        while not is_over or at < len(data):
            if not is_over and len(data) - at <= piece_bytes + len(mark or b""):
                block = opened.read(piece_bytes + 64)
                data, at, is_over = data[at:] + block, 0, not block
            end = data.find(mark, at, at + piece_bytes + len(mark)) if mark is not None else -1
            if end >= 0 and mark is not None:
                yield Item(_decoded(data[at:end]), row, is_first)
                row, is_first, at = row + 1, True, end + len(mark)
            elif len(data) - at > piece_bytes + len(mark or b""):
                end = at + _cut(data[at : at + piece_bytes + 1], piece_bytes)
                yield Item(_decoded(data[at:end]), row, is_first, False)
                is_first, at = False, end
            elif is_over and at < len(data):
                yield Item(_decoded(data[at:]), row, is_first)
                at = len(data)


def _json(file: Path, field: str, max_line_bytes: int) -> Iterator[Any]:
    with _opened(file) as opened:
        first = opened.read(len(_BOM) + 64).removeprefix(_BOM).lstrip()[:1]
        opened.seek(0)
        if first == b"[" and file.name.lower().endswith((".json", ".json.gz")):
            yield from _list(opened.read(), field)
        else:
            yield from _lines(opened, field, max_line_bytes)


def _list(data: bytes, field: str) -> Iterator[Any]:
    try:
        rows = json.loads(data)
    except (ValueError, RecursionError) as error:
        yield Bad("not JSON", detail=short(error))
        return
    yield from (_field(row, field) for row in rows)


def _lines(opened: IO[bytes], field: str, most: int) -> Iterator[Any]:
    while line := opened.readline(most + 1):
        if len(line) > most and not line.endswith(b"\n"):
            while (rest := opened.readline(1 << 20)) and not rest.endswith(b"\n"):
                pass
            yield Bad(f"line of more than {most} bytes")
        else:
            yield _line(line.removeprefix(_BOM), field)


def _line(line: bytes, field: str) -> Any:
    if not line.strip():
        return Bad("empty")
    text = _decoded(line)
    if isinstance(text, Bad):
        return text
    try:
        return _field(json.loads(text), field)
    except (ValueError, RecursionError) as error:
        return Bad("not JSON", detail=short(error))


def _field(row: Any, field: str) -> Any:
    if not isinstance(row, dict):
        return Bad("not a JSON object", detail=f"received a {type(row).__name__}")
    if row.get(field) is None:
        return Bad(f"without {field}", detail=f"it has {', '.join(map(str, row))[:80] or 'nothing'}")
    if not isinstance(row[field], str):
        return Bad(f"{field} is no string", detail=f"received a {type(row[field]).__name__}")
    return row[field]


def _parquet(file: Path, field: str) -> Iterator[Any]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        opened = pq.ParquetFile(file)
        there = opened.schema_arrow.names
    except (pa.ArrowException, UnicodeDecodeError) as error:
        raise OSError(short(error)) from None
    with opened:
        if field not in there:
            yield Bad(f"without {field}", opened.metadata.num_rows, f"it has {', '.join(there)[:80]}")
            return
        for group in range(opened.num_row_groups):
            left = opened.metadata.row_group(group).num_rows
            try:
                for batch in opened.iter_batches(_ROWS, row_groups=[group], columns=[field], use_threads=False):
                    left -= batch.num_rows
                    yield from column_values(batch.column(0), field)
            except (pa.ArrowException, OSError) as error:
                yield Bad("rows of Parquet that cannot be read", left, short(error))


def column_values(column: Any, field: str) -> Iterator[Any]:
    """The cells of an Arrow column as text, or bytes, or what is wrong with them."""
    import pyarrow as pa

    kind = column.type
    if pa.types.is_dictionary(kind):
        column, kind = column.dictionary_decode(), kind.value_type
    if pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind):
        # As bytes, since Arrow lets text by that is not UTF-8, and raises when it is asked for.
        for cell in column.cast(pa.large_binary()).to_pylist():
            yield Bad(f"without {field}") if cell is None else cell
    else:
        for cell in column.is_null().to_pylist():
            yield Bad(f"without {field}") if cell else Bad(f"{field} is no string", detail=f"received {kind}")


_WAITS_S: Final = (1.0, 4.0, 15.0, 60.0)


@final
class HubShards:
    """The files of a data set. `datasets` gives their rows; order, place and shuffling are ours.

    Its own state leaves out what is in its shuffle buffer, and it ends at the first line that is not JSON. So the
    files are opened one by one: of one that is damaged the rest is skipped and counted, and one whose connection
    breaks is opened again at the row reached.

    Raises:
        RunError: the hub does not have it, or cannot be reached, or the data set has no such column.
    """

    def __init__(
        self, name: str, *, config: str | None, split: str, revision: str | None, field: str, piece_bytes: int
    ) -> None:
        self._data = _opened_data_set(name, config, split, revision)
        columns = self._data.column_names
        if columns is not None and field not in columns:
            raise RunError(f"{name} has no column {field!r}; expected one of {', '.join(columns)}: say which by field")
        if columns is not None:
            self._data = self._data.select_columns([field])
        self._field, self._piece_bytes = field, piece_bytes
        count = self._data.num_shards
        self.names = [f"{name}, {split}, file {index} of {count}" for index in range(count)]

    def items(self, index: int) -> Iterator[Item]:
        """The rows of a file."""
        return items_of(self._values(index), self._piece_bytes)

    def _values(self, index: int) -> Iterator[Any]:
        done, waits = 0, list(_WAITS_S)
        while True:
            try:
                for value in self._rows(index, done):
                    done, waits = done + 1, list(_WAITS_S)
                    yield value
                return
            except Exception as error:  # what datasets, fsspec, pyarrow and the network raise has no common base
                if _is_damage(error):
                    yield Bad("file that cannot be read to its end", detail=short(error))
                    return
                if not waits:
                    raise RunError(
                        f"{self.names[index]} cannot be read from row {done} on: {short(error)}; "
                        f"check the network, and resume the run from its last checkpoint"
                    ) from error
                time.sleep(waits.pop(0))

    def _rows(self, index: int, skip: int) -> Iterator[Any]:
        """The cells of the column from a row on."""
        data = self._data.shard(num_shards=len(self.names), index=index).with_format("arrow")
        for table in data.iter(batch_size=_ROWS):
            if skip >= table.num_rows:
                skip -= table.num_rows
                continue
            table, skip = table.slice(skip), 0
            if self._field not in table.column_names:
                yield from [Bad(f"without {self._field}")] * table.num_rows
                continue
            for chunk in table.column(self._field).chunks:
                yield from column_values(chunk, self._field)


def _opened_data_set(name: str, config: str | None, split: str, revision: str | None) -> Any:
    from datasets import load_dataset

    try:
        return load_dataset(name, config, split=split, revision=revision, streaming=True)
    except Exception as error:  # see above
        raise RunError(
            f"the data set {name!r} (config {config!r}, split {split!r}) cannot be loaded: {short(error)}; check the "
            f"name and the network, or give local files with path in place of hub"
        ) from error


def _is_damage(error: Exception) -> bool:
    """Whether it is the file's fault, and trying again would not help."""
    import gzip

    import pyarrow as pa
    from datasets.exceptions import DatasetGenerationError

    kinds = (ValueError, TypeError, KeyError, EOFError, zlib.error, gzip.BadGzipFile, DatasetGenerationError)
    return isinstance(error, (*kinds, pa.ArrowException))
