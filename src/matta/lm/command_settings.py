"""Settings of the commands for language models, apart from their modules so that `matta --help` need not load torch.

Each field is an option of the command line; `metadata["help"]` is its line of help.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, final

from matta.errors import RunError

_RECIPE: Final[dict[str, Any]] = {"help": "a recipe: a TOML file, with or without its ending", "positional": True}
_OVERRIDES: Final[dict[str, Any]] = {
    "help": "values in place of the recipe's, such as train.steps=100",
    "positional": True,
    "metavar": "KEY=VALUE",
}


@final
@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """Settings of `matta train`."""

    recipe: Path = field(metadata=_RECIPE)
    overrides: tuple[str, ...] = field(default=(), metadata=_OVERRIDES)
    out: Path | None = field(
        default=None, metadata={"help": "new folder of the run (default: runs/<recipe>-<date>)", "metavar": "DIR"}
    )
    resume: bool = field(default=False, metadata={"help": "resume the run in --out"})
    processes: int = field(
        default=1, metadata={"help": "of this machine, that train together (default: 1, or those of a launcher)"}
    )

    def __post_init__(self) -> None:
        """Refuse a resume of nothing, and no process."""
        if self.processes < 1:
            raise RunError(f"--processes {self.processes}; expected at least 1")
        if self.resume and self.out is None:
            raise RunError("--resume without --out; expected the folder of the run to resume")


@final
@dataclass(frozen=True, kw_only=True)
class PlanSettings:
    """Settings of `matta plan`.

    Raises:
        RunError: no GPU, or no memory.
    """

    recipe: Path = field(metadata=_RECIPE)
    overrides: tuple[str, ...] = field(default=(), metadata=_OVERRIDES)
    gpus: int | None = field(default=None, metadata={"help": "plan the memory of each of so many GPUs, by sharding"})
    memory_gb: float | None = field(
        default=None, metadata={"help": "memory of a GPU in GB (10^9 bytes): tells which way of sharding fits"}
    )

    def __post_init__(self) -> None:
        """Refuse to plan for nothing."""
        if self.gpus is not None and self.gpus < 1:
            raise RunError(f"gpus={self.gpus}: expected at least 1")
        if self.memory_gb is not None and not self.memory_gb > 0:
            raise RunError(f"memory_gb={self.memory_gb}: expected a number over 0")


@final
@dataclass(frozen=True, kw_only=True)
class TeachSettings:
    """Settings of `matta teach`.

    Raises:
        RunError: fewer than one token to keep.
    """

    recipe: Path = field(metadata=_RECIPE)
    overrides: tuple[str, ...] = field(default=(), metadata=_OVERRIDES)
    teacher: str = field(metadata={"help": "a Transformers folder, or a name on the hub", "metavar": "MODEL"})
    top: int = field(default=32, metadata={"help": "tokens to keep at each position (default: 32)"})
    out: Path = field(metadata={"help": "new folder for the labels", "metavar": "DIR"})

    def __post_init__(self) -> None:
        """Refuse to keep nothing."""
        if self.top < 1:
            raise RunError(f"top={self.top}: expected at least 1 token to keep at each position")


@final
@dataclass(frozen=True, kw_only=True)
class ExtractSettings:
    """Settings of `matta extract`."""

    run: Path = field(metadata={"help": "folder of a run of matta train", "positional": True})
    models: tuple[str, ...] = field(
        default=("student",),
        metadata={
            "help": "student, ta, k=8 (wide-narrow-wide), a layer's choice such as transformer.h.0=wide,... , "
            "or family (default: student)",
            "positional": True,
            "metavar": "MODEL",
        },
    )
    out: Path | None = field(
        default=None, metadata={"help": "folder for the models (default: models in the run)", "metavar": "DIR"}
    )
    check: bool = field(
        default=False, metadata={"help": "read all of the run's weights, to compare them with their checksum"}
    )


@final
@dataclass(frozen=True, kw_only=True)
class EvaluateSettings:
    """Settings of `matta evaluate`.

    Raises:
        RunError: a batch, limit or context below one.
    """

    models: tuple[str, ...] = field(
        metadata={
            "help": "runs of matta train (each model of them), Transformers folders, or names on the hub",
            "positional": True,
            "metavar": "MODEL",
        }
    )
    tasks: str = field(
        default="lambada,arc_easy,arc_challenge,sat_math,hellaswag,boolq",
        metadata={"help": "benchmarks, separated by commas; none: text alone (default: the paper's six)"},
    )
    data: Path | None = field(
        default=None, metadata={"help": "folder of <task>.jsonl in place of the hub", "metavar": "DIR"}
    )
    text: Path | None = field(
        default=None, metadata={"help": "held-out text, for bits per byte and perplexity", "metavar": "FILE"}
    )
    limit: int | None = field(default=None, metadata={"help": "examples of each benchmark (default: all)"})
    batch: int = field(default=8, metadata={"help": "examples at a time (default: 8)"})
    context: int | None = field(
        default=None, metadata={"help": "tokens of --text read at once (default: the models', at most 1024)"}
    )
    trust: bool = field(default=False, metadata={"help": "run code that comes with models of other origin"})
    baseline: str | None = field(
        default=None, metadata={"help": "the model that the others are compared with", "metavar": "MODEL"}
    )
    out: Path | None = field(
        default=None, metadata={"help": "folder for results.json and results.md", "metavar": "DIR"}
    )

    def __post_init__(self) -> None:
        """Refuse values that cannot work."""
        for name in ("limit", "batch", "context"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise RunError(f"{name}={value}: expected at least 1")


@final
@dataclass(frozen=True, kw_only=True)
class RunsSettings:
    """Settings of `matta runs`."""

    below: Path | None = field(
        default=None, metadata={"help": "the same as --folder", "positional": True, "metavar": "DIR"}
    )
    folder: Path = field(
        default=Path("runs"), metadata={"help": "folder below which the runs are (default: runs)", "metavar": "DIR"}
    )


@final
@dataclass(frozen=True, kw_only=True)
class ChooseSettings:
    """Settings of `matta choose`.

    Raises:
        RunError: no budget and no quality, or a number that is not over zero.
    """

    run: Path = field(metadata={"help": "a nesting with a family.json, or a run of matta train", "positional": True})
    latency_ms: float | None = field(default=None, metadata={"help": "most milliseconds of a batch (median)"})
    memory_mb: float | None = field(default=None, metadata={"help": "most memory of weights and activations, in MiB"})
    parameters: int | None = field(default=None, metadata={"help": "most parameters"})
    flops: float | None = field(default=None, metadata={"help": "most FLOPs of an example"})
    quality: float | None = field(default=None, metadata={"help": "what the size must reach: then the cheapest"})
    batch_size: int | None = field(
        default=None, metadata={"help": "batch of the latency (default: the first measured)"}
    )
    evaluations: int = field(
        default=64, metadata={"help": "most sizes to evaluate, where the run has no table yet (default: 64)"}
    )

    def __post_init__(self) -> None:
        """Refuse a choice without a budget."""
        budget = (self.latency_ms, self.memory_mb, self.parameters, self.flops)
        if all(each is None for each in (*budget, self.quality)):
            raise RunError("no budget; expected --latency-ms, --memory-mb, --parameters, --flops or --quality")
        if any(each is not None and not each > 0 for each in budget):
            raise RunError("a budget that is not over zero; expected positive numbers")
        _require_two(self.evaluations)


@final
@dataclass(frozen=True, kw_only=True)
class ReportSettings:
    """Settings of `matta report`.

    Raises:
        RunError: fewer than two sizes to evaluate.
    """

    run: Path = field(metadata={"help": "a run of matta train, or a folder with a family.json", "positional": True})
    out: Path | None = field(default=None, metadata={"help": "the page (default: report.html in the run)"})
    evaluations: int = field(
        default=64, metadata={"help": "most sizes to evaluate, where the run has no table yet (default: 64)"}
    )

    def __post_init__(self) -> None:
        """Refuse a family of one."""
        _require_two(self.evaluations)


@final
@dataclass(frozen=True, kw_only=True)
class ExportSettings:
    """Settings of `matta export`.

    Raises:
        RunError: an unknown format, or int8 in another format than ONNX.
    """

    run: Path = field(metadata={"help": "a run of matta train", "positional": True})
    model: str = field(metadata={"help": "student, ta, k=NUMBER, or layers (as in matta extract)", "positional": True})
    out: Path = field(metadata={"help": "the file or folder to be", "metavar": "PATH"})
    format: str | None = field(
        default=None,
        metadata={
            "help": "onnx, torch_export, safetensors or transformers (default: by the end of PATH, .onnx, .pt2 or "
            ".safetensors; of any other name onnx)"
        },
    )
    int8: bool = field(default=False, metadata={"help": "8-bit weights (onnx alone)"})

    def __post_init__(self) -> None:
        """Refuse what no format has."""
        if self.format not in (None, "onnx", "torch_export", "safetensors", "transformers"):
            raise RunError(f"--format {self.format}; expected onnx, torch_export, safetensors or transformers")
        if self.int8 and self.written_format != "onnx":
            raise RunError("--int8 is for --format onnx alone; leave one of them out")

    @property
    def written_format(self) -> str:
        """The format named, or that of the file's name."""
        by_name = {".pt2": "torch_export", ".safetensors": "safetensors"}
        return self.format or by_name.get(self.out.suffix, "onnx")


def _require_two(evaluations: int) -> None:
    if evaluations < 2:
        raise RunError(f"--evaluations {evaluations}; expected at least 2, the Student and the TA")
