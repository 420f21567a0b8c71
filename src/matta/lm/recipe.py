"""The parts of a recipe: what a run trains, on what, and how.

    [model]   architecture or pretrained, student, ta, layers, share
    [data]    train, evaluate, tokenizer, context, ...
    [train]   steps or tokens, batch, optimizer, learning_rate, ...
    [family]  k

Each part is a dataclass below; its fields are the keys. `recipe_files` reads them from a TOML file.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, final

from matta.errors import RunError
from matta.lm.typed_tables import Value


@final
@dataclass(frozen=True, kw_only=True)
class SourcePart:
    """A text: `path`, or `hub` with the rest. In a recipe a plain string is a path.

    Args:
        path: A file (text, JSON lines, Parquet), a folder, or a pattern of such; "pydoc": CPython's own help on
            topics, of which the last tenth is for evaluation.
        hub: A data set's name on the hub, which is streamed.
        config: The configuration of that data set, such as "en".
        split: Its part.
        field: The field, or column, that is the text.
        separator: What stands between two documents in a plain text file; none: the whole file is one document.

    Raises:
        RunError: not one of path and hub.
    """

    short_for = "path"  # what a plain string is

    path: str = ""
    hub: str = ""
    config: str = ""
    split: str = "train"
    field: str = "text"
    separator: str = ""

    def __post_init__(self) -> None:
        if bool(self.path) == bool(self.hub):
            raise RunError(f"received path={self.path!r} and hub={self.hub!r}; expected one of them")


@final
@dataclass(frozen=True, kw_only=True)
class ModelPart:
    """Student and TA: decoders of Transformers, built from configurations.

    Args:
        architecture: Transformers' name of a kind of model (its `model_type`), such as "gpt2", "llama", "qwen3".
        pretrained: In place of it a folder, or a name on the hub. With `ta`, upwards: the Student starts from these
            weights, and the TA as good as it. With `student`, downwards: it is the TA, and the Student starts as the
            best slice of it.
        student: Values of the Student's configuration, by the architecture's own names; of a pretrained TA those that
            are smaller in the Student.
        ta: The values that differ in the TA.
        layers: Which of the TA's blocks hold the Student's: "first", "last", "even", "ends", or their indices; of a
            pretrained TA also "best" (`matta.best_layers`).
        share: "all", "embeddings", "none", or patterns of the parameters to be shared (section 4.3.2).
        order: How the channels of a pretrained TA are put in order (`matta.order`): by "activation", "taylor" or
            "magnitude", or "none".
        order_batches: Batches of the text, as one process reads them, to measure that on.

    Raises:
        RunError: not one of architecture and pretrained, or a Student and TA without a difference.
    """

    architecture: str = ""
    pretrained: str = ""
    student: Mapping[str, Value] = field(default_factory=dict)
    ta: Mapping[str, Value] = field(default_factory=dict)
    layers: str | tuple[int, ...] = "first"
    share: str | tuple[str, ...] = "all"
    order: Literal["activation", "taylor", "magnitude", "none"] = "activation"
    order_batches: int = 16

    def __post_init__(self) -> None:
        if bool(self.architecture) == bool(self.pretrained):
            raise RunError(
                f"received architecture={self.architecture!r} and pretrained={self.pretrained!r}; expected one of them"
            )
        if self.pretrained and bool(self.student) == bool(self.ta):
            raise RunError(
                f"received {'values in both student and ta' if self.ta else 'neither student nor ta'} beside "
                f"pretrained: a pretrained model is the Student of a larger TA, or the TA of a smaller Student; give "
                f"one table and leave the other out, or empty it: 'model.student={{}}' or 'model.ta={{}}'"
            )
        if not self.ta and not self.pretrained:
            raise RunError("ta: the table is empty; expected what is larger in the TA, such as n_layer = 36")
        rules = ("first", "last", "even", "ends", *(["best"] if self.is_downwards else []))
        if isinstance(self.layers, str) and self.layers not in rules:
            raise RunError(f"layers = {self.layers!r}: expected {', '.join(rules)}, or a list of indices")
        _require(self, 1, "order_batches")

    @property
    def is_downwards(self) -> bool:
        """Whether the pretrained model is the TA of a smaller Student."""
        return bool(self.pretrained and self.student)


@final
@dataclass(frozen=True, kw_only=True)
class DataPart:
    """What is read: texts, and how they become batches.

    Args:
        train: Text to train on.
        evaluate: Held-out text, for bits per byte; none: nothing is evaluated.
        evaluate_bytes: So much of it at most.
        tokenizer: "bytes", a folder, a file of the tokenizers library, or a name on the hub.
        context: Tokens of a sequence.
        mask_boundaries: No loss on the first token after the end of a document.
        passes: Passes over the text at most; none: as many as the steps need.
        cache: A folder for the tokens of local files, so that all runs and processes tokenise them once; none: each
            keeps them in memory.
        lanes: Lanes in which streamed text is read, whatever the number of processes; none: as many as the processes
            that begin the run.
        seed: Of the order of the text.

    Raises:
        RunError: a value is out of range.
    """

    train: SourcePart
    evaluate: SourcePart | None = None
    evaluate_bytes: int = 1_000_000
    tokenizer: str
    context: int
    mask_boundaries: bool = False
    passes: int | None = None
    cache: str = ""
    lanes: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        _require(self, 1, "evaluate_bytes", "passes", "lanes")
        _require(self, 2, "context")
        _require(self, 0, "seed")


@final
@dataclass(frozen=True, kw_only=True)
class WeightsPart:
    """ω₁, ω₂ and ω₃ of the losses (section 3.1).

    Raises:
        RunError: a negative weight.
    """

    student: float = 1.0
    ta: float = 1.0
    distill: float = 1.0

    def __post_init__(self) -> None:
        _require(self, 0, "student", "ta", "distill")


@final
@dataclass(frozen=True, kw_only=True)
class RampPart:
    """The distillation loss comes in at step `start`, over `steps` steps (section 3.1.1).

    Raises:
        RunError: a negative number.
    """

    start: int = 0
    steps: int = 0

    def __post_init__(self) -> None:
        _require(self, 0, "start", "steps")


@final
@dataclass(frozen=True, kw_only=True)
class TurnsPart:
    """The Student alone at first, then the TA and one other model a step (`matta.Turns`): more steps for the same time.

    Args:
        alone: Share of the steps that train the Student alone, at the largest learning rate. The TA then starts as the
            Student (`warm_start=True`).
        student_chance: Of a later step, to train the Student and not a size between.

    Raises:
        RunError: a number outside of 0 to 1.
    """

    alone: float = 0.5
    student_chance: float = 0.3

    def __post_init__(self) -> None:
        for name, value in (("alone", self.alone), ("student_chance", self.student_chance)):
            if not 0 <= value <= 1:
                raise RunError(f"{name} = {value}: expected a number from 0 to 1")


@final
@dataclass(frozen=True, kw_only=True)
class TrainPart:
    """How it is trained.

    Args:
        steps: Optimizer steps; or
        tokens: tokens to train on, over all processes.
        batch: Sequences of a step, over all processes: it does not hang on the machine.
        micro_batch: Sequences in a forward of one process; none: its share of the batch. The rest is accumulated.
        optimizer: "adamw", or "shampoo": `matta.Shampoo` with the Adam graft.
        learning_rate: Its largest value.
        final_learning_rate: Its value at the end of a schedule that falls.
        warmup: Steps over which it rises from zero.
        schedule: How it falls after that: "cosine", "linear", or "constant" for not at all.
        betas: Of the averages of gradients and their squares.
        weight_decay: Of matrices; not of embeddings, norms and biases.
        clip_norm: Largest norm of all gradients together; 0: no clipping.
        precision: "no" (float32), or "bf16": autocast.
        weights: Of the three losses.
        ramp: When distillation comes in.
        sample: Train a random sub-model along in each step.
        turns: Train the Student alone at first, then the TA and one other model a step; none: all of them in each step.
        sharding: In several processes: "none" (each has all weights), or FSDP2 by "block" or as a "whole".
        activation_checkpointing: Compute blocks again in the backward pass in place of keeping what is in them.
        teacher: A folder of a Transformers model that labels every batch, or of labels that `matta teach` has
            written; none: the tokens of the text are the labels.
        checkpoint_every: Steps between checkpoints.
        evaluate_every: Steps between evaluations of Student and TA; none: at the end alone.
        seed: Of the fresh weights, dropout and sampling.

    Raises:
        RunError: a value is out of range, or not one of steps and tokens.
    """

    steps: int | None = None
    tokens: int | None = None
    batch: int
    micro_batch: int | None = None
    optimizer: Literal["adamw", "shampoo"] = "adamw"
    learning_rate: float
    final_learning_rate: float = 0.0
    warmup: int = 0
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.1
    clip_norm: float = 1.0
    precision: Literal["no", "bf16"] = "no"
    weights: WeightsPart = field(default_factory=WeightsPart)
    ramp: RampPart = field(default_factory=RampPart)
    sample: bool = False
    turns: TurnsPart | None = None
    sharding: Literal["none", "block", "whole"] = "none"
    activation_checkpointing: bool = False
    teacher: str = ""
    checkpoint_every: int = 1000
    evaluate_every: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if (self.steps is None) == (self.tokens is None):
            raise RunError(f"received steps={self.steps} and tokens={self.tokens}; expected one of them")
        _require(self, 1, "steps", "tokens", "batch", "micro_batch", "checkpoint_every", "evaluate_every")
        _require(self, 0, "final_learning_rate", "warmup", "weight_decay", "clip_norm", "seed")
        if not self.learning_rate > 0:
            raise RunError(f"learning_rate = {self.learning_rate}: expected a number over 0")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise RunError(f"betas = {list(self.betas)}: expected two numbers from 0 up, below 1")

    def num_steps(self, context: int) -> int:
        """Optimizer steps in all, the last of which may go beyond `tokens`.

        Example:
            >>> TrainPart(tokens=1000, batch=4, learning_rate=0.1).num_steps(context=100)
            3
        """
        if self.steps is not None:
            return self.steps
        assert self.tokens is not None
        return math.ceil(self.tokens / (self.batch * context))

    def steps_alone(self, num_steps: int) -> int:
        """How many of `num_steps` train the Student alone.

        Example:
            >>> TrainPart(steps=10, batch=4, learning_rate=0.1, turns=TurnsPart(alone=0.25)).steps_alone(10)
            2
        """
        return 0 if self.turns is None else int(self.turns.alone * num_steps)

    def shares(self, num_processes: int) -> tuple[int, int]:
        """Sequences in a forward of a process, and forwards to a step.

        Raises:
            RunError: the batch cannot be shared out.

        Example:
            >>> TrainPart(steps=1, batch=512, micro_batch=8, learning_rate=0.1).shares(num_processes=16)
            (8, 4)
        """
        micro = self.micro_batch or max(self.batch // num_processes, 1)
        if self.batch % (micro * num_processes):
            unit = micro * num_processes
            raise RunError(
                f"train.batch = {self.batch} cannot be shared out over {num_processes} process(es) with {micro} "
                f"sequences in a forward; expected a multiple of {unit}: change train.batch or train.micro_batch"
            )
        return micro, self.batch // (micro * num_processes)


@final
@dataclass(frozen=True, kw_only=True)
class FamilyPart:
    """The sub-models to be extracted and judged in the end.

    Args:
        k: How many layers are wide, half of them at either end (wide-narrow-wide, section 4.2.3).

    Raises:
        RunError: a negative number, or one given twice.
    """

    k: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if any(each < 0 for each in self.k) or len(set(self.k)) < len(self.k):
            raise RunError(f"k = {list(self.k)}: expected numbers of layers from 0 up, each once")


@final
@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A whole recipe; see the parts."""

    name: str
    model: ModelPart
    data: DataPart
    train: TrainPart
    family: FamilyPart = field(default_factory=FamilyPart)


def _require(part: Any, least: int, *names: str) -> None:
    """Refuse values below the least."""
    for name in names:
        value = getattr(part, name)
        if value is not None and value < least:
            raise RunError(f"{name} = {value}: expected {least} or more")
