from __future__ import annotations

import json
import random
import subprocess
import sys
import tempfile
import threading
import warnings
from collections.abc import Iterator
from datetime import date, datetime
from decimal import Decimal
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from uuid import UUID

import numpy as np
import pandas
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

import matta
from matta.errors import RunError
from matta.streams import Categorical, Encoder, EventBatch, Folder, Numeric, Rows, Schema, Stream
from matta.training.feeding import Feed

SCHEMA = Schema(
    columns={
        "origin": Categorical(buckets=8, required=True),
        "user": Categorical(vocabulary=3),
        "x": Numeric(low=0, high=10),
        "y": Numeric(required=True),
    },
    label="late",
    time="time",
)
HEADER = b"origin,user,x,y,late,time\n"
CSV = b"JFK,ann,3,0.5,1,2013-01-01 05:00:00"
ROW = {"origin": "JFK", "user": "ann", "x": 3.0, "y": 0.5, "late": 1.0, "time": 7.0}


def stream_of(folder: Path, *, schema: Schema = SCHEMA, batch_size: int = 4, **settings: Any) -> Stream:
    source = Folder(folder, **{"idle_s": 0, "settle_s": 0, **settings})
    return Stream(source, schema, batch_size=batch_size, quarantine=folder.parent / "bad.jsonl")


def quarantined(folder: Path) -> list[dict[str, Any]]:
    file = folder.parent / "bad.jsonl"
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.exists() else []


@pytest.fixture
def events(tmp_path: Path) -> Path:
    (tmp_path / "events").mkdir()
    return tmp_path / "events"


def changed(**cells: Any) -> bytes:
    return json.dumps({**ROW, **cells}).encode()


def labels_of(stream: Stream) -> list[float]:
    return [label for batch in stream for label in batch["labels"].tolist()]


BAD_CSV = {
    "too few cells": (b"JFK,ann", "2 cells; expected 6"),
    "too many cells": (CSV + b",1", "7 cells; expected 6"),
    "unbalanced quotes": (b'"' + CSV, "unbalanced quotes"),
    "a carriage return": (CSV + b"\r" + CSV, "a carriage return in a line"),
    "binary line": (b"\x00\x01\xfe\xff", "not text in UTF-8"),
    "control characters": (b"\x00\x01\x02", "1 cells; expected 6"),
    "text for a number": (CSV.replace(b",3,", b",abc,"), "x: received 'abc'; expected a number"),
    "hexadecimal": (CSV.replace(b",3,", b",0x1F,"), "x: received '0x1F'; expected a number"),
    "too large": (CSV.replace(b",3,", b",10.5,"), "x: received '10.5'; expected 0 to 10"),
    "too small": (CSV.replace(b",3,", b",-1,"), "x: received '-1'; expected 0 to 10"),
    "infinite": (CSV.replace(b",0.5,", b",inf,"), "y: received 'inf'; expected a finite number"),
    "too large to square": (CSV.replace(b",0.5,", b",1e200,"), "y: received '1e200'; expected a finite number, to"),
    "overflow": (CSV.replace(b",0.5,", b",1e999,"), "y: received '1e999'"),
    "required number missing": (CSV.replace(b",0.5,", b",,"), "y: received nothing; expected a number"),
    "required category missing": (CSV.replace(b"JFK", b"NA"), "origin: received nothing; expected a category"),
    "not UTF-8": (CSV.replace(b"JFK", b"\xff\xfe"), "not text in UTF-8"),
    "label missing": (CSV.replace(b",1,", b",,"), "late: received nothing; expected a label, 0 to 1"),
    "label too large": (CSV.replace(b",1,", b",2,"), "late: received '2'; expected a label, 0 to 1"),
    "label negative": (CSV.replace(b",1,", b",-1,"), "late: received '-1'"),
    "label in words": (CSV.replace(b",1,", b",yes,"), "late: received 'yes'"),
    "time missing": (b"JFK,ann,3,0.5,1,", "time: received nothing; expected a time"),
    "time in words": (b"JFK,ann,3,0.5,1,soon", "time: received 'soon'; expected a time"),
    "no such day": (b"JFK,ann,3,0.5,1,2013-02-30", "time: received '2013-02-30'"),
    "time out of range": (b"JFK,ann,3,0.5,1,1e18", "time: received '1e18'"),
    "two things wrong": (b"JFK,ann,99,abc,1,5", "x: received '99'; expected 0 to 10; y: received 'abc'"),
}
BAD_JSON = {
    "cut off": (b'{"origin": "JFK"', "not JSON"),
    "not UTF-8": (b'{"origin": "\xff"}', "not JSON"),
    "two objects": (changed() + changed(), "not JSON: Extra data"),
    "list": (b"[1, 2]", "received a list; expected an object"),
    "number": (b"17", "received a int; expected an object"),
    "nested category": (changed(user={"name": "ann"}), "user: received a dict; expected one value"),
    "nested number": (changed(x=[1, 2]), "x: received a list; expected one value"),
    "text for a number": (changed(x="much"), "x: received 'much'; expected a number"),
    "infinite": (changed(y=float("inf")), "y: received"),
    "huge": (changed(y=10**400), "y: received"),
    "null label": (changed(late=None), "late: received nothing"),
    "without a label": (b'{"origin": "JFK", "y": 1, "time": 3}', "late: received nothing"),
    "empty object": (b"{}", "origin: received nothing; expected a category; y: received nothing"),
    "lone surrogate": (b'{"origin": "\\ud800", "y": 1, "late": 1, "time": 3}', "origin: received"),
}
BAD_PARQUET = {
    "infinite": ({"x": float("inf")}, "x: received inf; expected a finite number"),
    "too large": ({"x": 11.0}, "x: received 11.0; expected 0 to 10"),
    "null label": ({"late": None}, "late: received nothing"),
    "label nan": ({"late": float("nan")}, "late: received nan"),
    "label too large": ({"late": 3.0}, "late: received 3.0"),
    "null category": ({"origin": None}, "origin: received nothing"),
    "null time": ({"time": None}, "time: received nothing"),
}


