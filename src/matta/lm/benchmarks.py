"""`matta evaluate`: language models on the paper's six zero-shot benchmarks and on held-out text, in one table.

With --out the results are there after each model; they hold the command by which lm-eval gives the same figures.
"""

from __future__ import annotations

import os
import shlex
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, Final, final

from matta.errors import RunError
from matta.lm.bits import TextScore, bits_per_byte, change
from matta.lm.contestants import Contestant, contestants
from matta.lm.judging import Suite, Values, load_judge, scores_of
from matta.lm.recipe import SourcePart
from matta.lm.settings import EvaluateSettings
from matta.lm.suite import Figure, choose
from matta.lm.tables import markdown, notes, rich_tables
from matta.lm.texts import held_out_documents, text_source
from matta.storage import write_json

MOST_CONTEXT: Final = 1024  # for held-out text, by default


def run(settings: EvaluateSettings) -> dict[str, Any]:
    """Judge the models that the settings name; what results.json holds.

    Raises:
        RunError: a model, a benchmark, its data or the text cannot be had, or --out is taken.
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


def score_folder(
    path: str | os.PathLike[str], suite: Suite, *, batch: int = 8, trust: bool = False
) -> dict[str, dict[str, Any]]:
    """A Transformers folder, or a model on the hub, on benchmarks: each one's figures, by its name.

    Raises:
        RunError: it is no model, or needs code that may not be run.
    """
    (contestant,) = contestants([os.fspath(path)], trust=trust)
    with contestant.at_hand() as source:
        return scores_of(load_judge(source, batch=batch, trust=contestant.trust), suite)[0]


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
    names = ("bits_per_byte", "standard_error", "perplexity", "num_tokens", "num_bytes")
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
    from rich.console import Console

    console = Console()
    if not console.is_terminal:
        console = Console(width=200)
    for table in rich_tables(results):
        console.print(table)
    for note in notes(results):
        console.print(note, highlight=False)
