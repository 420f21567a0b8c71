"""The command `matta`: finds the command asked for, reads its settings, runs it, reports.

A command is an entry in `COMMANDS`: a dataclass of settings, whose fields become its options, and the
function that takes them. Both are named as "module:attribute"; the function's module is imported only when
the command runs, so that help comes at once.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import sys
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from importlib import import_module
from types import NoneType
from typing import Any, NoReturn, final, get_args, get_origin, get_type_hints

from matta import __version__
from matta.errors import MattaError, Terminated

USER_ERROR = 2
INTERRUPTED = 130


@final
@dataclasses.dataclass(frozen=True, kw_only=True)
class Command:
    """One command of the command line."""

    words: tuple[str, ...]  # its name, or group and name, as typed
    summary: str
    settings: str  # "module:Dataclass"; the module must be light
    run: str  # "module:function", from settings to an object that json can write
    extra: str  # the extra of the package that it needs
    shared: bool = False  # whether several processes can do it together


def _study(name: str, summary: str, extra: str = "study") -> Command:
    module = f"matta_studies.{name}:run"
    settings = f"matta_studies.study_settings:{name.title()}Settings"
    return Command(words=("study", name), summary=summary, settings=settings, run=module, extra=extra)


GROUPS = {
    "study": "repeat an experiment of the paper on public data",
    "figure": "draw what a run has learnt",
}

COMMANDS = (
    Command(
        words=("plan",),
        summary="what a recipe would train: nesting, sizes, FLOPs and memory, without weights",
        settings="matta.lm.command_settings:PlanSettings",
        run="matta.lm.planning:run",
        extra="lm",
    ),
    Command(
        words=("train",),
        summary="co-train the language models of a recipe",
        settings="matta.lm.command_settings:TrainSettings",
        run="matta.lm.recipe_training:run",
        extra="lm",
        shared=True,
    ),
    Command(
        words=("runs",),
        summary="the runs below a folder: which are running, how far each is, its losses",
        settings="matta.lm.command_settings:RunsSettings",
        run="matta.lm.run_listing:run",
        extra="lm",
    ),
    Command(
        words=("teach",),
        summary="write a Teacher's likeliest tokens for the text of a recipe",
        settings="matta.lm.command_settings:TeachSettings",
        run="matta.lm.teaching:run",
        extra="lm",
    ),
    Command(
        words=("extract",),
        summary="write sub-models of a run as Transformers folders",
        settings="matta.lm.command_settings:ExtractSettings",
        run="matta.lm.extracting:run",
        extra="lm",
    ),
    Command(
        words=("choose",),
        summary="the size of a family that fits a budget of latency, memory, parameters or quality",
        settings="matta.lm.command_settings:ChooseSettings",
        run="matta.lm.choosing_sizes:run",
        extra="lm",
    ),
    Command(
        words=("report",),
        summary="a page to choose a size of a run on: one HTML file with a slider for the budget",
        settings="matta.lm.command_settings:ReportSettings",
        run="matta.lm.run_report:run",
        extra="lm",
    ),
    Command(
        words=("export",),
        summary="a model of a run for other runtimes: ONNX, torch.export, safetensors, a Transformers folder",
        settings="matta.lm.command_settings:ExportSettings",
        run="matta.exporting.export_command:run",
        extra="lm,export",
    ),
    Command(
        words=("serve",),
        summary="an HTTP server for the sizes of a nesting: Open Inference Protocol, batching, sizes by load",
        settings="matta.serving.serve_settings:ServeCommandSettings",
        run="matta.serving.serving_command:run",
        extra="serve",
    ),
    Command(
        words=("evaluate",),
        summary="judge language models by benchmarks and held-out text, in one table",
        settings="matta.lm.command_settings:EvaluateSettings",
        run="matta.lm.benchmarks:run",
        extra="eval",
    ),
    Command(
        words=("ab",),
        summary="compare sizes or versions on live requests, from the logs of their answers and outcomes",
        settings="matta.ab_testing.ab_settings:AbSettings",
        run="matta.ab_testing.ab_command:run",
        extra="fit",
    ),
    _study("relevance", "rank films for users: Student, TA and all sizes between, against a tuned baseline"),
    _study("ranking", "films in lists of users, ranked by a listwise loss: NDCG@10 against a tuned baseline"),
    _study("quality", "late flights, predicted online, with and without Shampoo, against a tuned baseline"),
    _study("ablations", "optimizers, sharing, weights, sizes, depth and Teachers, on both studies"),
    _study(
        "compute", "a family against its sizes trained alone, at equal processor time or with short data", "lm,study"
    ),
    _study("language", "a small GPT-2 on real text, and its family, against a tuned baseline", extra="lm,study"),
    Command(
        words=("figure", "preconditioner"),
        summary="Shampoo's factor of a layer as a heat map, with the Student's edge (Fig. 4)",
        settings="matta_studies.study_settings:PreconditionerSettings",
        run="matta_studies.preconditioner_figure:run",
        extra="study",
    ),
)


def main(arguments: Sequence[str] | None = None, commands: Sequence[Command] = COMMANDS) -> int:
    """Exit code of one command line: 0, 2 for an error of the user's, 128 and its number when a signal ended it."""
    options = vars(_parser(commands).parse_args(arguments))
    command, as_json = options.pop("command"), options.pop("json")
    try:
        _run(command, options, as_json=as_json)
    except KeyboardInterrupt as interrupt:
        return _complain(command, str(interrupt) or "interrupted", INTERRUPTED)
    except Terminated as ended:
        return _complain(command, str(ended), int(ended.code or 0))
    except (MattaError, OSError) as error:
        return _complain(command, str(error), USER_ERROR)
    except ImportError as error:
        if (error.name or "").split(".")[0] in ("matta", "matta_studies"):
            raise  # a fault of ours, not a missing extra
        return _complain(command, _missing_extra(command, error), USER_ERROR)
    return 0