def parquet(rows: list[dict[str, Any]], **settings: Any) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(rows), sink, **settings)
    return sink.getvalue().to_pybytes()


def corrupted(data: bytes) -> bytes:
    """With the pages of the second row group overwritten."""
    group = pq.ParquetFile(pa.BufferReader(data)).metadata.row_group(1)
    start = min(group.column(i).dictionary_page_offset or group.column(i).data_page_offset for i in range(6))
    return data[:start] + b"\xff" * 40 + data[start + 40 :]


WHOLE = parquet([ROW] * 50)
BAD_FILES = {
    "truncated.parquet": (WHOLE[:-100], "not a whole Parquet file"),
    "garbage.parquet": (bytes(range(256)) * 9, "not a whole Parquet file"),
    "empty.parquet": (b"", "the file is empty"),
    "columns.parquet": (parquet([{"a": 1}]), "without the columns origin, user, x, y, late, time; it has a"),
    "text.parquet": (HEADER + CSV, "not a whole Parquet file"),
    "header.csv": (b"origin,user,x\nJFK,ann,1\n", "without the columns y, late, time"),
    "twice.csv": (b"x,x,origin,user,y,late,time\n", "the header names x more than once"),
    "garbage.csv": (b"\xff\xfe\x00" * 50 + b"\n", "no CSV header"),
    "parquet.csv": (WHOLE, "no CSV header"),
    "empty.csv": (b"", "the file is empty"),
    "empty.jsonl": (b"", "the file is empty"),
    "events.xml": (b"<events/>", "of the kind '.xml'; expected .parquet, .csv or .jsonl"),
    "events": (b"", "of the kind 'without a suffix'"),
}


@pytest.mark.parametrize(("line", "reason"), BAD_CSV.values(), ids=BAD_CSV)
def test_bad_rows_of_csv(events: Path, line: bytes, reason: str) -> None:
    (events / "a.csv").write_bytes(HEADER + b"\n".join([CSV, line, CSV]) + b"\n")
    check_one_bad(events, reason, line.decode("utf-8", "backslashreplace"))


@pytest.mark.parametrize(("line", "reason"), BAD_JSON.values(), ids=BAD_JSON)
def test_bad_rows_of_json(events: Path, line: bytes, reason: str) -> None:
    (events / "a.jsonl").write_bytes(b"\n".join([changed(), line, changed()]) + b"\n")
    check_one_bad(events, reason, line.decode("utf-8", "backslashreplace"))


@pytest.mark.parametrize(("cells", "reason"), BAD_PARQUET.values(), ids=BAD_PARQUET)
def test_bad_rows_of_parquet(events: Path, cells: dict[str, Any], reason: str) -> None:
    (events / "a.parquet").write_bytes(parquet([ROW, {**ROW, **cells}, ROW]))
    nonfinite = {name: str(value) for name, value in cells.items() if value is not None and not -99 < value < 99}
    check_one_bad(events, reason, {**ROW, **cells, **nonfinite})


def check_one_bad(events: Path, reason: str, raw: Any) -> None:
    stream = stream_of(events)
    assert labels_of(stream) == [1, 1]
    assert (stream.counts.events, stream.counts.bad_rows, stream.counts.bad_files) == (2, 1, 0)
    (found,) = quarantined(events)
    assert (found["file"], found["row"], found["raw"]) == (next(events.iterdir()).name, 1, raw)
    assert reason in found["reason"]


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_files(events: Path, name: str) -> None:
    content, reason = BAD_FILES[name]
    for good in ("a.csv", "z.csv"):
        (events / good).write_bytes(HEADER + CSV + b"\n")
    (events / name).write_bytes(content)
    stream = stream_of(events)
    assert labels_of(stream) == [1, 1]
    assert (stream.counts.events, stream.counts.bad_rows, stream.counts.bad_files) == (2, 0, 1)
    (found,) = quarantined(events)
    assert (found["file"], found["row"]) == (name, None)
    assert reason in found["reason"]


def test_a_damaged_row_group_alone_is_set_aside(events: Path) -> None:
    (events / "a.parquet").write_bytes(corrupted(parquet([ROW] * 9, row_group_size=3, compression="gzip")))
    stream = stream_of(events)
    assert len(labels_of(stream)) == 6
    assert "rows 3 to 5 cannot be read" in quarantined(events)[0]["reason"]


def test_a_column_of_a_wrong_type_is_bad_in_each_row(events: Path) -> None:
    (events / "a.parquet").write_bytes(parquet([{**ROW, "x": [1.0]}] * 5))
    stream = stream_of(events)
    assert labels_of(stream) == []
    assert [each["row"] for each in quarantined(events)] == list(range(5))
    assert all("x: received [1.0]; expected a number" in each["reason"] for each in quarantined(events))


def test_a_folder_in_the_place_of_a_file_and_a_file_that_was_cut(events: Path) -> None:
    (events / "b.csv").mkdir()
    (events / "a.csv").write_bytes(HEADER + CSV + b"\n" + CSV + b"\n")
    stream = stream_of(events)
    assert len(labels_of(stream)) == 2
    state = stream.state_dict()
    (events / "a.csv").write_bytes(HEADER)
    again = stream_of(events)
    again.load_state_dict(state)
    assert labels_of(again) == []
    assert "no file" in quarantined(events)[0]["reason"]
    assert "it was cut" in quarantined(events)[1]["reason"]


