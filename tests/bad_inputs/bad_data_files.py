"""Text and events in files. Rows that are bad are counted and left out; what gives nothing at all is refused."""

from __future__ import annotations

import gzip
from pathlib import Path

from bad_cases import Case, Damage, cut, nothing, write

from matta.errors import RunError
from matta.lm.documents import TextSource, held_out_documents
from matta.streams import Folder, Numeric, Rows, Schema, Stream


def _text(name: str, file: str, damage: Damage, line: str) -> Case:
    return Case(name, damage, lambda w: held_out_documents(TextSource(path=w / "data" / file), 100), line)


def events(folder: Path) -> None:
    """Refuse what a stream has set aside, as it says it."""
    schema = Schema(columns={"x": Numeric()}, label="label")
    aside = folder / "bad.jsonl"
    stream = Stream(Folder(folder / "data" / "events", idle_s=0), schema, batch_size=1, quarantine=aside)
    assert list(stream) == []
    raise RunError(" ".join(aside.read_text().split()))


def _events(name: str, file: str, content: str | bytes, line: str) -> Case:
    def damage(folder: Path) -> None:
        (folder / "data" / "events" / "1.csv").unlink()
        write(f"data/events/{file}", content)(folder)

    return Case(name, damage, events, line)


def _schema(name: str, columns: dict[str, object], line: str) -> Case:
    return Case(name, nothing, lambda w: Schema(columns=columns, label="label"), line)  # type: ignore[arg-type]


