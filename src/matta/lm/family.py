"""The end of `matta train`: the family taken out as Transformers folders, judged on held-out text, and told."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

from torch import nn
from transformers import PreTrainedTokenizerBase

from matta.errors import MattaError, RunError, SubModelError
from matta.extraction import extract
from matta.lm.bits import TextScore, bits_per_byte
from matta.lm.cards import ModelCard, held_out_scores, recipe_card
from matta.lm.folders import export, require_configuration
from matta.lm.recipe import Recipe
from matta.lm.runs import MODELS, RESULTS, folder_name
from matta.lm.tables import with_error
from matta.loop import FitResult
from matta.nesting import Nested
from matta.storage import write_json
from matta.submodels import SubModel, layer_names, wide, wide_narrow_wide
from matta.texttables import rich_table


@final
@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What came of training: the models, and how it went.

    `documents` are the held-out text, read `batch` sequences at a time, and `text` the counts of the training
    text. This session has trained on `tokens` in `seconds`, earlier ones of the same run on more.
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


@final
@dataclass(frozen=True, kw_only=True)
class Member:
    """A model of the family; `spec` None is the Student."""

    name: str
    k: int | None
    spec: SubModel | None


def members(nested: Nested, ks: tuple[int, ...]) -> Iterator[Member]:
    """Student, sub-models by size, and TA, which is the one with all layers wide."""
    num_layers = len(layer_names(nested))
    yield Member(name="student", k=None, spec=None)
    for k in sorted(ks):
        if k < num_layers:
            yield Member(name=f"k={k}", k=k, spec=wide_narrow_wide(nested, k))
    yield Member(name="ta", k=num_layers, spec=wide(nested))


def require_writable(nested: Nested, ks: tuple[int, ...]) -> None:
    """Refuse, before any training, a family of which no folder could hold some model.

    Raises:
        SubModelError: there is such a model.
    """
    for member in members(nested, ks):
        try:
            require_configuration(extract(nested, member.spec))
        except SubModelError as error:
            raise SubModelError(f"{member.name} of this family could not be written: {error}") from None


def finish(outcome: Outcome) -> dict[str, Any]:
    """Extract, judge, write `results.json`, and print the table; a model that cannot be written stops no other one.

    Raises:
        RunError: models were not written; it is raised after everything else is done.
    """
    recipe = outcome.recipe
    for left in (outcome.path / MODELS).glob(".*"):
        shutil.rmtree(left, ignore_errors=True)  # half-written, or half-removed, when the run was killed
    models = [_finish_model(outcome, member) for member in members(outcome.nested, recipe.family.k)]
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
    _print(outcome, results)
    require_written(models)
    return results


def write_model(model: nn.Module, folder: Path, *, tokenizer: PreTrainedTokenizerBase, card: ModelCard) -> str | None:
    """Write the folder of a model; why it cannot be written, or None."""
    try:
        export(model, folder, tokenizer=tokenizer, card=card)
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


def _finish_model(outcome: Outcome, member: Member) -> dict[str, Any]:
    """Take one model out, judge it and write its folder; its row of the results."""
    model = extract(outcome.nested, member.spec).eval()
    score = _score(outcome, model)
    scores = () if score is None else held_out_scores(score.bits_per_byte, score.standard_error, score.perplexity)
    card = recipe_card(outcome.nested, member.name, member.spec, outcome.recipe, steps=outcome.fit.steps, scores=scores)
    folder = outcome.path / MODELS / folder_name(member.name)
    if (folder / "config.json").is_file():  # of an earlier end of this run
        shutil.rmtree(folder.rename(folder.with_name(f".{folder.name}-old")))
    not_written = write_model(model, folder, tokenizer=outcome.tokenizer, card=card)
    return {
        "name": member.name,
        "k": member.k,
        "parameters": sum(each.numel() for each in model.parameters()),
        "bits_per_byte": None if score is None else score.bits_per_byte,
        "standard_error": None if score is None else score.standard_error,
        "perplexity": None if score is None else score.perplexity,
        "folder": str(folder) if not_written is None else None,
        "not_written": not_written,
    }


def _score(outcome: Outcome, model: nn.Module) -> TextScore | None:
    if not outcome.documents:
        return None
    return bits_per_byte(
        model,
        outcome.tokenizer,
        outcome.documents,
        context=outcome.recipe.data.context,
        batch=outcome.batch,
    )


def _print(outcome: Outcome, results: dict[str, Any]) -> None:
    from rich.console import Console

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
    console = Console()
    console.print(rich_table(title, columns, rows, left=("model", "folder")))
    for line in _closing_lines(outcome, results):
        console.print(line, soft_wrap=True, highlight=False)


def _closing_lines(outcome: Outcome, results: dict[str, Any]) -> Iterator[str]:
    """What else is to be known, and what to do next."""
    speed = results["tokens_per_second"]
    if speed is not None:
        yield f"{speed:,.0f} tokens a second, evaluation left out ({results['processes']} process(es))"
    if outcome.text.get("skipped"):
        yield f"skipped in the text: {json.dumps(outcome.text['skipped'])}"
    if outcome.fit.num_skipped:
        yield f"{outcome.fit.num_skipped} steps were skipped: their loss was not finite"
    yield f"matta evaluate {outcome.path}            benchmarks, for every model of the run"
    yield f"matta extract {outcome.path} k=1 --out DIR   any other size"
