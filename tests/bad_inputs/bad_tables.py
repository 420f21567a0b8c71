"""Tables of sizes (`family.json`), and logs of answers and outcomes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from bad_cases import Case, Damage, cut, edit, write

from matta.ab_testing import AnswerLog

FAMILY, LOG = "nesting/family.json", "data/answers.jsonl"


def _family(name: str, damage: Damage, line: str) -> Case:
    return Case(name, damage, "choose {w}/nesting --parameters 100", line)


def _ab(name: str, damage: Damage, line: str, run: str = "ab {w}/" + LOG) -> Case:
    return Case(name, damage, run, line)


def _line(**changes: Any) -> Damage:
    """A line in the middle with other values; None takes one out."""

    def damage(folder: Path) -> None:
        lines = (folder / LOG).read_text().splitlines()
        values = {**json.loads(lines[4]), **changes}
        lines[4] = json.dumps({key: value for key, value in values.items() if value is not None})
        (folder / LOG).write_text("\n".join(lines) + "\n")

    return damage


def _table(**columns: list[Any]) -> Damage:
    def damage(folder: Path) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.table(columns), folder / "log.parquet")

    return damage


SIZE = {
    "name": "a",
    "layers": {},
    "parameters": 1,
    "bytes": 1,
    "flops": 1,
    "activation_bytes": 1,
    "latencies": [],
    "quality": 1,
}
CASES = [
    _family("cut off", cut(FAMILY), r"family.json is no family of matta's, or is damaged"),
    _family("a list", write(FAMILY, "[]"), r"family.json is no family"),
    _family("a number", write(FAMILY, "3"), r"family.json is no family"),
    _family("deep", write(FAMILY, "[" * 100_000), r"family.json is no family"),
    _family("not UTF-8", write(FAMILY, b"\xff"), r"family.json is no family"),
    _family("of another version", edit(FAMILY, version=7), r"family.json is no family"),
    _family("without sizes", edit(FAMILY, sizes=[]), r"family.json is no family"),
    _family("sizes are numbers", edit(FAMILY, sizes=[1, 2]), r"family.json is no family"),
    _family("sizes with a word", edit(FAMILY, sizes=[{**SIZE, "parameters": "many"}]), r"family.json is no family"),
    _family("sizes without layers", edit(FAMILY, sizes=[{**SIZE, "layers": None}]), r"family.json is no family"),
    _family(
        "sizes with other layers", edit(FAMILY, sizes=[{**SIZE, "layers": {"0": "broad"}}]), r"family.json is no family"
    ),
    _family("latencies are a number", edit(FAMILY, sizes=[{**SIZE, "latencies": 3}]), r"family.json is no family"),
    _family("with a key more", edit(FAMILY, more=1), r"family.json is no family"),
    Case("report of a damaged table", cut(FAMILY), "report {w}/nesting", r"family.json is no family"),
    Case(
        "report of sizes with words",
        edit(FAMILY, sizes=[{**SIZE, "quality": "good"}]),
        "report {w}/nesting",
        r"family.json is no family",
    ),
    Case(
        "serve of a damaged table",
        cut(FAMILY),
        "serve {w}/run --family {w}/nesting/family.json",
        r"family.json is no family",
    ),
    # --- logs
    _ab("log is empty", write(LOG, ""), r"hold no answers"),
    _ab("log is binary", write(LOG, bytes(range(256)) * 9), r"answers.jsonl"),
    _ab("log is an object", write(LOG, "{}\n{}\n{}\n"), r"answers.jsonl"),
    _ab("log is a list", write(LOG, "[]\n[]\n[]\n"), r"answers.jsonl"),
    _ab("log is deep", write(LOG, "[" * 100_000 + "\n{}\n{}\n"), r"answers.jsonl"),
    _ab(
        "log of one arm",
        write(
            LOG,
            json.dumps({"kind": "answer", "id": "a", "arm": "A", "predictions": [1.0], "time_s": 1.0, "latency_ms": 1})
            + "\n",
        ),
        r"arm|outcome",
    ),
    _ab("line without an id", _line(id=None), r"answers.jsonl"),
    _ab("line without an arm", _line(arm=None), r"answers.jsonl"),
    _ab("line with a list for an arm", _line(arm=["A"]), r"answers.jsonl"),
    _ab("line without predictions", _line(predictions=None), r"answers.jsonl"),
    _ab("line with a word for predictions", _line(predictions="high"), r"answers.jsonl"),
    _ab("line with words for predictions", _line(predictions=["high"]), r"answers.jsonl"),
    _ab("line with no finite number", _line(predictions=[float("nan")]), r"answers.jsonl"),
    _ab("line with no time", _line(time_s="noon"), r"answers.jsonl"),
    _ab("line of another kind", _line(kind="guess"), r"answers.jsonl"),
    _ab("line with a number beyond all", _line(predictions=[10**400]), r"answers.jsonl"),
    _ab("log is no Parquet", write("log.parquet", b"PAR1" * 9), r"log.parquet", "ab {w}/log.parquet"),
    _ab(
        "log is cut off Parquet",
        lambda w: (_table(kind=["answer"] * 99)(w), cut("log.parquet")(w)),
        r"log.parquet",
        "ab {w}/log.parquet",
    ),
    _ab("log of other columns", _table(x=[1, 2]), r"log.parquet", "ab {w}/log.parquet"),
    _ab(
        "log of other types",
        _table(kind=["answer"], id=[1], arm=["A"], predictions=["x"], time_s=[1.0], latency_ms=[1.0]),
        r"log.parquet",
        "ab {w}/log.parquet",
    ),
    _ab("outcomes of nothing", write("x", ""), r"none", "ab {w}/" + LOG + " --outcomes {w}/none.jsonl"),
    _ab(
        "outcomes without ids",
        write("o.jsonl", '{"outcomes": [1]}\n{"outcomes": [1]}\n'),
        r"o.jsonl",
        "ab {w}/" + LOG + " --outcomes {w}/o.jsonl",
    ),
    _ab(
        "outcomes of another form",
        write("o.jsonl", '{"id": "r1", "outcomes": 1}\n{"id": "r2", "outcomes": {}}\n'),
        r"o.jsonl",
        "ab {w}/" + LOG + " --outcomes {w}/o.jsonl",
    ),
    Case(
        "log to be continued is none",
        write(LOG, "a note"),
        lambda w: AnswerLog(w / LOG),
        r"which is no line of an AnswerLog",
    ),
]
