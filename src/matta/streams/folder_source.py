"""Events from the files of a folder that grows."""

from __future__ import annotations

import csv
import os
import time
import zlib
from pathlib import Path
from typing import BinaryIO, Final, final

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from matta.errors import RunError, first_line
from matta.streams.chunks import REFUSED, RETRIED, Bad, Chunk, Place, refused
from matta.streams.parsing import Parsed, parse_csv, parse_header, parse_json
from matta.streams.schema import Schema

TEXT: Final = (".csv", ".jsonl")
NEW: Final = (0, 0, 0)
LONGEST_LINE: Final = 1 << 24
_HEAD: Final = 1 << 12
_REPLACED: Final = "not the file that was read under this name: it begins otherwise; expected a name for each file"


@final
class Folder:
    r"""Events in `.parquet`, `.csv` and `.jsonl` files, in the order of their names.

    Name files so that later events sort later, and write what cannot be read in part (Parquet) under a name
    that begins with "." or "_", then rename it: such names are passed over. CSV and JSONL files may grow while
    they are read; a line counts once its end is written, or nothing follows for `settle_s`. CSV has a
    header, and no line breaks within cells; empty cells, NA, NaN, null and None are missing. A file that comes late,
    with a name before those that were read, is read next. A file is known by its name: one that is renamed is read
    again, and one whose beginning has changed since it was read is set aside.

    Args:
        path: The folder.
        idle_s: The stream ends after this many seconds without anything new; 0 reads what is there; None waits for
            ever.
        sentinel: The stream also ends when a file of this name is there, after what was written before it.
        settle_s: A file that cannot be read is set aside when it has not changed for this long.
        poll_s: How often to look.
        block_bytes: How much of a text file is parsed at a time.
        num_rows: How many rows of a Parquet file are checked at a time.

    Raises:
        RunError: the folder is not there.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> from matta.streams import Numeric, Schema, Stream
        >>> schema = Schema(columns={"x": Numeric()}, label="late")
        >>> with tempfile.TemporaryDirectory() as path:
        ...     _ = Path(path, "2013-01-01.csv").write_text("x,late\n1.5,0\n2.5,1\n")
        ...     batch = next(Stream(Folder(path, idle_s=0), schema, batch_size=2, quarantine=Path(path, "_bad.jsonl")))
        >>> batch["labels"]
        tensor([0., 1.])
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        idle_s: float | None = None,
        sentinel: str = "_END",
        settle_s: float = 5.0,
        poll_s: float = 0.2,
        block_bytes: int = 1 << 20,
        num_rows: int = 1 << 15,
    ) -> None:
        self.path = Path(path).absolute()  # a run may change its working directory
        if not self.path.is_dir():
            raise RunError(f"{self.path} is not a folder; expected the folder that the event files are written to")
        self._idle_s, self._sentinel, self._settle_s, self._poll_s = idle_s, sentinel, settle_s, poll_s
        self._block_bytes, self._num_rows = block_bytes, num_rows
        self._names: tuple[str, ...] = ()
        self._texts: frozenset[str] = frozenset()
        self._is_closing = False
        self._places: dict[str, Place] = {}
        self._headers: dict[str, list[str]] = {}
        self._parquet: _Parquet | None = None
        self.heads: dict[str, list[int]] = {}
        """Of each file the length of its beginning, and the checksum of that: a stream keeps them with its places."""

    def begin(self, schema: Schema, places: dict[str, Place]) -> None:
        """Get ready to read the columns of a schema, from the places given on."""
        self._names, self._texts = schema.names, frozenset(schema.categorical)
        self._places, self._headers, self._parquet, self._is_closing = dict(places), {}, None, False

    def next_chunk(self) -> Chunk | None:
        """The next rows, waiting for them; None: the stream has ended."""
        if self._parquet is not None:  # a file that has been begun is complete: no need to look around
            return self._noted(self._parquet_chunk(self._parquet))
        deadline = None if self._idle_s is None else time.monotonic() + self._idle_s
        while True:
            is_over = (self.path / self._sentinel).exists()
            chunk = self._look(closing=self._is_closing)
            if chunk is not None or self._is_closing:
                return chunk
            self._is_closing = is_over or (deadline is not None and time.monotonic() >= deadline)
            if self._is_closing:
                continue
            time.sleep(self._poll_s)

    def _look(self, *, closing: bool) -> Chunk | None:
        """The next rows of the first file that has any; None: there are none, or one must be waited for."""
        files = self._files()
        for index, entry in enumerate(files):
            found = self._read(entry, is_latest=index == len(files) - 1, closing=closing)
            if isinstance(found, Chunk):
                return self._noted(found)
            if found:
                return None
        return None

    def _noted(self, chunk: Chunk) -> Chunk:
        self._places[chunk.file] = chunk.end
        return chunk

    def _files(self) -> list[os.DirEntry[str]]:
        try:
            with os.scandir(self.path) as entries:
                seen = [each for each in entries if not each.name.startswith((".", "_"))]
        except OSError as error:
            raise RunError(
                f"{self.path} cannot be read any more: {error.strerror}; put the folder back, and resume the run"
            ) from None
        return sorted((each for each in seen if each.name != self._sentinel), key=lambda each: each.name)

    def _read(self, entry: os.DirEntry[str], *, is_latest: bool, closing: bool) -> Chunk | bool:
        """Rows of a file; False: it has none that are new; True: those after it must wait for it."""
        try:
            stat = entry.stat()
            place = self._places.get(entry.name, NEW)
            if place[0] == REFUSED or (place[0] == RETRIED and place[1] == stat.st_size):
                return False
            is_settled = closing or time.time() - stat.st_mtime >= self._settle_s
            suffix = Path(entry.name).suffix.lower()
            if suffix == ".parquet":
                return False if place[0] else self._open_parquet(entry, place, stat.st_size, is_settled)
            if suffix in TEXT and entry.is_file():
                start = NEW if place[0] < 0 else place
                return self._read_text(entry.name, start, stat.st_size, closing or (is_settled and not is_latest))
            what = "no file" if not entry.is_file() else f"of the kind {suffix or 'without a suffix'!r}"
            return refused(entry.name, f"{what}; expected .parquet, .csv or .jsonl", size=stat.st_size)
        except FileNotFoundError:
            return False
        except OSError as error:
            return refused(entry.name, f"cannot be read: {error.strerror or error}", size=0)

    def _open_parquet(self, entry: os.DirEntry[str], place: Place, size: int, is_settled: bool) -> Chunk | bool:
        try:
            file = pq.ParquetFile(entry.path)
            there = file.schema_arrow.names
        except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
            if not is_settled:
                return True
            reason = "the file is empty" if not size else f"not a whole Parquet file: {first_line(error)}"
            return refused(entry.name, reason, size=size, retry=True)
        missing = [name for name in self._names if name not in there]
        if missing:
            return refused(entry.name, _missing(missing, there), size=size)
        with (self.path / entry.name).open("rb") as opened:
            if not self._is_known(entry.name, opened, size, place):
                return refused(entry.name, _REPLACED, size=size)
        self._parquet = _Parquet(entry.name, file, place[2])
        return self._parquet_chunk(self._parquet)

    def _parquet_chunk(self, parquet: _Parquet) -> Chunk:
        chunk = parquet.next_chunk(self._names, self._num_rows)
        if chunk.end[0]:
            parquet.file.close()
            self._parquet = None
        return chunk

    def _read_text(self, name: str, place: Place, size: int, is_final: bool) -> Chunk | bool:
        offset, row, _ = place
        if size < offset:
            return refused(name, f"the file has {size} bytes, and {offset} of it were read: it was cut", size=size)
        if not size:
            return refused(name, "the file is empty", size=0, retry=True) if is_final else False
        if size == offset:
            return False
        with (self.path / name).open("rb") as file:
            if not self._is_known(name, file, offset or size, place):
                return refused(name, _REPLACED, size=size)
            header: list[str] | None = None
            if name.lower().endswith(".csv"):
                first = file.readline(LONGEST_LINE)
                if not (first.endswith(b"\n") or is_final):
                    return True
                found = self._header(name, first)
                if isinstance(found, str):
                    return refused(name, found, size=size)
                header = found
                offset = max(offset, len(first))
            file.seek(offset)
            block = self._lines(file, size - offset, is_final)
        return self._text_chunk(name, header, block, (offset, row, place[2])) if block else size > offset

    def _is_known(self, name: str, file: BinaryIO, length: int, place: Place) -> bool:
        """Whether a file begins as when it was first read, of which so many bytes are there."""
        if not (place[0] or place[2]):  # none of it has been read
            self.heads.pop(name, None)
        known = self.heads.get(name, [min(length, _HEAD)])
        checksum = zlib.crc32(file.read(known[0]))
        file.seek(0)
        return self.heads.setdefault(name, [known[0], checksum])[1] == checksum

    def _header(self, name: str, first: bytes) -> list[str] | str:
        """The header of a CSV file, or what is wrong with it."""
        if name not in self._headers:
            try:
                header = parse_header(first)
            except (ValueError, csv.Error) as error:
                return f"no CSV header: {error}"
            if missing := [each for each in self._names if each not in header]:
                return _missing(missing, header)
            self._headers[name] = header
        return self._headers[name]

    def _lines(self, file: BinaryIO, most: int, is_final: bool) -> bytes:
        """Whole lines, about a block of them; with `is_final` a last one without its end too."""
        size = min(self._block_bytes, most)
        block = file.read(size)
        while len(block) == size < most and b"\n" not in block:
            more = file.read(min(size, most - size))
            block, size = block + more, size + min(size, most - size)
        end = block.rfind(b"\n") + 1
        return block if is_final and len(block) == most else block[:end]

    def _text_chunk(self, name: str, header: list[str] | None, block: bytes, start: Place) -> Chunk:
        offset, row, done = start
        lines = block.removesuffix(b"\n").split(b"\n")
        end = (offset + len(block), row + len(lines), row + len(lines))
        numbers = [
            index for index, line in enumerate(lines) if row + index >= done and line.strip(b" \t\r")
        ]  # blank lines are no events
        lines = [lines[index].rstrip(b"\r") for index in numbers]
        parsed = self._parse(lines, header)
        return Chunk(
            file=name,
            table=parsed.table,
            rows=np.array([row + numbers[index] for index in parsed.indices], np.int64),
            start=start,
            end=end,
            bad=[
                Bad(file=name, row=row + numbers[index], reason=reason, raw=lines[index])
                for index, reason in sorted(parsed.bad.items())
            ],
            raw=lambda index: lines[parsed.indices[index]],
        )

    def _parse(self, lines: list[bytes], header: list[str] | None) -> Parsed:
        if not lines:
            return Parsed(table=pa.table({name: pa.nulls(0) for name in self._names}))
        if header is not None:
            return parse_csv(lines, header, self._names)
        return parse_json(lines, self._names, self._texts)


@final
class _Parquet:
    """A Parquet file that is being read."""

    def __init__(self, name: str, file: pq.ParquetFile, row: int) -> None:
        self.name, self.file, self.row = name, file, row
        counts = [file.metadata.row_group(index).num_rows for index in range(file.num_row_groups)]
        self._ends = np.cumsum(counts, dtype=np.int64).tolist()
        self._group: tuple[int, pa.Table] | None = None

    def next_chunk(self, names: tuple[str, ...], most: int) -> Chunk:
        """The next rows."""
        total = self._ends[-1] if self._ends else 0
        start = (0, self.row, self.row)
        bad: list[Bad] = []
        table = pa.table({name: pa.nulls(0) for name in names})
        if self.row < total:
            index = int(np.searchsorted(self._ends, self.row, side="right"))
            first = self._ends[index - 1] if index else 0
            try:
                table = self._read_group(index, names).slice(self.row - first, most)
                rows = table.num_rows
            except (pa.ArrowException, OSError) as error:
                rows = self._ends[index] - self.row
                reason = f"rows {self.row} to {self._ends[index] - 1} cannot be read: {first_line(error)}"
                bad = [Bad(file=self.name, row=None, reason=reason)]
            self.row += rows
        numbers = np.arange(self.row - table.num_rows, self.row, dtype=np.int64)
        end = (int(self.row >= total), self.row, self.row)
        return Chunk(file=self.name, table=table, rows=numbers, start=start, end=end, bad=bad)

    def _read_group(self, index: int, names: tuple[str, ...]) -> pa.Table:
        if self._group is None or self._group[0] != index:
            self._group = index, self.file.read_row_group(index, columns=list(names), use_threads=False)
        return self._group[1]


def _missing(missing: list[str], there: list[str]) -> str:
    return f"without the columns {', '.join(missing)}; it has {', '.join(there)[:200] or 'none'}"