@pytest.mark.parametrize("name", ["a.csv", "a.jsonl", "a.parquet"])
def test_a_file_that_takes_the_name_of_one_that_was_read_is_set_aside(name: str, events: Path) -> None:
    """As logs that are rotated do: what follows at the place reached is no part of the file that was read."""

    def write(first: int) -> None:
        rows = [{**ROW, "time": float(time)} for time in range(first, first + 50)]
        is_csv = name == "a.csv"
        lines = [",".join(map(str, row.values())) if is_csv else json.dumps(row) for row in rows]
        text = (HEADER if is_csv else b"") + "".join(f"{line}\n" for line in lines).encode()
        (events / name).write_bytes(parquet(rows) if name == "a.parquet" else text)

    write(100)
    untouched = stream_of(events, batch_size=20).state_dict()
    write(0)
    stream = stream_of(events, batch_size=20)
    stream.load_state_dict(untouched)
    assert next(stream)["labels"].tolist() == [1.0] * 20, "nothing of it had been read"
    state = stream.state_dict()
    for first, left in ((0, 30), (100, 0)):
        write(first)
        again = stream_of(events, batch_size=20)
        again.load_state_dict(state)
        assert len(labels_of(again)) == left
    assert "not the file that was read under this name: it begins otherwise" in quarantined(events)[0]["reason"]


def test_a_folder_that_is_taken_away_is_told(events: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (events / "a.jsonl").write_bytes(b"\n".join([changed()] * 3))
    monkeypatch.chdir(events.parent)
    stream = Stream(Folder(events.name, idle_s=0), SCHEMA, batch_size=1, quarantine="bad.jsonl")
    monkeypatch.chdir("/")  # a relative path stays what it was
    assert len(labels_of(stream)) == 3
    again = stream_of(events)
    events.rename(events.parent / "moved")
    with pytest.raises(RunError, match="events cannot be read any more: No such file.*; put the folder back"):
        next(again)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "a.jsonl",
            b"\n".join([changed(late=7)] * 5),
            r"5 rows and 0 files .*bad.jsonl; row 0 of a.jsonl: late: received 7",
        ),
        ("a.csv.gz", b"anything", r"0 rows and 1 files .*bad.jsonl; a.csv.gz: of the kind '.gz'; expected .parquet"),
    ],
)
def test_a_stream_of_nothing_but_bad_rows_says_so(events: Path, name: str, content: bytes, message: str) -> None:
    (events / name).write_bytes(content)
    with pytest.warns(UserWarning, match=f"no event fits the schema: {message}"):
        assert labels_of(stream_of(events)) == []


def test_many_bad_rows_among_good_ones_keep_their_order(events: Path) -> None:
    lines = [changed(x=i % 10, late=i % 2) if i % 7 else b"{" for i in range(1000)]
    (events / "a.jsonl").write_bytes(b"\n".join(lines))
    stream = stream_of(events)
    assert labels_of(stream) == [i % 2 for i in range(1000) if i % 7]
    assert [each["row"] for each in quarantined(events)] == list(range(0, 1000, 7))


FORMS = {
    "a.csv": HEADER + b'"JFK",7,3,0.5,true,1970-01-01T00:00:07Z\r\n\r\n EWR,,NA,1,0,8\n',
    "a.jsonl": b'{"origin":"JFK","user":7,"x":3,"y":0.5,"late":true,"time":7,"more":[1]}\n'
    b'{"origin":" EWR","x":null,"y":1,"late":false,"time":8.0}\n',
    "a.parquet": parquet([
        {"origin": "JFK", "user": 7, "x": 3.0, "y": 0.5, "late": True, "time": 7},
        {"origin": " EWR", "user": None, "x": None, "y": 1.0, "late": False, "time": 8},
    ]),
}  # fmt: skip


def test_the_same_event_in_every_format_is_the_same(tmp_path: Path) -> None:
    found = []
    for name, content in FORMS.items():
        folder = tmp_path / name / "events"
        folder.mkdir(parents=True)
        (folder / name).write_bytes(content)
        (batch,) = stream_of(folder)
        found.append({**batch, "times": batch.times})
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=0, atol=0)
    assert found[0]["categorical"][:, 1].tolist() == [2, 0]
    assert found[0]["numeric"][:, 2].tolist() == [0, 1], "the second x is missing, and y is required"
    assert found[0]["times"].tolist() == [7, 8]


@pytest.mark.parametrize("ending", ["csv", "jsonl"])
def test_a_category_may_be_missing_from_all_rows(events: Path, ending: str) -> None:
    line = HEADER + CSV.replace(b"ann", b"") if ending == "csv" else changed(user=None)
    (events / f"1.{ending}").write_bytes(line + b"\n")
    assert [batch["categorical"][:, 1].tolist() for batch in stream_of(events)] == [[0]]
    assert quarantined(events) == []