def _run(command: Command, options: dict[str, Any], *, as_json: bool) -> None:
    """Run a command; with `as_json` its result is all that reaches standard output.

    Of several processes (`accelerate launch`) only the one with a result prints it.
    """
    if not command.shared:
        _named("matta.training.processes:require_one")(f"matta {' '.join(command.words)}")
    settings = _named(command.settings)(**options)
    if not as_json:
        _named(command.run)(settings)
        return
    with contextlib.redirect_stdout(sys.stderr):
        result = _named(command.run)(settings)
    if result is not None:
        print(json.dumps(result, allow_nan=False))


def _named(target: str) -> Callable[..., Any]:
    """The attribute that "module:attribute" names."""
    module, attribute = target.split(":")
    return getattr(import_module(module), attribute)


def _missing_extra(command: Command, error: ImportError) -> str:
    return f"{error}; this command needs the extra: pip install 'matta[{command.extra}]'"


def _complain(command: Command, message: str, code: int) -> int:
    """Print one line on standard error, however many the message has; give back the exit code."""
    print(f"matta {' '.join(command.words)}: {' '.join(message.split())}", file=sys.stderr)
    return code


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, and which takes options and plain arguments in any order."""

    _is_parsing = False

    def error(self, message: str) -> NoReturn:
        self.exit(USER_ERROR, f"{self.prog}: {message}; see {self.prog} --help\n")

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Intermixed where there are no commands below; that in turn calls this."""
        if self._subparsers is not None or self._is_parsing:
            return super().parse_known_args(args, namespace)
        self._is_parsing = True
        try:
            found, unknown = self.parse_known_intermixed_args(args, namespace)
        finally:
            self._is_parsing = False
        if unknown:  # the parser above would name itself, and its own help
            near = get_close_matches(unknown[0].partition("=")[0], self._option_string_actions, n=1, cutoff=0.75)
            self.error(f"unrecognized arguments: {' '.join(unknown)}{f', did you mean {near[0]}?' if near else ''}")
        return found, unknown


def _parser(commands: Sequence[Command]) -> _Parser:
    parser = _Parser(
        prog="matta",
        description="Nest a model in a larger teaching assistant, co-train both, extract a family of sizes.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"matta {__version__}")
    names = parser.add_subparsers(metavar="COMMAND", required=True)
    groups: dict[str, argparse._SubParsersAction[_Parser]] = {}
    for command in commands:
        *group, _ = command.words
        if group and group[0] not in groups:
            group_parser = names.add_parser(group[0], help=GROUPS[group[0]], description=GROUPS[group[0]])
            groups[group[0]] = group_parser.add_subparsers(metavar="NAME", required=True)
        _add_command(groups[group[0]] if group else names, command)
    return parser


def _add_command(names: argparse._SubParsersAction[_Parser], command: Command) -> None:
    parser = names.add_parser(command.words[-1], help=command.summary, description=command.summary, allow_abbrev=False)
    settings = _named(command.settings)
    types = get_type_hints(settings)
    for setting in dataclasses.fields(settings):  # type: ignore[arg-type]
        _add_option(parser, setting, types[setting.name])
    parser.add_argument("--json", action="store_true", help="print one JSON object, nothing else")
    parser.set_defaults(command=command)


def _add_option(parser: _Parser, setting: dataclasses.Field[Any], hint: Any) -> None:
    """One setting as an option; with `metadata["positional"]` as a plain argument.

    Without the option the settings' own default holds, which is why it is left out of the namespace.
    """
    meta = setting.metadata
    flag = f"--{setting.name.replace('_', '-')}"
    if hint is bool:
        parser.add_argument(flag, action="store_true", default=argparse.SUPPRESS, help=meta["help"])
        return
    convert = next((kind for kind in get_args(hint) if kind is not NoneType), hint)
    metavar = meta.get("metavar", "N" if convert is int else setting.name.upper())
    required = setting.default is dataclasses.MISSING
    if get_origin(hint) is tuple:
        _add_several(parser, setting, convert, metavar, required=required)
        return
    if meta.get("positional"):
        may_lack: dict[str, Any] = {} if required else {"nargs": "?", "default": setting.default}
        parser.add_argument(setting.name, type=convert, metavar=metavar, help=meta["help"], **may_lack)
        return
    parser.add_argument(
        flag, type=convert, metavar=metavar, required=required, default=argparse.SUPPRESS, help=meta["help"]
    )


def _add_several(
    parser: _Parser, setting: dataclasses.Field[Any], convert: Any, metavar: str, *, required: bool
) -> None:
    """A setting that takes all remaining plain arguments."""
    parser.add_argument(
        setting.name,
        type=convert,
        metavar=metavar,
        nargs="+" if required else "*",
        action=_Several,
        default=argparse.SUPPRESS,
        help=setting.metadata["help"],
    )


class _Several(argparse.Action):
    """Keeps values as a tuple; without any the settings' own default holds."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        if values:
            setattr(namespace, self.dest, tuple(values))
