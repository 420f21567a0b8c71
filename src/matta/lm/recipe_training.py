"""`matta train`: co-train the language models of a recipe, then extract the family and judge it.

In one process, or in several: `matta train RECIPE --processes 2`, or by torchrun, accelerate launch or srun.
"""

from __future__ import annotations

from matta.lm.needed import EXTRA as EXTRA

import math
import shutil
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from matta.errors import RunError, Terminated
from matta.lm.bits_per_byte import TextScore, bits_per_byte
from matta.lm.command_settings import TrainSettings
from matta.lm.continued_runs import can_be_prolonged, put_end_aside, require_same
from matta.lm.decoders import (
    build_pair,
    make_optimizer,
    make_scheduler,
    nest_pair,
    require_context,
    require_family,
)
from matta.lm.documents import held_out_documents, text_source
from matta.lm.extracting import Outcome, finish, require_writable
from matta.lm.packing import PackedTokens
from matta.lm.recipe import DataPart, Recipe, TrainPart
from matta.lm.recipe_files import is_run, read_recipe
from matta.lm.run_notes import notes_of
from matta.lm.teacher_labels import StoredTeacher, is_stored, with_teacher
from matta.lm.teaching import load_teacher
from matta.lm.tokens import load_tokenizer
from matta.lm.trained_runs import load_run, read_run_recipe, write_recipe, write_run
from matta.nesting.batches import Batch, split_labels
from matta.nesting.nested import Nested
from matta.nesting.sharded_slices import is_sharded
from matta.objectives import CausalLM
from matta.sizes.submodels import random_sub_model
from matta.training.cotraining import CoTraining
from matta.training.fitting import fit
from matta.training.interrupts import restated
from matta.training.launching import in_processes
from matta.training.loss_schedule import Ramp, Turns, Weights
from matta.training.processes import make_accelerator, num_launched
from matta.training.run_folder import MARKER, RunFolder, checkpoints_in, is_in_use
from matta.training.run_settings import FitResult
from matta.training.sharding import shard
from matta.training.step_output import CoTrainingOutput

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch.distributed.fsdp import MixedPrecisionPolicy


def run(settings: TrainSettings) -> dict[str, Any] | None:
    """Train, extract and judge as a recipe says; the results, on the main process alone.

    Raises:
        MattaError: the recipe, its data or its models cannot work, or --out is taken.
        KeyboardInterrupt: it was stopped; a checkpoint was written before that.
    """
    recipe = read_recipe(settings.recipe, settings.overrides)
    if settings.processes > 1 and num_launched() == 1:
        return in_processes(run, settings, num_processes=settings.processes)
    if settings.processes not in (1, num_launched()):
        raise RunError(f"--processes {settings.processes} in a launcher's {num_launched()}; leave --processes out")
    accelerator = make_accelerator()
    path = _agreed_path(settings.out, recipe.name, accelerator)
    _require_free(path, resume=settings.resume)
    if is_run(path):
        require_same(recipe, read_run_recipe(path), path)
    session = _Session(recipe, accelerator)
    with _folder(path, session, accelerator):
        result = _train(session, path)
    if not accelerator.is_main_process:
        return None
    if is_sharded(session.nested):
        session.nested = load_run(path).nested.to(accelerator.device)
    try:
        return finish(session.outcome(result, path))
    except KeyboardInterrupt:
        raise KeyboardInterrupt(
            f"stopped after training; extract its models by the same command with --resume --out {path}"
        ) from None


def _agreed_path(out: Path | None, name: str, accelerator: Accelerator) -> Path:
    """The folder of the run, the same on every process."""
    if out is not None:
        return out
    from accelerate.utils import broadcast_object_list

    paths = [str(Path("runs") / f"{name}-{datetime.now():%Y%m%d-%H%M%S}")]
    if accelerator.num_processes > 1:
        broadcast_object_list(paths)
    return Path(paths[0])


def _require_free(path: Path, *, resume: bool) -> None:
    """Refuse a folder that holds something else, or a run that is not to be resumed.

    Raises:
        RunError: it does.
    """
    is_used = path.exists() and not (path.is_dir() and not any(path.iterdir()))
    if is_used and not (path / MARKER).is_file():
        raise RunError(f"{path} exists and holds no run; expected a new folder: name another with --out")
    if is_used and not resume:
        raise RunError(f"{path} exists and holds a run; resume it with --resume, or name a new folder with --out")
    RunFolder(path, resume=resume)


