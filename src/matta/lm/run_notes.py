"""What a run tells when it begins, and again at its end: values of its recipe that change what its figures mean."""

from __future__ import annotations

from matta.lm.needed import EXTRA as EXTRA

from collections.abc import Iterator

from transformers import PreTrainedModel

from matta.lm.decoders import untrained_positions
from matta.lm.documents import read_by_both
from matta.lm.recipe import Recipe, TrainPart


def notes_of(recipe: Recipe, student: PreTrainedModel, num_samples: int | None) -> Iterator[str]:
    """The notes of a run whose text has so many samples to a pass, if that is known."""
    data, part = recipe.data, recipe.train
    num_steps, most = part.num_steps(data.context), (num_samples or 0) * (data.passes or 0) // part.batch
    if most and most < num_steps:
        yield (
            f"the text ends after {most:,} of {num_steps:,} steps (data.passes = {data.passes}), before the learning "
            f"rate has come to its end; expected train.steps={most}, or more passes"
        )
        num_steps = most
    yield from _of_steps(part, num_steps)
    if data.evaluate is not None and (told := read_by_both(data.train, data.evaluate)) is not None:
        yield told
    if recipe.model.architecture and (told := untrained_positions(student, data.context)) is not None:
        yield told


def _of_steps(part: TrainPart, num_steps: int) -> Iterator[str]:
    """What does not come about in so few steps."""
    if part.warmup > num_steps:
        yield (
            f"the learning rate rises over {part.warmup:,} steps, and the run has {num_steps:,}: it never comes to "
            f"{part.learning_rate:g}; expected train.warmup below the number of steps"
        )
    if part.weights.distill > 0 and num_steps > 1 and part.ramp.start >= num_steps:
        yield (
            f"the distillation comes in at step {part.ramp.start:,}, and the run has {num_steps:,}: nothing is "
            f"distilled; expected train.ramp.start below the number of steps"
        )
