"""Folders of `matta train`: everything that the run's models need, without the hub.

    plan/             where the Student lives in the TA
    recipe.json       the recipe, its overrides and defaults put in
    configs/          the configurations of Student and TA, and of their generation
    tokenizer/        the tokenizer
    nested/           the nesting at the end (matta.save)
    models/           the family, as Transformers folders
    results.json      what came of the run
    ...               and what `matta.fit` writes

`load_run` reads one back; `map_run` tells where its weights are, of the newest checkpoint if it has not ended.
"""

from __future__ import annotations

from matta.lm.needed import EXTRA as EXTRA

import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, final

import torch
from transformers import AutoConfig, AutoTokenizer, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import GENERATION_CONFIG_NAME

from matta.errors import DAMAGE, CheckpointError, RunError
from matta.lm.configurations import without_weights
from matta.lm.decoders import first_sentence, from_config
from matta.lm.recipe import Recipe
from matta.lm.recipe_files import NESTED, RECIPE, recipe_from_values, recipe_to_values
from matta.nesting.nested import Nested
from matta.sizes.saving import WEIGHTS, load, nest_saved, save_plans
from matta.sizes.storage import add_checksums, verify, write_json
from matta.sizes.streamed_extraction import SavedWeights
from matta.training.checkpoint_shares import has_shares
from matta.training.run_folder import MARKER, MODEL, checkpoints_in

RESULTS: Final = "results.json"
PLAN: Final = "plan"
TOKENIZER: Final = "tokenizer"
MODELS: Final = "models"
CONFIGS: Final = {"student": "configs/student", "ta": "configs/ta"}


@final
@dataclass(frozen=True, kw_only=True)
class LanguageRun:
    """A run: its recipe, the pair, and the tokenizer."""

    recipe: Recipe
    nested: Nested
    tokenizer: PreTrainedTokenizerBase
    path: Path


@final
@dataclass(frozen=True, kw_only=True)
class MappedRun:
    """A run on the meta device, where its weights are, and, if it has not ended, the step of the checkpoint."""

    run: LanguageRun
    weights: SavedWeights
    step: int | None


def load_run(path: str | os.PathLike[str]) -> LanguageRun:
    """The run in a folder of `matta train`, in eval mode, on the CPU.

    Raises:
        RunError: the folder is none, or the run has not ended.
        CheckpointError: weights, configurations or tokenizer are damaged.
    """
    path = Path(path)
    recipe = read_run_recipe(path)
    if not (path / NESTED).is_dir():
        raise RunError(f"the run in {path} has not ended; resume it: matta train RECIPE --resume --out {path}")
    nested = load(path / NESTED, *_models(path))
    return LanguageRun(recipe=recipe, nested=nested.eval(), tokenizer=_tokenizer(path), path=path)


def map_run(path: Path, *, check: bool = False) -> MappedRun:
    """A run whose pair has no weights, and where they are: at its end, or else in its newest checkpoint.

    With `check` the file of the weights is compared with its checksum, for which it is read as a whole.

    Raises:
        RunError: the folder is no run, or has no weights yet.
        CheckpointError: weights, plan, configurations or tokenizer are damaged.
    """
    recipe = read_run_recipe(path)
    folder, prefix, step = path / NESTED, "", None
    plan, weights = folder, folder / WEIGHTS
    if not folder.is_dir():
        checkpoints = checkpoints_in(path)
        if not checkpoints:
            raise RunError(
                f"the run in {path} has not ended and has no checkpoint; resume it: matta train RECIPE --resume --out "
                f"{path}"
            )
        folder, prefix, plan = checkpoints[-1], "nested.", path / PLAN
        weights = folder if has_shares(folder) else folder / MODEL
        step = int(re.sub(r"\D", "", folder.name))
    if check:
        verify(folder, *([] if weights == folder else [weights.name]))
    with without_weights():
        modules = _models(path)
    for module in modules:
        module.tie_weights()
    nested = nest_saved(plan, *modules).eval()
    run = LanguageRun(recipe=recipe, nested=nested, tokenizer=_tokenizer(path), path=path)
    return MappedRun(run=run, weights=SavedWeights(weights, nested, prefix), step=step)


def _models(path: Path) -> list[PreTrainedModel]:
    """Student and TA with fresh weights, by the configurations of a run."""
    with torch.random.fork_rng(devices=[]):
        models = [from_config(_read(AutoConfig, path / folder)) for folder in CONFIGS.values()]
    for model, folder in zip(models, CONFIGS.values(), strict=True):
        if (path / folder / GENERATION_CONFIG_NAME).is_file():
            model.generation_config = _read(GenerationConfig, path / folder)
    return models


def _tokenizer(path: Path) -> PreTrainedTokenizerBase:
    found: PreTrainedTokenizerBase = _read(AutoTokenizer, path / TOKENIZER)
    return found


def _read(kind: type[AutoConfig | AutoTokenizer | GenerationConfig], folder: Path) -> Any:
    """What Transformers reads from a folder of the run; no code in it is run.

    Raises:
        CheckpointError: the folder is damaged.
    """
    verify(folder)
    options = {} if kind is GenerationConfig else {"trust_remote_code": False}
    try:
        return kind.from_pretrained(folder, **options)
    except Exception as error:  # the files are the user's, and what they make Transformers raise is anything
        raise CheckpointError(
            f"{folder} is damaged: {first_sentence(error)}; take another copy of the folder"
        ) from None


def read_run_recipe(path: Path) -> Recipe:
    """The recipe of a run.

    Raises:
        RunError: the folder is no run, or its recipe is damaged.
    """
    file = path / RECIPE
    if not path.is_dir() or not file.is_file():
        other = " (it is one of matta.fit, for matta.load and your own modules)" if (path / MARKER).is_file() else ""
        raise RunError(f"{path} holds no run of matta train{other}: there is no {RECIPE}; expected the folder of one")
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except DAMAGE as error:
        raise RunError(f"{file} is damaged: {error}; take another copy of the run") from None
    return recipe_from_values(values, str(file))


def write_run(path: Path, recipe: Recipe, nested: Nested, tokenizer: PreTrainedTokenizerBase) -> None:
    """Put into the folder of a run what is known before it begins; the recipe, by which it is known as one, last."""
    for role, model in (("student", nested.student), ("ta", nested.ta)):
        assert isinstance(model, PreTrainedModel), "the models of a recipe are Transformers'"
        model.config.save_pretrained(path / CONFIGS[role])
        if (generation := getattr(model, "generation_config", None)) is not None:
            generation.to_json_file(path / CONFIGS[role] / GENERATION_CONFIG_NAME)  # save_pretrained may refuse to
    tokenizer.save_pretrained(path / TOKENIZER)
    for folder in (*CONFIGS.values(), TOKENIZER):
        add_checksums(path / folder)
    save_plans(nested, path / PLAN)
    write_recipe(path, recipe)


def write_recipe(path: Path, recipe: Recipe) -> None:
    """Put the recipe into the folder of a run."""
    write_json(path / RECIPE, recipe_to_values(recipe))


def folder_name(name: str) -> str:
    """The name of a model's folder, from which its code can be imported too.

    Example:
        >>> folder_name("k=8")
        'k-8'
    """
    return name.replace("=", "-")