NOT_A_NUMBER = float("nan")
SAME = {
    "7": [7, 7.0, "7", "7.0", b"7", np.int32(7), np.float32(7), np.array(7), torch.tensor(7), Decimal("7.00")],
    "true": [True, "true", "True", np.bool_(True)],
    "a": ["a", b"a", np.str_("a")],
    None: [None, "", NOT_A_NUMBER, np.float32("nan"), pandas.NA, pandas.NaT],
    "2020-01-02": ["2020-01-02", date(2020, 1, 2)],
    "2020-01-02 03:00:00": ["2020-01-02 03:00:00", datetime(2020, 1, 2, 3), pandas.Timestamp("2020-01-02 03:00")],
    "8d7b1e3c-0000-4000-8000-000000000001": [UUID("8d7b1e3c-0000-4000-8000-000000000001")],
}
NO_CATEGORY = {
    "1.5": ([1.5, np.float32(1.5), torch.tensor(1.5), Decimal("1.5")], "a whole number"),
    "object": ([object()], "received a object; expected one value"),
    "many": ([torch.ones(2), np.ones(2)], "; expected "),
}
BESIDE: dict[str, list[Any]] = {
    "alone": [],
    "text": ["b"],
    "number": [3],
    "fraction": [2.5],
    "truth": [False],
    "nothing": [None],
}


@pytest.mark.parametrize("beside", BESIDE)
def test_a_category_is_what_it_is_whatever_stands_beside_it(tmp_path: Path, beside: str) -> None:
    """With None, NaN too, of which pandas makes much: a category "nan" would be learned, and not be served."""
    schema = Schema(columns={"user": Categorical(vocabulary=9)}, label="late")

    def stream(cell: Any, columns: bool = False) -> Stream:
        cells = [cell, *BESIDE[beside]]
        events: Any = (
            [{"user": cells, "late": [0] * len(cells)}] if columns else [{"user": c, "late": 0} for c in cells]
        )
        return Stream(Rows(events, columns=columns), schema, batch_size=9, quarantine=tmp_path / "bad.jsonl")

    for expected, cells in SAME.items():
        for cell, columns in product(cells, (False, True)):
            found = stream(cell, columns)
            ids = next(found)["categorical"][:, 0].tolist()
            assert ids[0] == (0 if expected is None else 2)
            known = found.encoder.state_dict()["vocabularies"]["user"]
            assert known[:1] == [expected] if expected else expected not in known
            assert found.encoder.encode([{"user": cell}])["categorical"].tolist() == [ids[:1]]
    for cells, reason in NO_CATEGORY.values():
        for cell, columns in product(cells, (False, True)):
            (tmp_path / "bad.jsonl").unlink(missing_ok=True)
            found = stream(cell, columns)
            assert len(labels_of(found)) == len(BESIDE[beside]) - (beside == "fraction")
            found.state_dict()
            line = json.loads((tmp_path / "bad.jsonl").read_text().splitlines()[0])
            assert (line["row"], reason in line["reason"]) == (0, True)
            with pytest.raises(RunError, match="row 0 does not fit the schema: user: received"):
                found.encoder.encode([{"user": cell}])


@pytest.mark.parametrize("ending", ["csv", "jsonl", "parquet"])
def test_what_pandas_writes_is_what_is_served(events: Path, ending: str) -> None:
    """A column of whole numbers or truths with a gap is written as 7.0 and True to CSV."""
    frame = pandas.DataFrame({"user": [7, None, 8, 7], "origin": [True, False, True, None], "late": [0, 1, 0, 1]})
    if ending == "csv":
        frame.to_csv(events / "a.csv", index=False)
    elif ending == "jsonl":
        frame.to_json(events / "a.jsonl", orient="records", lines=True)
    else:
        frame.to_parquet(events / "a.parquet")
    columns = {"user": Categorical(vocabulary=9), "origin": Categorical(buckets=1000)}
    stream = stream_of(events, schema=Schema(columns=columns, label="late"))
    ids = next(stream)["categorical"].tolist()
    rows = [{"user": 7, "origin": True}, {"user": None, "origin": False}, {"user": 8, "origin": True}, {"user": 7}]
    assert stream.encoder.encode(rows)["categorical"].tolist() == ids
    assert [user for user, _ in ids] == [2, 0, 3, 2]


@pytest.mark.parametrize("columns", [False, True])
def test_times_of_two_kinds_are_each_read_as_what_they_are(tmp_path: Path, columns: bool) -> None:
    """Arrow would make dates of both: 1,357,016,400 seconds would be 22 minutes past midnight in 1970."""
    times = [datetime(2013, 1, 1, 5), 1_357_016_400, "2013-01-01T05:00:00Z", 1_357_016_400.0, date(2013, 1, 1)]
    schema = Schema(columns={"x": Numeric()}, label="late", time="time")
    events: Any = [{"x": 1, "late": 0, "time": each} for each in times]
    if columns:
        events = [{"x": [1] * 5, "late": [0] * 5, "time": times}]
    stream = Stream(Rows(events, columns=columns), schema, batch_size=5, quarantine=tmp_path / "bad.jsonl")
    found = next(stream).times
    assert found is not None and found.tolist() == [1_357_016_400.0] * 4 + [1_356_998_400.0]


def test_times_may_have_more_digits_than_microseconds(tmp_path: Path) -> None:
    schema = Schema(columns={"x": Numeric()}, label="late", time="time")
    times = ["2013-01-01T05:00:00.1234567Z", "2013-01-01T07:00:00.123456789+02:00", "2013-01-01 05:00:00.123456999"]
    rows = Rows([{"x": 1, "late": 0, "time": each} for each in [*times, "2013-01-01T05:00:00.12x", "05:00:00.1234567"]])
    stream = Stream(rows, schema, batch_size=5, quarantine=tmp_path / "bad.jsonl")
    found = next(stream).times
    assert found is not None and found.tolist() == [1_357_016_400.123456] * 3
    assert stream.counts.bad_rows == 2