@final
class _Session:
    """Everything that a recipe needs to be trained here: made before anything is written."""

    def __init__(self, recipe: Recipe, accelerator: Accelerator) -> None:
        from accelerate.utils import set_seed

        self.recipe, self.accelerator = recipe, accelerator
        micro_batch, accumulate = recipe.train.shares(accelerator.num_processes)
        self.tokenizer = load_tokenizer(recipe.data.tokenizer)
        set_seed(recipe.train.seed)
        end, context = self.tokenizer.eos_token_id, recipe.data.context
        student, ta = build_pair(recipe.model, len(self.tokenizer), end_of_text=end, context=context)
        for model in (student, ta):
            require_context(model, context)
        to_measure = packed_text(recipe.data, self.tokenizer, batch=micro_batch) if recipe.model.is_downwards else None
        turns = recipe.train.turns
        is_alone = turns is not None and turns.alone > 0
        self.nested = nest_pair(recipe.model, student, ta, to_measure, warm_start=is_alone)
        require_family(self.nested, recipe.family.k)
        require_writable(self.nested, recipe.family.k)
        for model in (self.nested.student, self.nested.ta) if recipe.train.activation_checkpointing else ():
            checkpoint_activations(model)
        self.data = packed_text(recipe.data, self.tokenizer, batch=micro_batch)
        teacher = recipe.train.teacher
        self.batches = with_teacher(self.data, StoredTeacher(teacher)) if is_stored(teacher) else self.data
        self.judge = Judge.of(recipe, self.tokenizer, batch=micro_batch)
        self.notes = tuple(notes_of(recipe, student, self.data.num_samples))
        for note in self.notes if accelerator.is_main_process else ():
            warnings.warn(note, stacklevel=2)
        self.cotrain = make_cotraining(recipe, self.nested, self.tokenizer, accumulate=accumulate)
        if accelerator.num_processes > 1 and recipe.train.sharding != "none":
            self.cotrain.to(accelerator.device)
            shard(self.cotrain, by=recipe.train.sharding, policy=_mixed(recipe.train))
        set_seed(recipe.train.seed, device_specific=True)
        self.seconds, self.meter = 0.0, Meter()

    def outcome(self, result: FitResult, path: Path) -> Outcome:
        """What came of it, for the main process to finish."""
        return Outcome(
            recipe=self.recipe,
            nested=self.nested,
            tokenizer=self.tokenizer,
            path=path,
            fit=result,
            documents=() if self.judge is None else self.judge.documents,
            text=self.data.report(),
            tokens=self.meter.tokens * self.accelerator.num_processes,
            seconds=self.seconds - (0.0 if self.judge is None else self.judge.seconds),
            num_processes=self.accelerator.num_processes,
            batch=self.data.batch,
            notes=self.notes,
        )


def checkpoint_activations(model: Any) -> None:
    """Let the blocks of a Transformers model be computed again in the backward pass."""
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})


def _mixed(part: TrainPart) -> MixedPrecisionPolicy | None:
    """With bf16, blocks are gathered in it; weights and the reduction of gradients stay in float32."""
    if part.precision == "no":
        return None
    from torch.distributed.fsdp import MixedPrecisionPolicy

    return MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)


def packed_text(part: DataPart, tokenizer: PreTrainedTokenizerBase, *, batch: int) -> PackedTokens:
    """The batches of a recipe's text; all processes must call this.

    Raises:
        RunError: there is no text, or too little.
    """
    return PackedTokens(
        text_source(part.train),
        tokenizer,
        context=part.context,
        batch=batch,
        seed=part.seed,
        mask_boundaries=part.mask_boundaries,
        passes=part.passes,
        cache=part.cache or None,
        lanes=part.lanes,
        together=True,
    )


def make_cotraining(
    recipe: Recipe, nested: Nested, tokenizer: PreTrainedTokenizerBase, *, accumulate: int = 1
) -> CoTraining:
    """The step that the recipe describes; head and losses are fused where that pays."""
    part = recipe.train
    return CoTraining(
        nested,
        CausalLM(),
        weights=Weights(student=part.weights.student, ta=part.weights.ta, distill=part.weights.distill),
        ramp=Ramp(start=part.ramp.start, steps=part.ramp.steps),
        teacher=_teacher(part.teacher, nested, tokenizer),
        sample=random_sub_model(nested) if part.sample else None,
        turns=_turns(part, recipe.data.context),
        accumulate=accumulate,
    )


def _turns(part: TrainPart, context: int) -> Turns | None:
    """The turns that the recipe asks for; None: each step trains all models."""
    if part.turns is None:
        return None
    alone = part.steps_alone(part.num_steps(context))
    return Turns(alone_steps=alone, student_chance=part.turns.student_chance)


