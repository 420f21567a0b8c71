"""`matta extract`: models of a run as Transformers folders, any size between Student and TA."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Final, NamedTuple

from torch import nn
from transformers import PreTrainedModel

from matta.errors import RunError
from matta.extraction import extract
from matta.lm.cards import Score, held_out_scores, loading_lines, recipe_card
from matta.lm.family import members, require_written, write_model
from matta.lm.folders import CODE, auto_class, require_new
from matta.lm.runs import MODELS, RESULTS, LanguageRun, folder_name, load_run
from matta.lm.settings import ExtractSettings
from matta.nesting import Nested
from matta.submodels import NARROW, SKIP, WIDE, SubModel, layer_names, wide, wide_narrow_wide
from matta.texttables import rich_table

STUDENT: Final = "student"
TA: Final = "ta"
FAMILY: Final = "family"


def run(settings: ExtractSettings) -> dict[str, Any]:
    """Write the models asked for, and tell how they are loaded; what the run itself has written stays as it is.

    Raises:
        RunError: the folder is no run, a model is none of its, or one of the folders of --out is there already; or
            models could not be written, once the others are.
        SubModelError: a sub-model that the nesting does not hold.
    """
    found = load_run(settings.run)
    specs = specs_of(found.nested, settings.models, found.recipe.family.k)
    out = settings.out or settings.run / MODELS
    folders = {name: out / folder_name(name) for name in specs}
    for folder in folders.values() if settings.out else ():
        require_new(folder)
    results = _results(settings.run)
    rows = [_write(found, name, spec, folders[name], results) for name, spec in specs.items()]
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


def family_of(nested: Nested, ks: Sequence[int]) -> dict[str, SubModel | None]:
    """The Student, the sub-models with k wide layers, and the TA, by name."""
    return {member.name: member.spec for member in members(nested, tuple(ks))}


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


def _write(found: LanguageRun, name: str, spec: SubModel | None, folder: Path, results: _Results) -> dict[str, Any]:
    """Write one model, unless it is there; its row of the table."""
    model = model_of(found.nested, name, spec)
    assert isinstance(model, PreTrainedModel), "load_run builds nothing else"
    not_written = None
    if not folder.exists():
        steps = results.steps or found.recipe.train.num_steps(found.recipe.data.context)
        card = recipe_card(found.nested, name, spec, found.recipe, steps=steps, scores=results.scores.get(name, ()))
        not_written = write_model(model, folder, tokenizer=found.tokenizer, card=card)
    return {
        "name": name,
        "parameters": model.num_parameters(),
        "layers": int(model.config.get_text_config().num_hidden_layers),
        "own_code": (folder / CODE).exists(),
        "class": auto_class(model),
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
    except (ValueError, KeyError, TypeError) as error:
        raise RunError(f"{file} is damaged: {error!r}; remove it to extract models without figures") from None


def _print(rows: Sequence[Mapping[str, Any]], out: Path) -> None:
    from rich.console import Console

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
    console = Console()
    console.print(rich_table(f"{len(rows)} in {out}", columns, cells, left=("model", "folder", "loaded by")))
    for own_code in sorted({row["own_code"] for row in rows}):
        row = next(row for row in rows if row["own_code"] is own_code)
        for line in loading_lines(row["folder"], row["class"], own_code=own_code, has_tokenizer=True)[1:]:
            console.print(line, soft_wrap=True, highlight=False)
