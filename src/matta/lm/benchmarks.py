"""`matta evaluate`: language models on the paper's six zero-shot benchmarks and on held-out text, in one table.

Models are Transformers folders, those of a run, or names on the hub. Code that comes with a model is run if it is
matta's own, letter for letter, or if the user says so. With --out, results are written after each model; they hold
the command by which lm-eval gives the same figures.
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, Final, final

from matta.errors import DAMAGE, RunError
from matta.lm.benchmark_tables import markdown, notes, rich_tables
from matta.lm.bits_per_byte import TextScore, bits_per_byte, change
from matta.lm.command_settings import EvaluateSettings
from matta.lm.documents import held_out_documents, text_source
from matta.lm.extracting import family_of
from matta.lm.folders import export, is_own_code
from matta.lm.judging import Figure, Suite, Values, choose, load_judge, scores_of
from matta.lm.recipe import SourcePart
from matta.lm.recipe_files import is_run
from matta.lm.trained_runs import MODELS, RESULTS, LanguageRun, folder_name, load_run
from matta.sizes.extraction import extract
from matta.sizes.storage import verify_weights, write_json
from matta.sizes.submodels import SubModel
from matta.training.reporting import output_console

_HUB_NAME: Final = re.compile(r"[\w][\w.-]*(/[\w][\w.-]*)?")


@final
@dataclass(frozen=True, kw_only=True)
class Contestant:
    """A model to be judged."""

    name: str  # in the table
    given: str  # on the command line
    source: str | None = None  # what Transformers loads: an absolute path, or a name on the hub; None: `write` it
    trust: bool = False  # whether the code that comes with it may be run
    run: str | None = None  # the run that it is a model of
    write: Callable[[Path], Path] | None = None

    @contextmanager
    def at_hand(self) -> Iterator[str]:
        """What Transformers loads; a model of a run is written into a folder that is removed afterwards."""
        if self.source is not None:
            yield self.source
            return
        assert self.write is not None, "a model without a source is written"
        with tempfile.TemporaryDirectory(prefix="matta-") as scratch:
            yield str(self.write(Path(scratch).resolve() / "model"))


def contestants(given: Sequence[str], *, trust: bool = False) -> list[Contestant]:
    """The models, in the order given, those of a run from the smallest to the TA; each under a name of its own.

    Args:
        given: Runs of matta train, Transformers folders, or names on the hub.
        trust: Whether code that comes with foreign models may be run.

    Raises:
        RunError: one is none of these, or needs code of its own that may not be run.
    """
    found = [each for name in dict.fromkeys(given) for each in _of(name, trust)]
    counts = Counter(each.name for each in found)
    return [each if counts[each.name] == 1 else replace(each, name=_longer(each)) for each in found]


def _longer(contestant: Contestant) -> str:
    return contestant.given if contestant.run is None else f"{contestant.run} {contestant.name}"


def _of(given: str, trust: bool) -> list[Contestant]:
    path = Path(given).expanduser()
    if path.is_dir() and is_run(path):
        return _of_run(given, path.resolve(), trust)
    if path.is_dir():
        return [_of_folder(given, path.resolve(), trust)]
    if path.exists() or not _HUB_NAME.fullmatch(given):
        raise RunError(f"{given} is not a folder; expected a Transformers folder, a run of matta train or a hub name")
    return [Contestant(name=given, given=given, source=given, trust=trust)]


def _of_run(given: str, path: Path, trust: bool) -> list[Contestant]:
    """The models in the folder of a run; those that are not there are written when their turn comes."""
    folders = [file.parent for file in sorted((path / MODELS).glob("*/config.json"))]
    there = {folder.name: folder for folder in folders if not folder.name.startswith(".")}  # those are half-written
    names = _names_of_run(path)
    if names and all(folder_name(name) in there for name in names):
        run, missing = None, {}
    else:
        run = load_run(path)
        missing = family_of(run.nested, run.recipe.family.k)
        names = list(missing)
    found = []
    for name in [*names, *sorted(there.keys() - {folder_name(name) for name in names})]:
        folder = there.get(folder_name(name))
        if folder is not None:
            found.append(replace(_of_folder(str(folder), folder, trust), name=name, run=given))
        else:
            assert run is not None, "it was loaded for what is missing"
            found.append(Contestant(name=name, given=given, run=given, write=_writer(run, missing[name]), trust=True))
    return found


def _names_of_run(path: Path) -> list[str]:
    """The models that the run says it has; none if it was stopped before."""
    if not (path / RESULTS).is_file():
        return []
    try:
        return [each["name"] for each in json.loads((path / RESULTS).read_text(encoding="utf-8"))["models"]]
    except DAMAGE as error:
        raise RunError(f"{path / RESULTS} is damaged: {error!r}; remove it to judge the models all the same") from None


def _writer(run: LanguageRun, spec: SubModel | None) -> Callable[[Path], Path]:
    return lambda path: export(extract(run.nested, spec).eval(), path, tokenizer=run.tokenizer)


def _of_folder(given: str, path: Path, trust: bool) -> Contestant:
    file = path / "config.json"
    if not file.is_file():
        raise RunError(
            f"{given} holds no model: there is no config.json; expected a Transformers folder, such as matta extract "
            f"writes, or a run of matta train"
        )
    try:
        config = dict(json.loads(file.read_text(encoding="utf-8")))
    except DAMAGE as error:
        raise RunError(f"{file} is damaged: {error}; take another copy of the folder") from None
    verify_weights(path)
    has_code = any(True for _ in path.rglob("*.py"))
    if has_code and not trust and not is_own_code(path, config):
        raise RunError(
            f"{given} comes with code of its own that is not matta's, which is not run unasked; look at its .py files, "
            f"then say --trust"
        )
    return Contestant(name=path.name, given=given, source=str(path), trust=trust or has_code)


MOST_CONTEXT: Final = 1024  # for held-out text, by default


def run(settings: EvaluateSettings) -> dict[str, Any]:
    """Judge the models that the settings name; what results.json holds.

    Raises:
        RunError: a model, a benchmark, its data or the text is not available, or --out is taken.
        ModuleNotFoundError: lm-eval is not installed.
    """
    benchmarks = choose(settings.tasks)
    if not benchmarks and settings.text is None:
        raise RunError("--tasks none without --text leaves nothing to judge by; expected at least one of them")
    documents = None if settings.text is None else _documents(settings.text)
    found, baseline = _contestants(settings)
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="matta-")))
        folder = stack.enter_context(_new_folder(settings.out)) if settings.out else scratch
        suite = Suite(benchmarks, settings.data, folder / "tasks", limit=settings.limit)
        judged: list[_Judged] = []
        for contestant in found:
            judged.append(_judge(contestant, suite, documents, settings))
            results = _results(judged, baseline, suite, settings)
            if settings.out:
                write_json(settings.out / "results.json", results)
                (settings.out / "results.md").write_text(markdown(results), encoding="utf-8")
    _print(results)
    return results


@final
@dataclass(frozen=True, kw_only=True)
class _Judged:
    """A model and what was found."""

    contestant: Contestant
    parameters: int
    context: int
    scores: dict[str, dict[str, Any]]
    values: Values
    text: TextScore | None
    text_context: int | None
    seconds: float
    command: str | None


def _documents(path: Path) -> list[str]:
    """The documents of a text file, JSON lines or Parquet; a plain text is one."""
    return held_out_documents(text_source(SourcePart(path=str(path)), held_out=True), sys.maxsize)


def _contestants(settings: EvaluateSettings) -> tuple[list[Contestant], str | None]:
    """The models, the baseline first, and its name."""
    found = contestants(settings.models, trust=settings.trust)
    if settings.baseline is None:
        return found, None
    if not any(settings.baseline in (each.name, each.given) for each in found):
        found = contestants([*settings.models, settings.baseline], trust=settings.trust)
    (baseline, *more) = [each for each in found if settings.baseline in (each.name, each.given)]
    if more:
        names = ", ".join(each.name for each in (baseline, *more))
        raise RunError(f"--baseline {settings.baseline} is several models ({names}); expected one of them")
    return [baseline, *(each for each in found if each is not baseline)], baseline.name


@contextmanager
def _new_folder(path: Path) -> Iterator[Path]:
    """A new folder, which is removed again where no model came to be judged."""
    if path.exists():
        raise RunError(f"--out {path} exists; expected a new folder: name another, or remove it")
    path.mkdir(parents=True)
    try:
        yield path
    finally:
        if not (path / "results.json").exists():
            shutil.rmtree(path, ignore_errors=True)


def _judge(
    contestant: Contestant, suite: Suite, documents: Sequence[str] | None, settings: EvaluateSettings
) -> _Judged:
    start = time.perf_counter()
    with contestant.at_hand() as source:
        judge = load_judge(source, batch=settings.batch, trust=contestant.trust)
        text, context = None, None
        if documents is not None:
            context = settings.context or min(judge.max_length, MOST_CONTEXT)
            text = bits_per_byte(judge.model, judge.tokenizer, documents, context=context, batch=settings.batch)
        scores, values = scores_of(judge, suite)
    return _Judged(
        contestant=contestant,
        parameters=judge.model.num_parameters(),
        context=judge.max_length,
        scores=scores,
        values=values,
        text=text,
        text_context=context,
        seconds=time.perf_counter() - start,
        command=_command(contestant, suite, scores, settings),
    )


def _command(
    contestant: Contestant, suite: Suite, scores: Mapping[str, Mapping[str, Any]], settings: EvaluateSettings
) -> str | None:
    """The command line of lm-eval that gives the same figures, while model and tasks are there."""
    figures = [figure for score in scores.values() for figure in (score, *score["others"])]
    names = list(dict.fromkeys(figure["task"] for figure in figures if figure["is_judged"]))
    if contestant.source is None or settings.out is None or not names:
        return None
    trust = ",trust_remote_code=True" if contestant.trust else ""
    parts = ["lm_eval", "--model", "hf", "--model_args", f"pretrained={contestant.source}{trust}"]
    parts += ["--tasks", ",".join(names), "--include_path", str(suite.folder.resolve())]
    parts += ["--batch_size", str(settings.batch)]
    parts += [] if settings.limit is None else ["--limit", str(settings.limit)]
    return shlex.join(parts)


def _results(
    judged: Sequence[_Judged], baseline: str | None, suite: Suite, settings: EvaluateSettings
) -> dict[str, Any]:
    shown = [{"name": each.name, "title": each.title, **asdict(each.figure)} for each in suite.benchmarks]
    first = judged[0] if baseline is not None else None
    return {
        "benchmarks": shown,
        "models": [_row(each) for each in judged],
        "baseline": baseline,
        "changes": {each.contestant.name: _changes(each, first, suite) for each in judged[1:]} if first else {},
        "settings": {name: _plain(value) for name, value in asdict(settings).items()},
        "versions": {package: version(package) for package in ("lm_eval", "transformers", "torch")},
    }


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, Path) else value


def _row(judged: _Judged) -> dict[str, Any]:
    return {
        "name": judged.contestant.name,
        "given": judged.contestant.given,
        "parameters": judged.parameters,
        "context": judged.context,
        "scores": judged.scores,
        "text": None if judged.text is None else {**_text_row(judged.text), "context": judged.text_context},
        "seconds": judged.seconds,
        "lm_eval": judged.command,
    }


def _text_row(score: TextScore) -> dict[str, Any]:
    names = ("bits_per_byte", "standard_error", "perplexity", "num_tokens", "num_unknown", "num_bytes")
    return {name: getattr(score, name) for name in names}


def _changes(judged: _Judged, baseline: _Judged, suite: Suite) -> dict[str, Any]:
    """What a model gains on the baseline, item by item: the mean and its standard error."""
    scores = {benchmark.name: _gain(judged.values, baseline.values, benchmark.figure) for benchmark in suite.benchmarks}
    if judged.text is None or baseline.text is None:
        return {"scores": scores, "text": None}
    value, error = change(judged.text, baseline.text)
    return {"scores": scores, "text": {"value": value, "standard_error": error}}


def _gain(values: Values, baseline: Values, figure: Figure) -> dict[str, float | None]:
    """The mean difference of two models' items and its standard error; None where one of them was not judged."""
    if figure not in values or figure not in baseline:
        return {"value": None, "standard_error": None}
    gains = [mine - theirs for mine, theirs in zip(values[figure], baseline[figure], strict=True)]
    return {"value": fmean(gains), "standard_error": stdev(gains) / len(gains) ** 0.5 if len(gains) > 1 else None}


def _print(results: Mapping[str, Any]) -> None:
    console = output_console()
    for table in rich_tables(results):
        console.print(table)
    for note in notes(results):
        console.print(note, highlight=False)