@pytest.mark.parametrize("times", [[20130131, 20130201], ["20130131"], [20130131.0, 20130101]])
def test_dates_that_are_written_as_numbers_are_told(tmp_path: Path, times: list[Any]) -> None:
    schema = Schema(columns={"x": Numeric()}, label="late", time="time")
    rows = [{"x": 1, "late": 0, "time": each} for each in times] * 3

    def stream(events: list[Any]) -> Stream:
        return Stream(Rows(events, num_rows=2), schema, batch_size=2, quarantine=tmp_path / "bad.jsonl")

    with pytest.warns(UserWarning, match="time: received 20130131, which is 20,130,131 seconds, in 1970; exp") as told:
        assert len(labels_of(stream(rows))) == len(rows)
    assert len(told) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for others in ([20131301, 20130131], [20130131.5], [1_357_016_400], ["2013-01-31"], [0]):
            labels_of(stream([{"x": 1, "late": 0, "time": each} for each in others]))


CELLS = [
    "a",
    "b",
    7,
    7.0,
    "7",
    True,
    "True",
    None,
    NOT_A_NUMBER,
    1.5,
    [1],
    np.int64(7),
    date(2020, 1, 1),
    b"a",
    pandas.NA,
]
NUMBERS = [1, 2.5, None, "3", "x", NOT_A_NUMBER, -10, True, np.float32(0.5), torch.tensor(2.5)]
TIMES = [0, 1.0, datetime(2020, 1, 1), "2020-01-01", None]


@pytest.mark.parametrize("seed", range(4))
def test_events_of_mixed_cells_give_the_same_batches_however_they_are_cut(tmp_path: Path, seed: int) -> None:
    draw = random.Random(seed)
    columns = {"c": Categorical(vocabulary=6), "x": Numeric(low=-9), "y": Numeric()}
    schema = Schema(columns=columns, label="late", time="time")
    choices = {"c": CELLS, "x": NUMBERS, "y": [1.0, 2], "late": [0, 1, "1", True, 2], "time": TIMES}
    rows = [{name: draw.choice(cells) for name, cells in choices.items()} for _ in range(150)]
    pieces = [{name: [row[name] for row in rows[i : i + 40]] for name in choices} for i in range(0, 150, 40)]

    def batches(source: Rows, name: str) -> tuple[list[Any], list[int]]:
        stream, found = Stream(source, schema, batch_size=4, quarantine=tmp_path / name), []
        for batch in stream:
            found.append(({key: each.tolist() for key, each in batch.items()}, batch.times))
        return found, [json.loads(line)["row"] for line in (tmp_path / name).read_text().splitlines()]

    one_by_one = batches(Rows(rows, num_rows=1), "1")
    assert 5 < len(one_by_one[0]) < 30
    for name, source in {"7": Rows(rows, num_rows=7), "all": Rows(rows), "c": Rows(pieces, columns=True)}.items():
        assert repr(batches(source, name)) == repr(one_by_one)


KINDS = {
    "list": pa.list_(pa.int64()),
    "struct": pa.struct([("a", pa.int64())]),
    "map": pa.map_(pa.string(), pa.int64()),
}


@pytest.mark.parametrize("kind", KINDS)
def test_nested_categories_of_parquet_are_set_aside(events: Path, kind: str) -> None:
    cell = {"list": [1], "struct": {"a": 1}, "map": [("a", 1)]}[kind]
    table = pa.table({"user": pa.array([cell, None, cell], KINDS[kind]), "late": [0, 1, 0]})
    pq.write_table(table, events / "a.parquet")
    stream = stream_of(events, schema=Schema(columns={"user": Categorical(vocabulary=3)}, label="late"))
    assert labels_of(stream) == [1]
    assert ["expected text in UTF-8" in each["reason"] for each in quarantined(events)] == [True, True]


def test_columns_with_a_cell_that_is_none_set_its_row_aside(tmp_path: Path) -> None:
    """It is told, and not taken for a missing one; also where a run resumes in the middle of the columns."""
    schema = Schema(columns={"user": Categorical(vocabulary=9), "x": Numeric()}, label="late")
    given = {"user": ["a", [1], "b", {"c": 1}, "a"], "x": [1, 2, 3, 4, 5], "late": [0, 0, 1, 0, 1]}

    def stream() -> Stream:
        return Stream(Rows([given], columns=True), schema, batch_size=2, quarantine=tmp_path / "bad.jsonl")

    first = stream()
    assert next(first)["labels"].tolist() == [0, 1]
    state = first.state_dict()
    second = stream()
    second.load_state_dict(state)
    assert labels_of(second) == [1]
    lines = [json.loads(line) for line in (tmp_path / "bad.jsonl").read_text().splitlines()]
    assert [(each["row"], each["reason"], each["raw"]["x"]) for each in lines] == [
        (1, "user: received a list; expected one value", 2),
        (3, "user: received a dict; expected one value", 4),
    ]


@pytest.mark.parametrize("ending", ["jsonl", "rows"])
def test_a_column_that_no_event_has_is_told_once(events: Path, ending: str) -> None:
    """A misspelt name would be a feature that is always missing."""
    columns = {
        "x": Numeric(),
        "disstance": Numeric(),
        "orgin": Categorical(buckets=8),
        "origin": Categorical(buckets=8),
    }
    schema = Schema(columns=columns, label="late")
    rows = [{"x": 1.0 if i == 900 else None, "distance": i, "origin": "JFK", "late": 0} for i in range(3000)]
    (events / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))

    def stream() -> Stream:
        source = Folder(events, idle_s=0) if ending == "jsonl" else Rows(rows)
        return Stream(source, schema, batch_size=500, quarantine=events.parent / "bad.jsonl")

    first = stream()
    next(first)
    with pytest.warns(UserWarning, match=r"^disstance, orgin: missing from all of 1,000 events and more; .* misspelt"):
        next(first)
    state = first.state_dict()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(list(first)) == 4
    second = stream()
    second.load_state_dict(state)
    next(second)
    with pytest.warns(UserWarning, match="disstance, orgin, x: missing from all of 1,000 events"):
        next(second)


