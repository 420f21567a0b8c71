"""Models of a run as Transformers folders: the family at the end of `matta train`, any size by `matta extract`."""

from __future__ import annotations

from matta.lm.needed import EXTRA as EXTRA

import json
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Final, NamedTuple, final

from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from matta.errors import DAMAGE, MattaError, RunError, SubModelError
from matta.lm.benchmark_tables import with_error
from matta.lm.bits_per_byte import TextScore, bits_per_byte, unknown_note
from matta.lm.cards import ModelCard, Score, held_out_scores, loading_lines, recipe_card
from matta.lm.command_settings import ExtractSettings
from matta.lm.folders import CODE, auto_class, export, require_configuration, require_new
from matta.lm.recipe import Recipe
from matta.lm.trained_runs import MODELS, RESULTS, MappedRun, folder_name, map_run
from matta.nesting.nested import Nested
from matta.sizes.extraction import extract
from matta.sizes.storage import write_json
from matta.sizes.streamed_extraction import SavedWeights
from matta.sizes.submodels import NARROW, SKIP, WIDE, SubModel, layer_names, live, wide, wide_narrow_wide
from matta.training.reporting import output_console, rich_table
from matta.training.run_settings import FitResult

STUDENT: Final = "student"
TA: Final = "ta"
FAMILY: Final = "family"
_COUNTS: Final = ("num_unknown", "num_tokens")


