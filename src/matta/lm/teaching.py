"""Teachers of language models: a frozen model of Transformers, or its top-k labels, written once (`matta teach`)."""

from __future__ import annotations

from matta.lm.needed import EXTRA as EXTRA

import json
import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from itertools import islice
from pathlib import Path
from typing import Any, final

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from matta import __version__
from matta.errors import DAMAGE, RunError
from matta.lm.command_settings import TeachSettings
from matta.lm.decoders import load_decoder, require_context
from matta.lm.documents import text_source
from matta.lm.folders import is_own_code
from matta.lm.packing import PackedTokens
from matta.lm.recipe import Recipe
from matta.lm.recipe_files import read_recipe
from matta.lm.teacher_labels import About, begin, samples_per_shard, shard_file, write_shard
from matta.lm.tokens import load_tokenizer, require_agreement, tokenizer_fingerprint
from matta.nesting.batches import eval_mode
from matta.objectives.labels import TopK, top_k


@final
class Teacher(nn.Module):
    """A frozen model of Transformers that gives `num_classes` logits, of `num_tokens` tokens at most.

    Models are often built for more tokens than their tokenizer has: these get no probability, and neither does what the
    Student has beyond the Teacher.
    """

    def __init__(self, model: PreTrainedModel, num_classes: int, num_tokens: int | None = None) -> None:
        super().__init__()
        self.model, self.num_classes = model.requires_grad_(False), num_classes
        self.num_tokens = num_classes if num_tokens is None else min(num_tokens, num_classes)
        self.eval()

    def forward(self, input_ids: Tensor, **inputs: Any) -> Float[Tensor, "batch time classes"]:
        """The logits."""
        logits: Tensor = self.model(input_ids=input_ids, use_cache=False, **inputs).logits
        logits = logits[..., : self.num_tokens]
        return functional.pad(logits, (0, self.num_classes - logits.shape[-1]), value=-torch.inf)


