"""The split of requests over arms, and the log of answers and outcomes."""

import json
import math
import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from matta.ab_testing import AnswerLog, Split
from matta.ab_testing.traffic import _BLOCK
from matta.errors import AbError, MattaError

IDS = [f"request {k}" for k in range(100_000)]


def lines(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def answer(log: AnswerLog, request_id: str = "r", **changed: object) -> None:
    told = {"arm": "TA", "model": "ta", "version": 3, "predictions": [0.5], "latency_ms": 1.0, "time_s": 7.0}
    log.answer(request_id, **{**told, **changed})  # type: ignore[arg-type]


def test_arms_are_the_same_on_every_machine() -> None:
    """Literal values: a change of the hash would give the users of a running experiment other arms."""
    split = Split(shares={"Student": 0.5, "TA": 0.5}, salt="experiment 1")
    assert [split.arm(each)[0] for each in ("", "a", "é", "7f3c", *IDS[:8])] == list("TTSSTSSSTSST")


def test_shares_hold_over_many_ids() -> None:
    shares = {"Student": 0.2, "TA": 0.3, "old": 0.5}
    split = Split(shares=shares)
    arms = [split.arm(each) for each in IDS]
    for arm, share in shares.items():
        assert abs(arms.count(arm) / len(IDS) - share) < 4 * math.sqrt(share * (1 - share) / len(IDS))


def test_another_salt_draws_independently() -> None:
    one, two = (Split(shares={"A": 1, "B": 1}, salt=salt) for salt in ("one", "two"))
    both = sum(one.arm(each) == two.arm(each) == "A" for each in IDS)
    assert abs(both / len(IDS) - 0.25) < 4 * math.sqrt(0.25 * 0.75 / len(IDS))


def test_salt_and_id_do_not_run_into_each_other() -> None:
    one, two = Split({"A": 1, "B": 1}, "a"), Split({"A": 1, "B": 1}, "ab")
    assert [one.arm(f"b{k}") for k in range(64)] != [two.arm(f"{k}") for k in range(64)]


@given(st.dictionaries(st.text(max_size=4), st.floats(1e-6, 1e6), min_size=1, max_size=5), st.text(), st.text())
def test_an_arm_follows_from_salt_id_and_shares_in_any_order(shares: dict[str, float], salt: str, each: str) -> None:
    split = Split(shares=shares, salt=salt)
    assert math.isclose(sum(split.shares.values()), 1)
    assert split.arm(each) in shares
    assert split.arm(each) == Split(shares=dict(reversed(shares.items())), salt=salt).arm(each)


@pytest.mark.parametrize("shares", [{}, {"A": 0}, {"A": 1, "B": -1}, {"A": math.nan}, {"A": math.inf}])
def test_shares_that_are_none_are_refused(shares: dict[str, float]) -> None:
    with pytest.raises(AbError, match="received"):
        Split(shares=shares)


def test_lines_are_as_documented(tmp_path: Path) -> None:
    with AnswerLog(tmp_path / "new" / "log.jsonl", split=Split({"TA": 1}, "s")) as log:
        answer(log)
        log.outcome("r", outcomes=[1], time_s=9)
    told, answered, came = lines(tmp_path / "new" / "log.jsonl")
    assert told.pop("time_s") and told == {"kind": "split", "shares": {"TA": 1.0}, "salt": "s"}
    expected = {"kind": "answer", "id": "r", "arm": "TA", "model": "ta", "version": 3, "predictions": [0.5]}
    assert answered == {**expected, "latency_ms": 1.0, "time_s": 7.0}
    assert came == {"kind": "outcome", "id": "r", "outcomes": [1.0], "time_s": 9.0}


def test_threads_write_whole_lines(tmp_path: Path) -> None:
    with AnswerLog(tmp_path / "log.jsonl") as log:
        threads = [
            threading.Thread(target=lambda k=k: [answer(log, f"{k} {i}", predictions=[0.1] * 50) for i in range(50)])
            for k in range(8)
        ]
        for each in threads:
            each.start()
        for each in threads:
            each.join()
    assert {line["id"] for line in lines(tmp_path / "log.jsonl")} == {f"{k} {i}" for k in range(8) for i in range(50)}


def test_a_line_is_there_before_the_log_is_closed(tmp_path: Path) -> None:
    log = AnswerLog(tmp_path / "log.jsonl")
    answer(log)
    assert len(lines(tmp_path / "log.jsonl")) == 1
    log.close()
    with pytest.raises(AbError, match="is closed"):
        answer(log)


@pytest.mark.parametrize("length", [12, 3 * _BLOCK])
@pytest.mark.parametrize("num_whole", [0, 2])
def test_a_line_that_a_killed_server_began_is_cut_off(tmp_path: Path, num_whole: int, length: int) -> None:
    path = tmp_path / "log.jsonl"
    whole = b'{"kind": "outcome", "id": "r", "outcomes": [1.0], "time_s": 9.0}\n' * num_whole
    path.write_bytes(whole + b'{"kind": "answer", "id": "' + b"x" * length)
    with AnswerLog(path) as log:
        answer(log)
    assert path.read_bytes().startswith(whole)
    assert len(lines(path)) == num_whole + 1


def test_a_file_of_something_else_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "weights.bin"
    path.write_bytes(b"precious")
    with pytest.raises(AbError, match="no line of an AnswerLog"):
        AnswerLog(path)
    assert path.read_bytes() == b"precious"


def test_two_writers_of_one_file_are_refused(tmp_path: Path) -> None:
    pytest.importorskip("fcntl")
    with AnswerLog(tmp_path / "log.jsonl"), pytest.raises(AbError, match="another AnswerLog"):
        AnswerLog(tmp_path / "log.jsonl")


def test_what_is_no_arm_no_id_or_no_list_is_refused(tmp_path: Path) -> None:
    split = Split({"Student": 1, "TA": 1})
    with pytest.raises(MattaError, match="received int as the id; expected text, such as str"):
        split.arm(5)  # type: ignore[arg-type]
    with pytest.raises(MattaError, match="received list as shares; expected a share for each arm"):
        Split([("TA", 1)])  # type: ignore[arg-type]
    with AnswerLog(tmp_path / "log.jsonl", split=split) as log:
        with pytest.raises(AbError, match="received the arm 'ta'; expected one of the split: Student, TA"):
            answer(log, arm="ta")
        with pytest.raises(AbError, match="received predictions=0.5; expected a number for each row, in a list"):
            answer(log, predictions=0.5)
        with pytest.raises(AbError, match="received predictions='10'; expected a number for each row"):
            answer(log, predictions="10")  # not 1 and 0
        with pytest.raises(AbError, match="received outcomes=1.0; expected"):
            log.outcome("r", outcomes=1.0)  # type: ignore[arg-type]
        with pytest.raises(MattaError, match="received int as the id"):
            log.outcome(5, outcomes=[1.0])  # type: ignore[arg-type]
    assert [each["kind"] for each in lines(tmp_path / "log.jsonl")] == ["split"]


@pytest.mark.parametrize("values", [[], [math.nan], [0.0, math.inf]])
def test_numbers_that_json_cannot_hold_are_refused(tmp_path: Path, values: list[float]) -> None:
    with AnswerLog(tmp_path / "log.jsonl") as log:
        with pytest.raises(AbError, match="predictions="):
            answer(log, predictions=values)
        with pytest.raises(AbError, match="outcomes="):
            log.outcome("r", outcomes=values)
