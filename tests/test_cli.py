"""The command line: what it prints where, and with which exit code."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
import types
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path

import pytest

import matta
from matta.cli import COMMANDS, Command, main
from matta.errors import RunError
from matta_studies.study_settings import RelevanceSettings


@dataclass(frozen=True, kw_only=True)
class EchoSettings:
    run: Path = field(metadata={"help": "a run", "positional": True})
    layer: str = field(metadata={"help": "a layer"})
    num_rows: int = field(default=3, metadata={"help": "rows"})
    deep: bool = field(default=False, metadata={"help": "deep"})

    def __post_init__(self) -> None:
        if self.num_rows < 1:
            raise RunError(f"num_rows={self.num_rows}: expected at least 1")


Run = Callable[[EchoSettings], object]
ARGUMENTS = ["study", "echo", "some/run", "--layer", "head"]


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """Run the command line with one command, `study echo`, that does what the test gives it."""
    module = types.ModuleType("echo")
    monkeypatch.setitem(sys.modules, "echo", module)
    module.Settings = EchoSettings  # type: ignore[attr-defined]
    echo = Command(words=("study", "echo"), summary="echo", settings="echo:Settings", run="echo:run", extra="study")

    def call(run: Run, *more: str) -> int:
        module.run = run  # type: ignore[attr-defined]
        return main([*ARGUMENTS, *more], (echo,))

    return call


def raises(error: BaseException) -> Run:
    def run(settings: EchoSettings) -> object:
        raise error

    return run


def test_options_become_settings(call: Callable[..., int]) -> None:
    received: list[EchoSettings] = []
    assert call(received.append) == 0
    assert call(received.append, "--num-rows", "7", "--deep") == 0
    assert received == [
        EchoSettings(run=Path("some/run"), layer="head"),
        EchoSettings(run=Path("some/run"), layer="head", num_rows=7, deep=True),
    ]


@dataclass(frozen=True, kw_only=True)
class SeveralSettings:
    recipe: Path = field(metadata={"help": "a recipe", "positional": True})
    overrides: tuple[str, ...] = field(default=(), metadata={"help": "values", "positional": True})
    out: Path | None = field(default=None, metadata={"help": "a folder"})


@pytest.mark.parametrize(
    "arguments",
    ["r a=1 b=2 --out o", "r --out o a=1 b=2", "--out o r a=1 b=2", "r a=1 --out o b=2", "--out o -- r a=1 b=2"],
)
def test_options_and_plain_arguments_come_in_any_order(arguments: str, monkeypatch: pytest.MonkeyPatch) -> None:
    received: list[SeveralSettings] = []
    module = types.ModuleType("several")
    module.Settings, module.run = SeveralSettings, received.append  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "several", module)
    several = Command(words=("several",), summary="s", settings="several:Settings", run="several:run", extra="lm")
    assert main(["several", *arguments.split()], (several,)) == 0
    assert received == [SeveralSettings(recipe=Path("r"), overrides=("a=1", "b=2"), out=Path("o"))]


def test_a_process_without_a_result_prints_nothing(
    call: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(lambda settings: None, "--json") == 0
    assert capsys.readouterr().out == ""


def test_json_is_all_that_reaches_stdout(call: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> None:
    def run(settings: EchoSettings) -> object:
        print("a table for people")
        return {"gain_percent": -4.63}

    assert call(run, "--json") == 0
    out, err = capsys.readouterr()
    assert json.loads(out) == {"gain_percent": -4.63}
    assert out.count("\n") == 1
    assert err == "a table for people\n"


def test_without_json_the_study_prints_for_itself(call: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> None:
    assert call(lambda settings: print("a table")) == 0
    assert capsys.readouterr().out == "a table\n"


@pytest.mark.parametrize("flags", [(), ("--json",)], ids=["text", "json"])
@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (RunError("runs/a exists;\n  give another --out"), 2, "runs/a exists; give another --out"),
        (PermissionError(13, "Permission denied", "/x"), 2, "[Errno 13] Permission denied: '/x'"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (KeyboardInterrupt("stopped after step 3"), 130, "stopped after step 3"),
        (
            ModuleNotFoundError("No module named 'pandas'", name="pandas"),
            2,
            "No module named 'pandas'; this command needs the extra: pip install 'matta[study]'",
        ),
    ],
    ids=["matta", "system", "interrupt", "stop", "extra"],
)
def test_errors_are_one_line(
    call: Callable[..., int],
    capsys: pytest.CaptureFixture[str],
    error: BaseException,
    code: int,
    message: str,
    flags: tuple[str, ...],
) -> None:
    assert call(raises(error), *flags) == code
    assert capsys.readouterr() == ("", f"matta study echo: {message}\n")


def test_faults_of_ours_keep_their_traceback(call: Callable[..., int]) -> None:
    with pytest.raises(ModuleNotFoundError):
        call(raises(ModuleNotFoundError("No module named 'matta.gone'", name="matta.gone")))
    with pytest.raises(ZeroDivisionError):
        call(raises(ZeroDivisionError()))


def test_settings_that_cannot_work_are_one_line(call: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> None:
    assert call(raises(AssertionError()), "--num-rows", "0") == 2
    assert capsys.readouterr().err == "matta study echo: num_rows=0: expected at least 1\n"


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["study"],
        ["stduy"],
        ["study", "relevanse"],
        ["study", "relevance", "--quik"],
        ["study", "relevance", "--seeds", "many"],
        ["study", "relevance", "--qui"],
        ["train"],
        ["train", "recipe", "--ot", "runs/a"],
    ],
    ids=" ".join,
)
def test_wrong_usage_is_one_line(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    out, err = capsys.readouterr()
    assert stop.value.code == 2
    assert out == ""
    assert err.startswith("matta")
    assert err.count("\n") == 1


def test_relevance_settings_refuse_what_cannot_work(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(RunError, match="seeds=1: expected at least 2"):
        RelevanceSettings(seeds=1)
    assert main(["study", "relevance", "--quick", "--demo"]) == 2
    assert "quick and demo were both asked for" in capsys.readouterr().err


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: " ".join(command.words))
def test_every_command_is_there(command: Command, capsys: pytest.CaptureFixture[str]) -> None:
    module, function = command.run.split(":")
    spec = find_spec(module)
    assert spec is not None
    assert spec.origin is not None
    tree = ast.parse(Path(spec.origin).read_text(encoding="utf-8"))
    assert function in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
    with pytest.raises(SystemExit) as stop:
        main([*command.words, "--help"])
    assert stop.value.code == 0
    assert "--json" in capsys.readouterr().out


def test_the_module_and_the_script_are_one_command() -> None:
    run = subprocess.run([sys.executable, "-m", "matta", "--version"], capture_output=True, text=True, check=True)
    assert run.stdout == f"matta {matta.__version__}\n"
    (script,) = entry_points(group="console_scripts", name="matta")
    assert script.load() is main
