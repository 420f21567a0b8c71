"""Answers and outcomes, joined by id from files of all sorts."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from matta.ab_testing.joining import Joined, read_logs
from matta.errors import AbError


def answered(request_id: str, *predictions: float, arm: str = "A", time_s: float | None = 0.0) -> dict[str, Any]:
    told = {"kind": "answer", "id": request_id, "arm": arm, "model": "m", "version": 1, "latency_ms": 2.0}
    return {**told, "predictions": predictions or [0.5], "time_s": time_s}


def came(request_id: str, *outcomes: float, time_s: float | None = 1.0) -> dict[str, Any]:
    return {"kind": "outcome", "id": request_id, "outcomes": outcomes or [1.0], "time_s": time_s}


def write(path: Path, *records: dict[str, Any], end: str = "") -> Path:
    path.write_text("".join(json.dumps(each) + "\n" for each in records) + end)
    return path


def rows(joined: Joined) -> list[tuple[int, float, float]]:
    return [*zip(joined.request.tolist(), joined.predictions.tolist(), joined.outcomes.tolist(), strict=True)]


def test_rows_of_a_request_stay_together(tmp_path: Path) -> None:
    log = write(
        tmp_path / "log.jsonl", answered("a", 1, 2, 3), came("b", 0), answered("b", 4, arm="B"), came("a", 1, 0, 1)
    )
    joined = read_logs([log])
    assert joined.arms == ("A", "B")
    assert joined.arm.tolist() == [1, 0]  # b was complete first
    assert rows(joined) == [(0, 4, 0), (1, 1, 1), (1, 2, 0), (1, 3, 1)]


def test_what_counts_once_is_told(tmp_path: Path) -> None:
    log = write(
        tmp_path / "log.jsonl",
        *(answered("a", 9, time_s=5), answered("a", 1, time_s=2)),  # the first by time
        *(came("a", 1, time_s=3), came("a", 0, time_s=4), came("x"), answered("b"), answered("c", 1, 2), came("c", 1)),
    )
    joined = read_logs([log])
    assert rows(joined) == [(0, 1, 1)]
    assert joined.answers == (3,)
    assert joined.num_answered_twice == 1 and joined.num_outcomes_twice == 1
    assert joined.num_without_answer == 1 and joined.num_of_other_length == 1


def test_requests_come_in_the_order_in_which_they_were_complete(tmp_path: Path) -> None:
    ids = "abcd"
    one = write(tmp_path / "1.jsonl", *(answered(each, k, time_s=k) for k, each in enumerate(ids)))
    two = write(tmp_path / "2.jsonl", *(came(each, time_s=9 - k) for k, each in enumerate(ids)))
    assert read_logs([one, two]).predictions.tolist() == [3, 2, 1, 0]


def test_without_times_the_place_in_the_files_counts(tmp_path: Path) -> None:
    ids = "abcd"
    one = write(tmp_path / "1.jsonl", *(answered(each, k, time_s=None) for k, each in enumerate(ids)))
    two = write(tmp_path / "2.jsonl", *(came(each, time_s=None) for each in reversed(ids)))
    joined = read_logs([one, two])
    assert joined.predictions.tolist() == [3, 2, 1, 0]
    assert math.isnan(joined.seconds)


@given(
    st.permutations(
        [*(answered(f"{k}", k, time_s=k) for k in range(6)), *(came(f"{k}", time_s=9 - k) for k in range(4))]
    )
)
def test_the_order_of_lines_does_not_matter_where_times_are_known(records: list[dict[str, Any]]) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        joined = read_logs([write(Path(folder) / "log.jsonl", *records)])
    assert joined.predictions.tolist() == [3, 2, 1, 0] and joined.answers == (6,)


def test_a_later_look_only_adds_requests(tmp_path: Path) -> None:
    records = [record for k in range(40) for record in (answered(f"{k}", k, time_s=k), came(f"{k * 7 % 40}", time_s=k))]
    seen: list[float] = []
    for length in range(1, len(records) + 1):
        found = read_logs([write(tmp_path / "log.jsonl", *records[:length])]).predictions.tolist()
        assert found[: len(seen)] == seen
        seen = found
    assert len(seen) == 40


def test_outcomes_may_be_a_file_without_kinds_and_times(tmp_path: Path) -> None:
    log = write(tmp_path / "log.jsonl", answered("7"))
    outcomes = write(tmp_path / "outcomes.json", {"id": 7, "outcomes": [0]})
    assert rows(read_logs([log], outcomes)) == [(0, 0.5, 0)]


def test_a_folder_is_read_as_a_whole(tmp_path: Path) -> None:
    write(tmp_path / "0.jsonl", answered("a"))
    write(tmp_path / "1.jsonl", came("a"))
    write(tmp_path / "notes.txt", {})
    assert rows(read_logs([tmp_path])) == [(0, 0.5, 1)]


def test_parquet_equals_json_lines(tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    from pyarrow.json import read_json

    log = write(tmp_path / "log.jsonl", answered("a", 1, 2), answered("b", 3, arm="B"), came("a", 1, 0), came("b"))
    parquet.write_table(read_json(log), tmp_path / "log.parquet")
    one, two = read_logs([log]), read_logs([tmp_path / "log.parquet"])
    assert rows(one) == rows(two) and one.answers == two.answers and one.latency_ms == two.latency_ms
    (tmp_path / "bad.parquet").write_bytes(b"no")
    with pytest.raises(AbError, match="no Parquet file"):
        read_logs([tmp_path / "bad.parquet"])


@pytest.mark.parametrize("end", ['{"kind": "outco', "\0\0\0\0", '{"kind": "answer"\n'])
def test_a_damaged_last_line_is_skipped(tmp_path: Path, end: str) -> None:
    joined = read_logs([write(tmp_path / "log.jsonl", answered("a"), came("a"), end=end)])
    assert joined.num_unfinished == 1 and len(joined.arm) == 1


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2: not JSON"),
        ("[]", "line 2: .*expected a line of an AnswerLog"),
        ("{}", "line 2: no 'predictions'"),
        ('{"kind": "guess"}', "line 2: kind 'guess'"),
        ('{"kind": "outcome", "id": "a", "outcomes": ["late"]}', "line 2: could not convert"),
        ('{"kind": "outcome", "id": "a", "outcomes": "10"}', "line 2: outcomes '10'"),
        ('{"kind": "outcome", "id": "a", "outcomes": [NaN]}', "line 2: outcomes"),
        ('{"kind": "split", "shares": {"A": 0}}', "expected finite numbers over zero"),
    ],
)
def test_other_damage_is_an_error_of_one_line(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "log.jsonl"
    path.write_text(f"{json.dumps(answered('a'))}\n{line}\n{json.dumps(came('a'))}\n")
    with pytest.raises(AbError, match=message):
        read_logs([path])


def test_shares_are_those_logged(tmp_path: Path) -> None:
    told = {"kind": "split", "shares": {"A": 3, "B": 1}, "salt": ""}
    log = write(tmp_path / "log.jsonl", told, answered("a"), told)
    joined = read_logs([log])
    assert joined.shares == {"A": 0.75, "B": 0.25} and joined.arms == ("A", "B") and joined.answers == (1, 0)
    with pytest.raises(AbError, match="two splits"):
        read_logs([write(tmp_path / "log.jsonl", told, answered("a"), {**told, "shares": {"A": 1, "B": 1}})])


def test_nothing_to_read_is_refused(tmp_path: Path) -> None:
    with pytest.raises(AbError, match="there is no log in"):
        read_logs([tmp_path / "nowhere.jsonl"])
    with pytest.raises(AbError, match="there is no log in"):
        read_logs([tmp_path])
    with pytest.raises(AbError, match="no answers"):
        read_logs([write(tmp_path / "log.jsonl", came("a"))])