def _teacher(name: str, nested: Nested, tokenizer: PreTrainedTokenizerBase) -> nn.Module | None:
    """The model that labels every batch, if the recipe names one and not labels that are written already."""
    if not name or is_stored(name):
        return None
    return load_teacher(name, tokenizer, num_classes=nested.ta.config.vocab_size)  # type: ignore[union-attr,arg-type]


@final
@dataclass
class Judge:
    """What `matta.fit` calls in mid-training: Student and TA on the held-out text, and the time that takes."""

    documents: tuple[str, ...]
    tokenizer: PreTrainedTokenizerBase
    context: int
    batch: int
    seconds: float = 0.0

    @classmethod
    def of(cls, recipe: Recipe, tokenizer: PreTrainedTokenizerBase, *, batch: int) -> Judge | None:
        """The judge of a recipe, if it names held-out text.

        Raises:
            RunError: the text is not there.
        """
        part = recipe.data
        if part.evaluate is None:
            return None
        documents = held_out_documents(text_source(part.evaluate, held_out=True), part.evaluate_bytes)
        return cls(tuple(documents), tokenizer, part.context, batch)

    def __call__(self, nested: Nested, *, together: bool = False) -> dict[str, float]:
        """Bits per byte and nats per token of both."""
        start = time.perf_counter()
        values: dict[str, float] = {}
        for name, model in (("student", nested.student), ("ta", nested.ta)):
            score = self.score(model, together=together)
            values[f"{name}_bits_per_byte"] = score.bits_per_byte
            values[f"{name}_loss"] = math.log(score.perplexity)
        self.seconds += time.perf_counter() - start
        return values

    def together(self, nested: Nested) -> dict[str, float]:
        """As called, with the text shared among all processes."""
        return self(nested, together=True)

    def score(self, model: nn.Module, *, together: bool = False) -> TextScore:
        """One model on the text."""
        return bits_per_byte(
            model, self.tokenizer, self.documents, context=self.context, batch=self.batch, together=together
        )


@final
class Meter:
    """Counts the tokens that this session trains on."""

    def __init__(self) -> None:
        self.tokens = 0

    def before_step(self, cotrain: CoTraining, batch: Batch, out: CoTrainingOutput) -> None:
        inputs, _ = split_labels(batch)
        self.tokens += inputs["input_ids"].numel()

    def after_step(self, cotrain: CoTraining) -> None:
        pass

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any], /) -> None:
        pass


@contextmanager
def _folder(path: Path, session: _Session, accelerator: Accelerator) -> Iterator[None]:
    """The folder of the run, begun; a new one is removed if the run fails before its first checkpoint."""
    is_new = not is_run(path)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process and is_new:
        RunFolder(path, resume=True).begin()
        write_run(path, session.recipe, session.nested, session.tokenizer)
    elif accelerator.is_main_process:
        put_end_aside(session.recipe, read_run_recipe(path), path)
        write_recipe(path, session.recipe)  # with what may change
    accelerator.wait_for_everyone()
    try:
        yield
    except BaseException:
        is_free = accelerator.is_main_process and not is_in_use(path)  # by another that was started at the same time
        if is_new and is_free and not checkpoints_in(path):
            shutil.rmtree(path, ignore_errors=True)
        raise


def _train(session: _Session, path: Path) -> FitResult:
    part, judge = session.recipe.train, session.judge
    num_steps = part.num_steps(session.recipe.data.context)
    optimizer = make_optimizer(part, session.nested)
    start = time.perf_counter()
    try:
        with _without_cache(session.nested.student, session.nested.ta):
            return fit(
                session.cotrain,
                session.batches,
                optimizer,
                steps=num_steps,
                scheduler=make_scheduler(part, optimizer, num_steps),
                clip_norm=part.clip_norm or None,
                precision=part.precision,
                evaluate=judge,
                evaluate_every=None if judge is None else part.evaluate_every,
                observers=(session.meter,),
                run=path,
                resume="prolong" if can_be_prolonged(session.recipe) else True,
                checkpoint_every=part.checkpoint_every,
                accelerator=session.accelerator,
            )
    except (KeyboardInterrupt, Terminated) as ended:
        step = str(ended).partition(";")[0] or "stopped"
        raise restated(ended, f"{step}; resume with the same command and --resume --out {path}") from None
    finally:
        session.seconds = time.perf_counter() - start


@contextmanager
def _without_cache(*models: nn.Module) -> Iterator[None]:
    """Models that keep no keys and values for generation, which would cost memory in every forward."""
    configs = {id(config): config for model in models if (config := getattr(model, "config", None)) is not None}
    before = [(config, config.use_cache) for config in configs.values() if hasattr(config, "use_cache")]
    for config, _ in before:
        config.use_cache = False
    try:
        yield
    finally:
        for config, value in before:
            config.use_cache = value
