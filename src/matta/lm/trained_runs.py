"""Folders of `matta train`: everything that the run's models need, without the hub.

    recipe.json       the recipe, its overrides and defaults put in
    configs/          the configurations of Student and TA
    tokenizer/        the tokenizer
    nested/           the nesting at the end (matta.save)
    models/           the family, as Transformers folders
    results.json      what came of the run
    ...               and what `matta.fit` writes

`load_run` reads one back.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Final, final

import torch
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from matta.errors import RunError
from matta.lm.decoders import from_config
from matta.lm.recipe import NESTED, RECIPE, Recipe, recipe_from_values, recipe_to_values
from matta.nesting.nested import Nested
from matta.sizes.saving import load
from matta.sizes.storage import add_checksums, verify, write_json

RESULTS: Final = "results.json"
TOKENIZER: Final = "tokenizer"
MODELS: Final = "models"
CONFIGS: Final = {"student": "configs/student", "ta": "configs/ta"}


@final
@dataclass(frozen=True, kw_only=True)
class LanguageRun:
    """A run that has ended: its recipe, the trained pair, and the tokenizer."""

    recipe: Recipe
    nested: Nested
    tokenizer: PreTrainedTokenizerBase
    path: Path


def load_run(path: Path) -> LanguageRun:
    """The run in a folder of `matta train`, in eval mode, on the CPU.

    Raises:
        RunError: the folder is none, or the run has not ended.
        CheckpointError: weights, configurations or tokenizer are damaged.
    """
    recipe = read_run_recipe(path)
    if not (path / NESTED).is_dir():
        raise RunError(f"the run in {path} has not ended; resume it: matta train RECIPE --resume --out {path}")
    for folder in (*CONFIGS.values(), TOKENIZER):
        verify(path / folder)
    with torch.random.fork_rng(devices=[]):
        modules = [from_config(AutoConfig.from_pretrained(path / folder)) for folder in CONFIGS.values()]
    nested = load(path / NESTED, *modules)
    tokenizer = AutoTokenizer.from_pretrained(path / TOKENIZER)
    return LanguageRun(recipe=recipe, nested=nested.eval(), tokenizer=tokenizer, path=path)


def read_run_recipe(path: Path) -> Recipe:
    """The recipe of a run.

    Raises:
        RunError: the folder is no run, or its recipe is damaged.
    """
    file = path / RECIPE
    if not path.is_dir() or not file.is_file():
        raise RunError(f"{path} holds no run of matta train: there is no {RECIPE}; expected the folder of one")
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise RunError(f"{file} is damaged: {error}") from None
    return recipe_from_values(values, str(file))


def write_run(path: Path, recipe: Recipe, nested: Nested, tokenizer: PreTrainedTokenizerBase) -> None:
    """Put into the folder of a run what is known before it begins; the recipe, by which it is known as one, last."""
    for role, model in (("student", nested.student), ("ta", nested.ta)):
        assert isinstance(model, PreTrainedModel), "the models of a recipe are Transformers'"
        model.config.save_pretrained(path / CONFIGS[role])
    tokenizer.save_pretrained(path / TOKENIZER)
    for folder in (*CONFIGS.values(), TOKENIZER):
        add_checksums(path / folder)
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