@final
@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What came of training: the models, and how it went.

    `documents` are the held-out text, read `batch` sequences at a time, and `text` the counts of the training
    text. This session has trained on `tokens` in `seconds`, earlier ones of the same run on more. `notes`
    are told at the end.
    """

    recipe: Recipe
    nested: Nested
    tokenizer: PreTrainedTokenizerBase
    path: Path
    fit: FitResult
    documents: tuple[str, ...]
    text: dict[str, Any]
    tokens: int
    seconds: float
    num_processes: int
    batch: int
    notes: tuple[str, ...] = ()


def family_of(nested: Nested, ks: Sequence[int]) -> dict[str, SubModel | None]:
    """By name: the Student (None), the sub-models with k wide layers, and the TA, all of whose layers are wide."""
    num_layers = len(layer_names(nested))
    sizes = {f"k={k}": wide_narrow_wide(nested, k) for k in sorted(ks) if k < num_layers}
    return {STUDENT: None, **sizes, TA: wide(nested)}


def require_writable(nested: Nested, ks: Sequence[int]) -> None:
    """Refuse, before any training, a family of which no folder could hold some model.

    Raises:
        SubModelError: there is such a model.
    """
    for name, spec in family_of(nested, ks).items():
        try:
            require_configuration(extract(nested, spec))
        except SubModelError as error:
            raise SubModelError(f"{name} of this family could not be written: {error}") from None


def finish(outcome: Outcome) -> dict[str, Any]:
    """Extract, judge, write `results.json`, and print the table; a model that cannot be written stops no other one.

    Raises:
        RunError: models were not written; it is raised after everything else is done.
    """
    recipe = outcome.recipe
    for left in (outcome.path / MODELS).glob(".*"):
        shutil.rmtree(left, ignore_errors=True)  # half-written, or half-removed, when the run was killed
    models = [_finish_model(outcome, *each) for each in family_of(outcome.nested, recipe.family.k).items()]
    results = {
        "recipe": recipe.name,
        "run": str(outcome.path),
        "steps": outcome.fit.steps,
        "processes": outcome.num_processes,
        "tokens": outcome.fit.steps * recipe.train.batch * recipe.data.context,
        "tokens_per_second": outcome.tokens / outcome.seconds if outcome.tokens else None,
        "seconds": outcome.seconds,
        "skipped_steps": outcome.fit.num_skipped,
        "losses": outcome.fit.losses,
        "evaluations": [{"step": each.step, **each.values} for each in outcome.fit.evaluations],
        "text": outcome.text,
        "models": models,
    }
    write_json(outcome.path / RESULTS, results)
    _print_outcome(outcome, results)
    require_written(models)
    return results


def write_model(
    model: nn.Module,
    folder: Path,
    *,
    tokenizer: PreTrainedTokenizerBase,
    card: ModelCard,
    weights: SavedWeights | None = None,
) -> str | None:
    """Write the folder of a model, as `export` does; why it cannot be written, or None."""
    try:
        export(model, folder, tokenizer=tokenizer, card=card, weights=weights)
    except (MattaError, OSError) as error:
        return str(error)
    return None


def require_written(rows: Sequence[Mapping[str, Any]]) -> None:
    """Tell which models were not written, once the others are.

    Raises:
        RunError: some were not.
    """
    reasons = [f"{row['name']}: {row['not_written']}" for row in rows if row["not_written"] is not None]
    if reasons:
        raise RunError(f"{len(reasons)} of {len(rows)} models could not be written: {'; '.join(reasons)}")


def _finish_model(outcome: Outcome, name: str, spec: SubModel | None) -> dict[str, Any]:
    """Take one model out, judge it and write its folder; its row of the results."""
    model = extract(outcome.nested, spec).eval()
    score = _score(outcome, model)
    scores = () if score is None else held_out_scores(score.bits_per_byte, score.standard_error, score.perplexity)
    card = recipe_card(outcome.nested, name, spec, outcome.recipe, steps=outcome.fit.steps, scores=scores)
    folder = outcome.path / MODELS / folder_name(name)
    if (folder / "config.json").is_file():  # of an earlier end of this run
        shutil.rmtree(folder.rename(folder.with_name(f".{folder.name}-old")))
    not_written = write_model(model, folder, tokenizer=outcome.tokenizer, card=card)
    return {
        "name": name,
        "k": None if spec is None else _num_wide(outcome.nested, spec),
        "parameters": sum(each.numel() for each in model.parameters()),
        "bits_per_byte": None if score is None else score.bits_per_byte,
        "standard_error": None if score is None else score.standard_error,
        "perplexity": None if score is None else score.perplexity,
        "num_tokens": None if score is None else score.num_tokens,
        "num_unknown": None if score is None else score.num_unknown,
        "folder": str(folder) if not_written is None else None,
        "not_written": not_written,
    }


def _num_wide(nested: Nested, spec: SubModel) -> int:
    return [spec.choices.get(layer, spec.default) for layer in layer_names(nested)].count(WIDE)


def _score(outcome: Outcome, model: nn.Module) -> TextScore | None:
    if not outcome.documents:
        return None
    context = outcome.recipe.data.context
    return bits_per_byte(model, outcome.tokenizer, outcome.documents, context=context, batch=outcome.batch)


def _print_outcome(outcome: Outcome, results: dict[str, Any]) -> None:

    columns = ("model", "parameters", "bits per byte", "perplexity of a token", "folder")
    rows = [
        (
            each["name"],
            f"{each['parameters']:,}",
            with_error(each["bits_per_byte"], each["standard_error"], 4),
            with_error(each["perplexity"], None, 2),
            "not written" if each["folder"] is None else Path(each["folder"]).relative_to(outcome.path).as_posix(),
        )
        for each in results["models"]
    ]
    title = f"{results['recipe']}: {results['steps']:,} steps"
    console = output_console()
    console.print(rich_table(title, columns, rows, left=("model", "folder")))
    for line in _closing_lines(outcome, results):
        console.print(line, soft_wrap=True, highlight=False)


def _closing_lines(outcome: Outcome, results: dict[str, Any]) -> Iterator[str]:
    """What else is to be known, and what to do next."""
    speed = results["tokens_per_second"]
    if speed is not None:
        yield f"{speed:,.0f} tokens a second, evaluation left out ({results['processes']} process(es))"
    yield _text_line(outcome)
    if outcome.text.get("skipped"):
        yield f"skipped in the text: {json.dumps(outcome.text['skipped'])}"
    if outcome.fit.num_skipped:
        yield f"{outcome.fit.num_skipped} steps were skipped: their loss or gradient was not finite"
    yield from outcome.notes
    if outcome.documents and (told := unknown_note(*(results["models"][0][key] for key in _COUNTS))) is not None:
        yield told
    yield f"matta evaluate {outcome.path}            benchmarks, for every model of the run"
    yield f"matta extract {outcome.path} k=1 --out DIR   any other size"


def _text_line(outcome: Outcome) -> str:
    """What was read: a wrong separator or field shows in the number of documents, a short text in that of passes."""
    text, read = outcome.text, outcome.fit.steps * outcome.recipe.train.batch
    passes = "so far" if text["samples"] is None else f"passed over {read / text['samples']:.2f} times"
    return f"text: {text['documents']:,} documents, {text['bytes']:,} bytes, {text['tokens']:,} tokens, {passes}"


def run(settings: ExtractSettings) -> dict[str, Any]:
    """Write the models asked for, and tell how they are loaded; what the run itself has written stays as it is.

    They are written from the file of the nesting, or, of a run that has not ended, of its newest checkpoint, and are
    never in memory.

    Raises:
        RunError: the folder is no run or has no weights yet, a model is none of its, or one of the folders of --out
            is there already; or models could not be written, once the others are.
        SubModelError: a sub-model that the nesting does not hold.
    """
    mapped = map_run(settings.run, check=settings.check)
    found = mapped.run
    specs = specs_of(found.nested, settings.models, found.recipe.family.k)
    out = settings.out or settings.run / (MODELS if mapped.step is None else f"{MODELS}-step-{mapped.step}")
    folders = {name: out / folder_name(name) for name in specs}
    for folder in folders.values() if settings.out else ():
        require_new(folder)
    results = _results(settings.run) if mapped.step is None else _Results(mapped.step)
    rows = [_write(mapped, name, spec, folders[name], results) for name, spec in specs.items()]
    _print([row for row in rows if row["not_written"] is None], out)
    require_written(rows)
    return {"run": str(settings.run), "models": rows}


def specs_of(nested: Nested, texts: Iterable[str], ks: Sequence[int]) -> dict[str, SubModel | None]:
    """The sub-models that the command line names, each once; `ks` is what "family" stands for.

    Raises:
        RunError: a text that names none.
        SubModelError: a number of layers that there is not.
    """
    found: dict[str, SubModel | None] = {}
    for text in texts:
        found.update(family_of(nested, ks) if text == FAMILY else [spec_of(nested, text)])
    return found


def spec_of(nested: Nested, text: str) -> tuple[str, SubModel | None]:
    """The name of a model and its sub-model, None for the Student.

    `text` is "student", "ta", "k=8" (wide-narrow-wide), or choices of layers such as
    "transformer.h.0=wide,transformer.h.1=skip". The names of layers may be patterns, later ones hold against earlier
    ones, and layers that are not named are narrow.

    Raises:
        RunError: it is none of these, or a pattern matches no layer.
        SubModelError: there are not so many layers, or a layer that cannot be skipped.
    """
    if text == STUDENT:
        return text, None
    if text == TA:
        return text, wide(nested)
    key, equals, value = text.partition("=")
    if key == "k" and value.isdecimal():
        return f"k={int(value)}", wide_narrow_wide(nested, int(value))
    names = layer_names(nested)
    if not equals or key == "k":
        raise RunError(f"received {text!r}; expected {_expected(names)}")
    choices = _choices(names, text)
    return f"mix-{''.join(choice[0] for choice in choices.values())}", SubModel(choices)


def _choices(names: Sequence[str], text: str) -> dict[str, str]:
    """The choice of each layer."""
    choices = dict.fromkeys(names, NARROW)
    for part in text.split(","):
        pattern, _, choice = part.strip().partition("=")
        matched = [name for name in names if fnmatchcase(name, pattern)]
        if not matched or choice not in (WIDE, NARROW, SKIP):
            raise RunError(f"received {part.strip()!r} in {text!r}; expected {_expected(names)}")
        choices.update(dict.fromkeys(matched, choice))
    return choices


def _expected(names: Sequence[str]) -> str:
    first = names[0] if names else "LAYER"
    there = f"{names[0]} to {names[-1]} ({len(names)})" if names else "none"
    return (
        f"{STUDENT}, {TA}, {FAMILY}, k=NUMBER, or layers as in {first}={WIDE}, with {WIDE}, {NARROW} or {SKIP}, "
        f"separated by commas; the layers are: {there}"
    )


def model_of(nested: Nested, name: str, spec: SubModel | None) -> nn.Module:
    """The model as a plain module; the TA is not copied."""
    return nested.ta if name == TA else extract(nested, spec).eval()


def _write(mapped: MappedRun, name: str, spec: SubModel | None, folder: Path, results: _Results) -> dict[str, Any]:
    """Write one model, unless it is there; its row of the table."""
    found = mapped.run
    shown = found.nested.student if spec is None else live(found.nested, spec).eval()
    assert isinstance(shown, PreTrainedModel), "map_run builds nothing else"
    not_written = None
    if not folder.exists():
        steps = results.steps or found.recipe.train.num_steps(found.recipe.data.context)
        card = recipe_card(found.nested, name, spec, found.recipe, steps=steps, scores=results.scores.get(name, ()))
        not_written = write_model(shown, folder, tokenizer=found.tokenizer, card=card, weights=mapped.weights)
    return {
        "name": name,
        "parameters": shown.num_parameters(),
        "layers": int(shown.config.get_text_config().num_hidden_layers),
        "own_code": (folder / CODE).exists(),
        "class": auto_class(shown),
        "folder": str(folder),
        "not_written": not_written,
    }


class _Results(NamedTuple):
    """What a run tells in its results: its steps, and what it has measured of its models, by name."""

    steps: int | None = None
    scores: Mapping[str, tuple[Score, ...]] = {}


def _results(path: Path) -> _Results:
    """The results of a run; nothing if it was stopped before it had any."""
    file = path / RESULTS
    if not file.is_file():
        return _Results()
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
        keys = ("bits_per_byte", "standard_error", "perplexity")
        rows = [row for row in values["models"] if row[keys[0]] is not None]
        scores = {row["name"]: held_out_scores(*(row[key] for key in keys)) for row in rows}
        return _Results(int(values["steps"]), scores)
    except DAMAGE as error:
        raise RunError(f"{file} is damaged: {error!r}; remove it to extract models without figures") from None


def _print(rows: Sequence[Mapping[str, Any]], out: Path) -> None:

    cells = [
        (
            row["name"],
            f"{row['parameters']:,}",
            str(row["layers"]),
            Path(row["folder"]).name,
            "code in the folder" if row["own_code"] else "the stock class",
        )
        for row in rows
    ]
    columns = ("model", "parameters", "layers", "folder", "loaded by")
    console = output_console()
    console.print(rich_table(f"{len(rows)} in {out}", columns, cells, left=("model", "folder", "loaded by")))
    for own_code in sorted({row["own_code"] for row in rows}):
        row = next(row for row in rows if row["own_code"] is own_code)
        for line in loading_lines(row["folder"], row["class"], own_code=own_code, has_tokenizer=True)[1:]:
            console.print(line, soft_wrap=True, highlight=False)
