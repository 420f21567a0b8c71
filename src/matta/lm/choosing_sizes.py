"""`matta choose`: the size for a budget, of a nesting with a table of its sizes, or of a run of `matta train`.

A run gets its table the first time: bits per byte on its held-out text, and latencies on this machine.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from matta.choosing.family import COLUMNS, FILE, Family
from matta.choosing.survey import family
from matta.errors import RunError
from matta.lm.command_settings import ChooseSettings
from matta.lm.recipe_files import NESTED, is_run
from matta.training.reporting import output_console, rich_table
from matta.training.run_evaluation import BEST


def run(settings: ChooseSettings) -> dict[str, Any]:
    """Print the table and the pick, and how the pick is taken out.

    Raises:
        ChoiceError: nothing fits.
        RunError: the folder has neither a table nor a run's held-out text.
    """
    found, path = family_of_run(settings.run, settings.evaluations)
    chosen = found.choose(
        latency_ms=settings.latency_ms,
        memory_mb=settings.memory_mb,
        parameters=settings.parameters,
        flops=settings.flops,
        quality=settings.quality,
        batch_size=settings.batch_size,
    )
    console = output_console()
    note = "" if found.is_complete else ", searched"
    console.print(rich_table(f"{path} ({len(found.sizes)} sizes{note}; * on the front)", COLUMNS, [*found.rows()]))
    console.print(f"chosen: {chosen.name}", highlight=False)
    console.print(f"matta.extract(nested, matta.{chosen.spec!r})", soft_wrap=True, highlight=False)
    if is_run(settings.run):
        layers = ",".join(f"{name}={choice}" for name, choice in chosen.layers.items())
        console.print(f"matta extract {settings.run} {layers} --out DIR", soft_wrap=True, highlight=False)
    return {"family": str(path), "chosen": asdict(chosen) | {"memory_mb": chosen.memory_mb}}


def family_of_run(path: Path, max_evaluations: int) -> tuple[Family, Path]:
    """The table of a folder and its file; of a run of `matta train` it is made if there is none.

    Raises:
        RunError: there is none, and nothing to make it from.
    """
    for folder in (path, path / BEST, path / NESTED):
        if (folder / FILE).is_file():
            return Family.load(folder), folder / FILE
    if path.is_file():
        return Family.load(path), path
    if not is_run(path):
        raise RunError(
            f"{path} has no {FILE} and is no run of matta train; expected a folder in which "
            f"matta.family(nested, evaluate=..., example=...).save(folder) has left one"
        )
    made = _measured(path, max_evaluations)
    return made, made.save(path / FILE)


def _measured(path: Path, max_evaluations: int) -> Family:
    """The sizes of a run, by bits per byte on its held-out text."""
    import torch

    from matta.lm.bits_per_byte import bits_per_byte
    from matta.lm.documents import held_out_documents, text_source
    from matta.lm.trained_runs import load_run

    trained = load_run(path)
    data = trained.recipe.data
    if data.evaluate is None:
        raise RunError(f"the recipe of {path} has no data.evaluate; expected held-out text to compare sizes by")
    documents = held_out_documents(text_source(data.evaluate, held_out=True), data.evaluate_bytes)
    batch = trained.recipe.train.micro_batch or trained.recipe.train.batch

    def evaluate(module: torch.nn.Module) -> float:
        return bits_per_byte(module, trained.tokenizer, documents, context=data.context, batch=batch).bits_per_byte

    ids = torch.zeros(1, data.context, dtype=torch.int64)
    example = {"input_ids": ids, "labels": ids}
    return family(trained.nested, evaluate=evaluate, example=example, max_evaluations=max_evaluations)