def load_teacher(
    name: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    num_classes: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> Teacher:
    """A frozen model for `matta.CoTraining(teacher=...)`, in eval mode.

    Args:
        name: A folder of Transformers, or a name on the hub.
        tokenizer: That of the data, with which the model's own must agree.
        num_classes: Logits to give: as many as the Student's; by default as many as the tokenizer has tokens.
        dtype: Of its weights.

    Raises:
        RunError: there is no such model, or not all of its weights, or it has another tokenizer or fewer tokens.
    """
    who = f"the Teacher {name!r}"
    try:
        own = load_tokenizer(name)
    except RunError as error:
        raise RunError(f"{who}: {error}") from error
    require_agreement(own, tokenizer, names=(name, "the data"))
    model = load_decoder(name, who, dtype, trust=_is_written_by_matta(Path(name).expanduser()))
    if model.config.vocab_size < len(tokenizer):
        raise RunError(
            f"the Teacher {name} has logits of {model.config.vocab_size} tokens, and the tokenizer has "
            f"{len(tokenizer)}; expected at least as many"
        )
    return Teacher(model, num_classes or len(tokenizer), len(tokenizer))


def _is_written_by_matta(folder: Path) -> bool:
    """Whether the code in a folder is that of matta, for blocks of different sizes."""
    try:
        return is_own_code(folder, json.loads((folder / "config.json").read_text(encoding="utf-8")))
    except (OSError, *DAMAGE):
        return False  # and there is no code to run: what is wrong is told when the model is loaded


def run(settings: TeachSettings) -> dict[str, Any]:
    """Write a Teacher's top-k labels for the samples of a recipe; of those that are there already, what is missing.

    Local text is labelled whole; of streamed text the samples that the recipe trains on, in one process, or with
    data.lanes in any number.

    Raises:
        RunError: the recipe, its data or the Teacher cannot work, or --out holds something else.
    """
    recipe = read_recipe(settings.recipe, settings.overrides)
    tokenizer = load_tokenizer(recipe.data.tokenizer)
    if settings.top > len(tokenizer):
        raise RunError(f"--top {settings.top}: the tokenizer has {len(tokenizer)} tokens; expected at most as many")
    teacher = load_teacher(settings.teacher, tokenizer)
    require_context(teacher.model, recipe.data.context)
    packed, num_samples = _samples(recipe, tokenizer)
    about = About(
        teacher=settings.teacher,
        top=settings.top,
        vocabulary=len(tokenizer),
        tokenizer=tokenizer_fingerprint(tokenizer),
        data=packed.fingerprint(order=False),
        context=recipe.data.context,
        num_samples=num_samples,
        samples_per_shard=samples_per_shard(settings.top, len(tokenizer), recipe.data.context, packed.batch),
        precision=recipe.train.precision,
        matta=__version__,
    )
    begin(settings.out, about)
    start = time.perf_counter()
    num_written = _write(settings, about, packed, teacher.to(_device()))
    num_bytes = sum(shard_file(settings.out, shard).stat().st_size for shard in range(about.num_shards))
    print(
        f"{settings.out}: the {about.top} likeliest tokens at each position of {about.num_samples:,} samples, "
        f"{num_bytes / 1e6:,.1f} MB\nmatta train {settings.recipe} train.teacher={settings.out}"
    )
    return {
        "out": str(settings.out),
        "samples": about.num_samples,
        "tokens": about.num_samples * about.context,
        "files": about.num_shards,
        "files_written_now": num_written,
        "bytes": num_bytes,
        "seconds": time.perf_counter() - start,
    }


def _samples(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> tuple[PackedTokens, int]:
    """The samples in an order that is the same each time, and how many there are to label."""
    part, source = recipe.data, text_source(recipe.data.train)
    batch = recipe.train.shares(1)[0]
    is_local = source.hub is None
    packed = PackedTokens(
        source,
        tokenizer,
        context=part.context,
        batch=batch,
        seed=None if is_local else part.seed,
        passes=1 if is_local else part.passes,
        cache=part.cache or None,
        lanes=part.lanes,
    )
    if packed.num_samples is not None:
        return packed, packed.num_samples
    return packed, recipe.train.num_steps(part.context) * recipe.train.batch


def _write(settings: TeachSettings, about: About, packed: PackedTokens, teacher: Teacher) -> int:
    """Write the files that are missing; gives their number."""
    num_written = 0
    for shard in range(about.num_shards):
        rows = about.rows_of(shard)
        batches = islice(packed, -(-rows // packed.batch))  # streamed text continues after the last of them
        if shard_file(settings.out, shard).is_file():
            for _ in batches:  # read past
                pass
            continue
        samples, labels = _labelled(batches, packed, teacher, about)
        if len(samples) < rows:
            raise RunError(
                f"the text ended after {len(samples)} samples of file {shard}; expected {rows}: the same text"
            )
        write_shard(settings.out, shard, about, samples[:rows], labels.at(slice(rows)))
        num_written += 1
        print(f"file {shard + 1} of {about.num_shards} written", file=sys.stderr, flush=True)
    return num_written


def _labelled(
    batches: Iterator[dict[str, Tensor]], packed: PackedTokens, teacher: Teacher, about: About
) -> tuple[np.ndarray[Any, Any], TopK]:
    """The ids of samples, and the Teacher's labels of all positions but the first."""
    samples, found = [], []
    for batch in batches:
        samples.append(packed.last_samples)
        found.append(_label(teacher, batch["input_ids"], about))
    return torch.cat(samples).numpy(), TopK(*(torch.cat(each) for each in zip(*found, strict=True)))


@torch.no_grad()
def _label(teacher: Teacher, ids: Tensor, about: About) -> TopK:
    device = next(teacher.parameters()).device
    with eval_mode(teacher), _autocast(about.precision, device):
        logits = teacher(ids.to(device))
    labels = top_k(logits[:, :-1], about.top)
    if not bool(labels.log_probs[..., 0].isfinite().all()):
        raise RunError(
            f"the Teacher {about.teacher} gives logits that are not finite (precision {about.precision}); expected "
            f"numbers: look for NaN in its weights, or run it with train.precision=no"
        )
    return TopK(*(each.cpu() for each in labels._replace(log_probs=labels.log_probs.half())))


def _autocast(precision: str, device: torch.device) -> AbstractContextManager[Any]:
    return torch.autocast(device.type, dtype=torch.bfloat16) if precision == "bf16" else nullcontext()


def _device() -> torch.device:
    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
