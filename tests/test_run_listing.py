"""`matta runs`: the state of each run folder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from matta.cli import main
from matta.lm.run_listing import listed
from test_fitting import Setup, Stopped, batches, fail, stop_at


def test_runs_are_listed_with_their_state(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = Setup().fit(batches(), steps=4, log_every=2, run=tmp_path / "a" / "whole")
    stopped = Setup()
    stop_at(4, fail)(stopped)
    with pytest.raises(Stopped):
        stopped.fit(batches(), steps=9, checkpoint_every=2, run=tmp_path / "stopped")
    running = Setup()
    states: list[str] = []
    stop_at(3, lambda: states.append(listed(tmp_path / "running").state))(running)
    running.fit(batches(), steps=3, run=tmp_path / "running")
    assert states == ["running"]
    (tmp_path / "running" / "checkpoint-00000003" / "training.json").write_text("{")
    assert main(["runs", "--folder", str(tmp_path), "--json"]) == 0
    found = {Path(each["path"]).name: each for each in json.loads(capsys.readouterr().out)["runs"]}
    assert {name: (each["state"], each["step"]) for name, each in found.items()} == {
        "whole": ("ended", 4),
        "stopped": ("stopped", 2),
        "running": ("ended", 3),
    }
    assert found["whole"]["losses"] == result.losses
    assert "checkpoint-00000003 cannot be read" in found["running"]["fault"]
    assert main(["runs", str(tmp_path / "a"), "--json"]) == 0
    assert [Path(each["path"]).name for each in json.loads(capsys.readouterr().out)["runs"]] == ["whole"]
    assert main(["runs", "--folder", str(tmp_path / "nowhere")]) == 2
    assert "nowhere is no folder; expected one with runs" in capsys.readouterr().err
