"""Broken and hostile inputs of every kind: each gives one line that says what is wrong, and exit code 2."""

from __future__ import annotations

import importlib
import re
import shutil
import sys
import types
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from matta.cli import COMMANDS, Command, main

sys.path.insert(0, str(Path(__file__).parent))
from bad_cases import Case
from good_inputs import make_inputs

KINDS = ("arguments", "recipes", "runs", "weights", "tables", "data_files")
CASES = [
    pytest.param(case, id=f"{kind}-{case.name.replace(' ', '-')}")
    for kind in KINDS
    for case in importlib.import_module(f"bad_{kind}").CASES
]


@dataclass(frozen=True, kw_only=True)
class CallSettings:
    """Settings of the command that makes a call of the library."""


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("good")
    make_inputs(folder)
    return folder


@pytest.fixture
def inputs(good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A copy of the good inputs, beside the present folder, in which nothing must appear."""
    shutil.copytree(good, tmp_path / "w")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    yield tmp_path / "w"
    assert list((tmp_path / "here").iterdir()) == []
    assert sorted(each.name for each in tmp_path.iterdir()) == ["here", "w"], "nothing is written beside the inputs"


def outcome(case: Case, folder: Path, monkeypatch: pytest.MonkeyPatch) -> int:
    """The exit code of a case's command line; a call of the library is a command of its own."""
    if isinstance(case.run, str):
        arguments, commands = case.run.replace("{w}", str(folder)).split(), COMMANDS
    else:
        call = case.run
        module = types.ModuleType("call")
        module.Settings, module.run = CallSettings, lambda settings: call(folder)  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "call", module)
        arguments = ["call"]
        commands = (Command(words=("call",), summary="call", settings="call:Settings", run="call:run", extra="lm"),)
    try:
        return main(arguments, commands)
    except SystemExit as end:  # as argparse ends
        return int(end.code or 0)


@pytest.mark.parametrize("case", CASES)
def test_a_bad_input_gives_one_line(
    case: Case, inputs: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    case.damage(inputs)
    capsys.readouterr()
    code = outcome(case, inputs, monkeypatch)
    told = capsys.readouterr().err
    assert code == 2, told
    assert told.count("\n") == 1, told
    assert re.search(case.line, told), told


def test_there_are_enough_cases() -> None:
    names = [case.id for case in CASES]
    assert len(set(names)) == len(names) >= 120