def test_vocabularies_grow_to_their_limit(events: Path) -> None:
    (events / "a.jsonl").write_bytes(b"\n".join(changed(user=user) for user in ["b", "a", "b", None, "c", "d", "c"]))
    stream = stream_of(events, batch_size=10)
    assert next(stream)["categorical"][:, 1].tolist() == [2, 3, 2, 0, 4, 1, 4]
    assert stream.encoder.state_dict()["vocabularies"] == {"user": ["b", "a", "c"]}


def test_numbers_are_normalised_by_what_came_before_the_batch(events: Path) -> None:
    random = np.random.default_rng(0)
    x, y = random.uniform(0, 10, 60), random.normal(1e6, 3, 60)
    x[random.random(60) < 0.3] = np.nan
    rows = [{**ROW, "x": None if np.isnan(a) else a, "y": b} for a, b in zip(x, y, strict=True)]
    (events / "a.parquet").write_bytes(parquet(rows))
    for index, batch in enumerate(stream_of(events, batch_size=7)):
        before, now = slice(0, 7 * index), slice(7 * index, 7 * index + 7)
        for column, values in enumerate((x, y)):
            expected = np.zeros(len(values[now]))
            if index:
                expected = (values[now] - np.nanmean(values[before])) / np.nanstd(values[before])
            expected = np.clip(np.nan_to_num(expected), -10, 10)
            np.testing.assert_allclose(batch["numeric"][:, column], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("value", [0.1, 0.7, 1e9 + 0.1, -1e-9 / 3])
@pytest.mark.parametrize("batch_size", [1, 7, 64])
def test_a_column_that_never_changes_is_zero(tmp_path: Path, value: float, batch_size: int) -> None:
    """The sum of 7 times 0.1 is not 0.7, and what is left over is no deviation to divide by."""
    schema = Schema(columns={"x": Numeric()}, label="late")
    rows = [{"x": None if i % 5 == 3 else value, "late": 0} for i in range(200)]
    stream = Stream(Rows(rows), schema, batch_size=batch_size, quarantine=tmp_path / "bad.jsonl")
    assert all((batch["numeric"][:, 0] == 0).all() for batch in stream)
    found = stream.encoder.state_dict()["statistics"]
    assert found == {"count": [160.0], "mean": [value], "squares": [0.0]}


@pytest.mark.parametrize("columns", [("x", "y"), ("y",)], ids=len)
def test_batches_of_one_block_are_what_they_are_one_by_one(events: Path, columns: tuple[str, ...]) -> None:
    """A block is normalised in one go; pieces of three rows are not. Bit for bit, the statistics too."""
    random = np.random.default_rng(0)
    x, y = random.normal(5, 1, 500), random.normal(1e6, 3, 500)
    rows = [{**ROW, "x": None if b > 1e6 + 4 else a, "y": b} for a, b in zip(x, y, strict=True)]
    (events / "a.parquet").write_bytes(parquet(rows))
    kept = {name: each for name, each in SCHEMA.columns.items() if name in columns}
    schema = Schema(columns=kept, label="late", time="time")
    at_once, in_pieces = (stream_of(events, schema=schema, batch_size=7, num_rows=rows) for rows in (1000, 3))
    for one, other in zip(at_once, in_pieces, strict=True):
        assert all(torch.equal(one[name], other[name]) for name in ("numeric", "labels"))
        assert at_once.encoder.state_dict() == in_pieces.encoder.state_dict()
    assert at_once.counts.events == 500


def numbered(count: int, start: int = 0) -> list[dict[str, Any]]:
    return [
        {**ROW, "user": f"u{i % 5}", "x": 99.0 if i % 9 == 4 else (None if i % 4 == 1 else i % 10), "time": float(i)}
        for i in range(start, start + count)
    ]


def write_mixed(folder: Path) -> None:
    """51 good events of 57 in three formats."""
    (folder / "a.parquet").write_bytes(parquet(numbered(20), row_group_size=8))
    cells = [["" if each is None else str(each) for each in row.values()] for row in numbered(20, 20)]
    (folder / "b.csv").write_bytes(HEADER + "\n".join(",".join(row) for row in cells).encode())
    (folder / "c.jsonl").write_bytes(b"\n".join(json.dumps(row).encode() for row in numbered(17, 40)))


def as_lists(batches: Iterator[EventBatch] | Stream) -> list[Any]:
    return [[each.tolist() for each in (*batch.values(), batch.times)] for batch in batches if batch.times is not None]


@pytest.mark.parametrize("num_batches", range(13))
def test_a_stream_goes_on_at_any_batch(events: Path, num_batches: int) -> None:
    write_mixed(events)
    stream = stream_of(events)
    whole = as_lists(stream)
    bad = quarantined(events)
    assert sum(len(each[-1]) for each in whole) == stream.counts.events == 51
    assert (len(bad), stream.counts.bad_rows) == (6, 6)

    begun = stream_of(events, block_bytes=100, num_rows=3)
    first = as_lists(next(begun) for _ in range(num_batches))
    state = json.loads(json.dumps(begun.state_dict()))
    next(begun, None)  # what comes after the checkpoint is forgotten
    resumed = stream_of(events, block_bytes=130, num_rows=5)
    resumed.load_state_dict(state)
    assert first + as_lists(resumed) == whole
    assert quarantined(events) == bad
    assert resumed.counts == stream.counts
    assert resumed.encoder.state_dict() == stream.encoder.state_dict()


def test_a_stream_begun_afresh_keeps_the_earlier_quarantine(events: Path) -> None:
    (events / "a.jsonl").write_bytes(b"{\n")
    for _ in range(3):
        assert labels_of(stream_of(events)) == []
    names = ["bad.jsonl", "bad.jsonl.1", "bad.jsonl.2"]
    assert sorted(each.name for each in events.parent.glob("bad*")) == names
    assert len({(events.parent / name).read_text(encoding="utf-8") for name in names}) == 1


def test_a_quarantine_that_lost_lines_is_an_error(events: Path) -> None:
    (events / "a.jsonl").write_bytes(b"{\n")
    stream = stream_of(events)
    assert labels_of(stream) == []
    (events.parent / "bad.jsonl").write_text("")
    with pytest.raises(RunError, match="expected the file that the run wrote: put it back"):
        stream_of(events).load_state_dict(stream.state_dict())


def test_files_that_grow_while_they_are_read(events: Path) -> None:
    rows = [{**ROW, "time": float(i)} for i in range(300)]
    text = HEADER + b"".join(",".join(map(str, row.values())).encode() + b"\n" for row in rows[:200])

    def write() -> None:
        for start in range(0, len(text), 377):  # in the middle of lines, and of the header
            with (events / "a.csv").open("ab") as file:
                file.write(text[start : start + 377])
        with (events / "b.jsonl").open("ab") as file:
            file.writelines(json.dumps(row).encode() + b"\n" for row in rows[200:250])
        whole = parquet(rows[250:])
        (events / "c.parquet").write_bytes(whole[:500])  # not whole yet
        (events / "c.parquet").write_bytes(whole)
        (events / "_END").touch()

    writer = threading.Thread(target=write)
    writer.start()
    stream = stream_of(events, idle_s=None, settle_s=60, poll_s=0.001, batch_size=7)
    found = [time for batch in stream for time in batch.times.tolist()]  # type: ignore[union-attr]
    writer.join()
    assert found == list(range(300))
    assert stream.counts.bad_rows == stream.counts.bad_files == 0


def test_a_late_file_is_read_next_and_lines_without_an_end_wait(events: Path) -> None:
    (events / "b.jsonl").write_bytes(changed(time=1) + b"\n" + changed(time=2)[:30])
    source = Folder(events, idle_s=60, poll_s=0.01)
    stream = Stream(source, SCHEMA, batch_size=1, quarantine=events.parent / "bad.jsonl")
    assert next(stream).times.tolist() == [1]  # type: ignore[union-attr]
    (events / "a.jsonl").write_bytes(changed(time=3) + b"\n")
    assert next(stream).times.tolist() == [3]  # type: ignore[union-attr]
    (events / "b.jsonl").write_bytes(changed(time=1) + b"\n" + changed(time=2) + b"\n")
    assert next(stream).times.tolist() == [2]  # type: ignore[union-attr]


def test_an_idle_stream_ends_and_a_number_of_events_ends_it(events: Path) -> None:
    write_mixed(events)
    source = Folder(events, idle_s=0.02, settle_s=0, poll_s=0.01)
    stream = Stream(source, SCHEMA, batch_size=20, quarantine=events.parent / "bad.jsonl", max_events=30)
    assert [len(batch["labels"]) for batch in stream] == [20, 10]
    stream = Stream(source, SCHEMA, batch_size=20, quarantine=events.parent / "bad.jsonl")
    assert [len(batch["labels"]) for batch in stream] == [20, 20, 11]


def column_batches(rows: list[dict[str, Any]]) -> list[Any]:
    parts = [rows[start : start + 7] for start in range(0, len(rows), 7)]
    columns = [{name: [row[name] for row in part] for name in ROW} for part in parts]
    return [pa.table(each) if index % 2 else each for index, each in enumerate(columns)]


SOURCES = {
    "rows": lambda rows: Rows(rows, num_rows=10),
    "function": lambda rows: Rows(lambda start: iter(rows[start:]), num_rows=6),
    "columns": lambda rows: Rows(column_batches(rows), columns=True),
}


@pytest.mark.parametrize("source", SOURCES.values(), ids=SOURCES)
@pytest.mark.parametrize("num_batches", [0, 1, 5, 12, 13])
def test_iterators_go_on_too(tmp_path: Path, source: Any, num_batches: int) -> None:
    rows = numbered(57)

    def stream() -> Stream:
        return Stream(source(rows), SCHEMA, batch_size=4, quarantine=tmp_path / "bad.jsonl")

    whole = as_lists(stream())
    begun = stream()
    first = as_lists(batch for _, batch in zip(range(num_batches), begun, strict=False))
    resumed = stream()
    resumed.load_state_dict(begun.state_dict())
    assert first + as_lists(resumed) == whole
    assert (resumed.counts.events, resumed.counts.bad_rows) == (51, 6)


def test_rows_that_are_no_mappings_are_set_aside(tmp_path: Path) -> None:
    rows: list[Any] = [ROW, None, {**ROW, "x": {1}}, {**ROW, "user": b"\xff"}, ROW, 7]
    stream = Stream(Rows(rows), SCHEMA, batch_size=9, quarantine=tmp_path / "bad.jsonl")
    assert labels_of(stream) == [1, 1]
    assert [each["row"] for each in quarantined(tmp_path / "events")] == [1, 2, 3, 5]


def test_classes_and_required_are_checked(tmp_path: Path) -> None:
    schema = Schema(columns={"x": Numeric()}, label="kind", num_classes=3)
    rows = [{"x": 1, "kind": kind} for kind in (0, 2, 3, 1.5, -1, None, True)]
    (batch,) = Stream(Rows(rows), schema, batch_size=9, quarantine=tmp_path / "bad.jsonl")
    assert batch["labels"].tolist() == [0, 2, 1]
    assert batch["labels"].dtype == torch.int64 and "categorical" not in batch


def test_the_encoder_of_a_state_predicts_as_the_stream_does(events: Path) -> None:
    write_mixed(events)
    stream = stream_of(events, batch_size=20)
    next(stream)
    encoder = Encoder.from_state(json.loads(json.dumps(stream.encoder.state_dict())))
    good = [row for row in numbered(57) if row["x"] != 99.0][20:40]
    encoded, batch = encoder.encode(good), next(stream)
    torch.testing.assert_close(dict(encoded), {name: batch[name] for name in encoded}, rtol=0, atol=0)
    with pytest.raises(RunError, match="row 0 does not fit the schema: x: received 11"):
        encoder.encode([{**ROW, "x": 11.0}])
    for none in ([], {**ROW}):
        with pytest.raises(RunError, match="expected a list of rows, such as"):
            encoder.encode(none)


BAD_SETTINGS = {
    "no folder": (lambda: Folder("nowhere"), "nowhere is not a folder"),
    "no column": (lambda: Schema(columns={}, label="y"), "expected at least one feature"),
    "two roles": (lambda: Schema(columns={"y": Numeric()}, label="y"), "columns of no other role"),
    "range": (lambda: Numeric(low=2, high=1), "expected low to be at most high"),
    "neither": (lambda: Categorical(), "expected one of them"),
    "both": (lambda: Categorical(buckets=1, vocabulary=1), "expected one of them"),
    "batch": (lambda: Stream(Rows([]), SCHEMA, batch_size=0, quarantine="bad"), "expected 1 or more"),
    "lengths": (
        lambda: next(Stream(Rows([{"x": [1], "y": [1, 2]}], columns=True), SCHEMA, batch_size=1, quarantine="bad")),
        "expected columns of one length",
    ),
    "kind": (
        lambda: next(Stream(Rows([3], columns=True), SCHEMA, batch_size=1, quarantine="bad")),
        "received int; expected a mapping of columns",
    ),
}


@pytest.mark.parametrize(("make", "message"), BAD_SETTINGS.values(), ids=BAD_SETTINGS)
def test_settings_that_cannot_work_are_refused(make: Any, message: str) -> None:
    with pytest.raises(RunError, match=message):
        make()


def test_another_schema_cannot_go_on(tmp_path: Path) -> None:
    state = Stream(Rows([]), SCHEMA, batch_size=1, quarantine=tmp_path / "bad").state_dict()
    other = Schema(columns={"x": Numeric()}, label="late")
    with pytest.raises(RunError, match="the run was begun with the schema"):
        Stream(Rows([]), other, batch_size=1, quarantine=tmp_path / "bad").load_state_dict(state)


def test_a_stream_is_for_one_process(tmp_path: Path) -> None:
    stream = Stream(Rows([]), SCHEMA, batch_size=1, quarantine=tmp_path / "bad")
    accelerator = SimpleNamespace(device=torch.device("cpu"), process_index=0, num_processes=2)
    with pytest.raises(RunError, match="expected one process"):
        Feed(stream, accelerator, 1)


def test_a_batch_moves_with_its_times() -> None:
    batch = EventBatch(labels=torch.ones(2))
    batch.times = torch.zeros(2)
    moved = batch.to("meta")
    assert moved["labels"].is_meta and moved.times is batch.times


class Model(torch.nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.hidden, self.out = torch.nn.Linear(SCHEMA.num_numbers, width), torch.nn.Linear(width, 1)

    def forward(self, categorical: torch.Tensor, numeric: torch.Tensor) -> torch.Tensor:
        return self.out(torch.relu(self.hidden(numeric))).squeeze(-1)


def test_a_run_that_has_ended_goes_on_with_files_that_have_come_since(events: Path) -> None:
    def train() -> tuple[matta.Nested, int]:
        torch.manual_seed(0)
        nested = matta.nest(Model(3), Model(6))
        optimizer = torch.optim.Adagrad(nested.parameters(), lr=0.1)
        cotrain = matta.CoTraining(nested, matta.objectives.Binary())
        stream = stream_of(events)
        run = events.parent / "run"
        result = matta.fit(cotrain, stream, optimizer, run=run, resume=True, tensorboard=False, progress=False)
        return nested, result.steps

    (events / "a.parquet").write_bytes(parquet([ROW] * 12))
    assert [train()[1], train()[1]] == [3, 3]
    (events / "b.parquet").write_bytes(parquet([ROW] * 9))
    assert [train()[1], train()[1]] == [6, 6]


@pytest.mark.parametrize("kills", [3, pytest.param(25, marks=pytest.mark.stress)])
def test_killed_at_many_moments_a_run_ends_as_if_it_had_not_been(kills: int) -> None:
    script = Path(__file__).with_name("stream_crashes.py")
    memory = Path("/dev/shm")  # where fsync costs nothing: kills, unlike power cuts, do not need the disk
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as folder:
        done = subprocess.run([sys.executable, str(script), folder, str(kills), "0"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["kills"] == kills and found["ended"] >= 1
    assert found["differing"] == [], "weights, quarantine, statistics and metrics are those of the run without kills"
    assert found["trained"] == [1], "every event once"
    assert found["counts"] == [400, found["num_bad"], 1]