ROW = b'{"text": "a"}\n'
CASES = [
    _text("no file", "none.txt", nothing, r"none.txt leads to no text \(no such file"),
    _text("a folder of nothing", "events", nothing, r"events leads to no text \(a folder\)"),
    _text("another ending", "text.doc", write("data/text.doc", "A text."), r"expected one that ends in"),
    _text("empty text", "text.txt", write("data/text.txt", ""), r"gave no document"),
    _text("text not UTF-8", "text.txt", write("data/text.txt", b"\xff\xfe\x00"), r"1 skipped \(not UTF-8\)"),
    _text("text of spaces", "text.txt", write("data/text.txt", " \n\t\n"), r"1 skipped \(empty\)"),
    _text("JSON lines are no JSON", "text.jsonl", write("data/text.jsonl", "a text\n"), r"1 skipped \(not JSON\)"),
    _text(
        "JSON lines are lists", "text.jsonl", write("data/text.jsonl", "[1]\n[2]\n"), r"2 skipped \(not a JSON object\)"
    ),
    _text(
        "JSON lines without text",
        "text.jsonl",
        write("data/text.jsonl", '{"body": "a"}\n'),
        r"1 skipped \(without text\)",
    ),
    _text("JSON lines of numbers", "text.jsonl", write("data/text.jsonl", '{"text": 3}\n'), r"text is no string"),
    _text("JSON lines with half a pair", "text.jsonl", write("data/text.jsonl", '{"text": "\\ud800"}\n'), r"not UTF-8"),
    _text("JSON lines are deep", "text.jsonl", write("data/text.jsonl", "[" * 100_000), r"not JSON"),
    _text("JSON of many digits", "text.jsonl", write("data/text.jsonl", "9" * 5000), r"not JSON"),
    _text("JSON is a number", "text.json", write("data/text.json", "3"), r"not a JSON object"),
    _text("JSON is cut off", "text.json", write("data/text.json", '[{"text": "a"}, {"te'), r"not JSON"),
    _text("gzip is none", "text.txt.gz", write("data/text.txt.gz", "text"), r"cannot be read to its end"),
    _text(
        "gzip is cut off",
        "text.jsonl.gz",
        write("data/text.jsonl.gz", gzip.compress(ROW)[:12]),
        r"cannot be read to its end",
    ),
    _text("gzip of nothing", "text.jsonl.gz", write("data/text.jsonl.gz", gzip.compress(b"")), r"gave no document"),
    _text("Parquet is none", "text.parquet", write("data/text.parquet", "PAR1"), r"cannot be read to its end"),
    _text("Parquet is cut off", "text.parquet", cut("data/text.parquet"), r"cannot be read to its end"),
    _text(
        "Parquet with a name that is no text",
        "text.parquet",
        lambda w: _misnamed(w / "data/text.parquet", text=["a"]),
        r"cannot be read to its end",
    ),
    _text(
        "Parquet without text", "text.parquet", lambda w: _parquet(w / "data/text.parquet", body=["a"]), r"without text"
    ),
    _text(
        "Parquet of numbers",
        "text.parquet",
        lambda w: _parquet(w / "data/text.parquet", text=[1, 2]),
        r"text is no string",
    ),
    _text(
        "Parquet of nothing", "text.parquet", lambda w: _parquet(w / "data/text.parquet", text=[]), r"gave no document"
    ),
    Case(
        "a folder of damaged texts",
        lambda w: [cut(f"data/text.{each}", 0.0)(w) for each in ("txt", "jsonl", "parquet")],
        lambda w: held_out_documents(TextSource(path=w / "data"), 9),
        r"and 3 more gave no document",
    ),
    _events("no header", "1.csv", b"\xff\xff\n1,2\n", r"no CSV header"),
    _events("empty CSV", "1.csv", "", r"the file is empty"),
    _events("other columns", "1.csv", "y,z\n1,2\n", r"without the columns x, label; it has y, z"),
    _events("columns twice", "1.csv", "x,x,label\n1,2,0\n", r"x"),
    _events("text for numbers", "1.csv", "x,label\nmuch,0\n", r"much"),
    _events("cells too few", "1.csv", "x,label\n1\n", r"1.csv"),
    _events("cells too many", "1.csv", "x,label\n1,0,3\n", r"1.csv"),
    _events("labels of no kind", "1.csv", "x,label\n1,7\n", r"label"),
    _events("a quote left open", "1.csv", 'x,label\n"1,0\n', r"1.csv"),
    _events("rows not UTF-8", "1.csv", b"x,label\n\xff,0\n", r"1.csv"),
    _events("tabs", "1.tsv", "x\tlabel\n1\t0\n", r"of the kind '.tsv'; expected .parquet, .csv or .jsonl"),
    _events("a program", "1.py", "raise SystemExit(7)", r"of the kind '.py'"),
    _events("events are no JSON", "1.jsonl", "x=1\n", r"1.jsonl"),
    _events("events are lists", "1.jsonl", "[1, 0]\n", r"1.jsonl"),
    _events("events are deep", "1.jsonl", '{"x":' * 100_000 + "\n", r"1.jsonl"),
    _events("events without labels", "1.jsonl", '{"x": 1}\n', r"1.jsonl"),
    _events("events beyond all numbers", "1.jsonl", '{"x": 1e999, "label": 0}\n', r"1.jsonl"),
    _events("events of many digits", "1.jsonl", '{"x": ' + "9" * 5000 + ', "label": 0}\n', r"1.jsonl"),
    _events("a carriage return in a row", "1.csv", b"x,label\n1,0\r2,0\n", r"a carriage return in a line"),
    _events("events in no Parquet", "1.parquet", "PAR1", r"not a whole Parquet file"),
    Case(
        "events with a name that is no text",
        lambda w: ((w / "data/events/1.csv").unlink(), _misnamed(w / "data/events/1.parquet", text=[1])),
        events,
        r"not a whole Parquet file: 'utf-8' codec",
    ),
    Case("no folder of events", nothing, lambda w: Folder(w / "none"), r"is not a folder"),
    Case(
        "no event in a batch",
        nothing,
        lambda w: Stream(Rows([]), Schema(columns={"x": Numeric()}, label="label"), batch_size=0, quarantine=w / "q"),
        r"batch_size=0",
    ),
    _schema("no columns", {}, r"column"),
    _schema("a column of no kind", {"x": 3}, r"x"),
    _schema("a column that is the label", {"label": Numeric()}, r"label"),
]


def _parquet(file: Path, **columns: list[object]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table(columns), file)


def _misnamed(file: Path, **columns: list[object]) -> None:
    """A file in which the column `text` has a name that is not UTF-8."""
    _parquet(file, **columns)
    file.write_bytes(file.read_bytes().replace(b"text", b"\xf4ext"))
