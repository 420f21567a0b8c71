"""The sizes that are served: plain modules over one copy of the TA's weights, by version.

A version of a folder of `matta.Snapshots` is loaded into a copy of the nesting and tried on the example; only then does
it take the place of the one before it, which ends the batches that it has begun.
"""

from __future__ import annotations

import math
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from types import NoneType
from typing import Any, Final, final

import torch
from torch import Tensor, nn

from matta.choosing.family import Family
from matta.choosing.measuring import num_examples, resized, run_example, usable_device
from matta.choosing.survey import STUDENT, TA, size_name, student_spec
from matta.errors import CheckpointError, MattaError, ServeError, require_kind
from matta.exporting.formats import export
from matta.exporting.onnx_runtime import OnnxModule
from matta.nesting.batches import (
    Batch,
    call,
    eval_mode,
    map_tensors,
    outputs_by_name,
    split_labels,
    tensor_names,
    tensors_of,
)
from matta.nesting.copying import copy_module, deep_copy
from matta.nesting.nested import Nested
from matta.serving.batch_independence import require_own_rows
from matta.serving.inference_protocol import NAMES, OPEN, TensorSpec
from matta.serving.size_policy import BatchTime
from matta.sizes.extraction import extract, share
from matta.sizes.submodels import SubModel, layer_names, wide, wide_narrow_wide
from matta.training.snapshots import LATEST, newest_version, read_snapshot

MODEL: Final = "model"
TORCH: Final = "torch"
OWN: Final = "1"  # the version of the weights that the server was started with
TIMED_CALLS: Final = 5
MOST_BETWEEN: Final = 3  # sizes between Student and TA, where no family says which


@final
@dataclass(frozen=True, kw_only=True)
class Version:
    """Modules by size, from the cheapest to the best, and the version that they are of."""

    name: str
    modules: Mapping[str, nn.Module]


@final
class ServedModels:
    """What a server computes with: a module for each size, of the current version and of pinned ones.

    Args:
        nested: The pair, or a plain module, which is served as the one size "model".
        example: A batch as in training; its inputs tell names, dtypes and shapes.
        family: The table of sizes: those on its fronts of latency and of parameters are served. None: Student, TA, and
            some between.
        open_axes: Axes of the inputs of any length; the batch axis, 0, always is.
        max_rows: Of a batch: what times are measured up to.
        threads: Of an operation on a CPU; it holds for the process.
        device: Where the modules compute.
        runtime: "torch", views of one copy of the weights; or "onnx", a session of ONNX Runtime for each size.
        logits: Where they are in what the modules return, as in `CoTraining`.

    Raises:
        ServeError: the example or the module cannot be served.
        MattaError: arguments of other kinds, a device that is not there, or an example on which the module fails.
        SubModelError: the family is of another nesting.
    """

    def __init__(
        self,
        nested: nn.Module,
        *,
        example: Batch,
        family: Family | None = None,
        open_axes: Sequence[int] = (0,),
        max_rows: int = 64,
        threads: int = 1,
        device: str | torch.device = "cpu",
        runtime: str = TORCH,
        logits: str | Callable[[Any], Any] | None = None,
    ) -> None:
        require_kind("nested", nested, nn.Module, "what matta.nest gives, or a plain module")
        require_kind("family", family, (Family, NoneType), "what matta.family gives: matta.Family.load(path)")
        self.device = usable_device(device)
        self._runtime, self._threads, self._open_axes, self._logits = runtime, threads, tuple(open_axes), logits
        torch.set_num_threads(threads)
        is_there = all(each.device == self.device for each in nested.parameters())
        self._source = nested if is_there else deep_copy(nested).to(self.device)
        self._inputs = split_labels(example)[0]
        count, self._names = num_examples(self._inputs), tensor_names(self._inputs)
        tensors = dict(zip(self._names, tensors_of(self._inputs), strict=True))
        has_rows = {name: bool(each.ndim) and len(each) == count for name, each in tensors.items()}
        self.inputs = tuple(_spec(name, each, {0, *open_axes}) for name, each in tensors.items() if has_rows[name])
        self._constants = {name: each for name, each in tensors.items() if not has_rows[name]}
        self._require_runs()
        self.specs = served_specs(nested, family) if isinstance(nested, Nested) else {MODEL: None}
        self.current = Version(name=OWN, modules=self._modules(self._source))
        self.pinned: dict[str, Version] = {}
        with torch.inference_mode():
            answers = self._checked(self.current)
            self._require_own_rows(answers, max_rows)
        self.outputs = tuple(_spec(name, each, {0, *open_axes}) for name, each in answers.items())
        self.times = self._measure(max_rows)

    def _require_runs(self) -> None:
        """Refuse an example that the module does not run on, before it is exported or timed."""
        module = self._source.ta if isinstance(self._source, Nested) else self._source
        values = map_tensors(self._inputs, lambda each: each.to(self.device))
        with eval_mode(module):
            run_example(module, values)

    @property
    def sizes(self) -> tuple[str, ...]:
        """Their names, from the cheapest to the best."""
        return tuple(self.specs)

    @torch.inference_mode()
    def run(self, size: str, inputs: Mapping[str, Tensor], version: str | None = None) -> tuple[dict[str, Tensor], str]:
        """The outputs of a size by name, on the CPU, and the version that gave them; `version` is a pinned one."""
        of_version = self.current if version is None else self.pinned[version]
        outputs = self._call(of_version.modules[size], inputs)
        return {name: each.cpu() for name, each in outputs.items()}, of_version.name

    def load(self, folder: Path, number: int | None = None) -> Version:
        """A version of a folder of `matta.Snapshots`, tried on the example; by default the newest.

        Raises:
            MattaError: it is damaged, does not fit, or does not compute finite numbers.
        """
        if isinstance(self._source, Nested):
            version = self._load_family(self._source, folder, number)
        else:
            build = partial(deep_copy, self._source)
            snapshot = read_snapshot(folder, build, model=_only_model(folder), version=number)
            version = Version(name=str(snapshot.version), modules=self._modules(snapshot.module))
        with torch.inference_mode():
            self._checked(version)
        return version

    def pin(self, folder: Path, number: int) -> None:
        """Load a version that stays, for comparisons side by side.

        Raises:
            MattaError: as for `load`.
        """
        version = self.load(folder, number)
        self.pinned[version.name] = version

    def _load_family(self, source: Nested, folder: Path, number: int | None) -> Version:
        """A copy of the nesting with the weights of a version, and its running statistics.

        Raises:
            CheckpointError: a model of it is damaged, or does not fit.
            ServeError: the Student has something of its own, and was not published.
        """
        nested = deep_copy(source)
        snapshot = read_snapshot(folder, lambda: nested.ta, model="ta", version=number)
        own = nested.plan.private or _moved_buffers(source, nested)
        if own:
            if not (folder / f"{snapshot.version:08d}" / "student.safetensors").is_file():
                raise ServeError(
                    f"version {snapshot.version} has the TA alone, and the Student has {own[0]} of its own; expected "
                    f'both: Snapshots(models={{"ta": matta.wide(nested), "student": None}})'
                )
            student = read_snapshot(folder, lambda: extract(nested), version=snapshot.version).module
            _take_own(nested, student)
        return Version(name=str(snapshot.version), modules=self._modules(nested))

    def _modules(self, source: nn.Module) -> Mapping[str, nn.Module]:
        if isinstance(source, Nested):
            modules: Mapping[str, nn.Module] = share(source, self.specs)
        else:
            modules = {MODEL: copy_module(source, {}).eval()}
        return modules if self._runtime == TORCH else self._sessions(modules)

    def _sessions(self, modules: Mapping[str, nn.Module]) -> Mapping[str, nn.Module]:
        """The modules as ONNX Runtime computes them."""
        example = (self._inputs, None) if not isinstance(self._inputs, Mapping) else self._inputs
        with tempfile.TemporaryDirectory() as folder:
            files = {name: Path(folder, f"{index}.onnx") for index, name in enumerate(modules)}
            for name, module in modules.items():
                export(
                    module,
                    files[name],
                    format="onnx",
                    example=example,
                    open_axes=self._open_axes,
                    logits=self._logits,
                )
            return {name: OnnxModule(file, threads=self._threads) for name, file in files.items()}

    def _call(self, module: nn.Module, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        values = iter([{**self._constants, **inputs}[name].to(self.device) for name in self._names])
        output = call(module, map_tensors(self._inputs, lambda _: next(values)))
        return outputs_by_name(output, self._logits if self._runtime == TORCH else None)

    def _checked(self, version: Version) -> dict[str, Tensor]:
        """The answers of all sizes to the example, the last of them.

        Raises:
            ServeError: they have not a row for each example, or are not finite.
        """
        count = num_examples(self._inputs)
        inputs = dict(zip(self._names, tensors_of(self._inputs), strict=True))
        for name, module in version.modules.items():
            answers = self._call(module, inputs)
            for answer in answers.values():
                _require_rows(name, answer, count)
            if not all(bool(answer.isfinite().all()) for answer in answers.values()):
                raise ServeError(
                    f"{name} of version {version.name} gives values that are not finite on the example; train or "
                    f"publish it anew, or give another example= if they are right"
                )
        return answers

    def _require_own_rows(self, answers: Mapping[str, Tensor], max_rows: int) -> None:
        """Refuse a model whose answers change with the other rows of their batch, as the best size shows."""
        module = self.current.modules[self.sizes[-1]]

        def compute(inputs: Any) -> dict[str, Tensor]:
            return self._call(module, dict(zip(self._names, tensors_of(inputs), strict=True)))

        dtypes = {each.dtype for each in (*answers.values(), *self._source.parameters())}
        require_own_rows(compute, self._inputs, self._constants, dtypes, max_rows=max_rows)

    def _measure(self, max_rows: int) -> dict[str, BatchTime]:
        """What batches of one row and of the most rows take, sizes in turn."""
        seconds: dict[tuple[str, int], list[float]] = {}
        counts = (1, max(2, max_rows))
        batches = {rows: resized(self._inputs, rows) for rows in counts}
        named = {rows: dict(zip(self._names, tensors_of(batch), strict=True)) for rows, batch in batches.items()}
        for _ in range(1 + TIMED_CALLS):
            for size in self.sizes:
                for rows in counts:
                    start = time.perf_counter()
                    self.run(size, named[rows])
                    seconds.setdefault((size, rows), []).append(time.perf_counter() - start)
        found = {}
        for size in self.sizes:
            one, most = (median(seconds[size, rows][1:]) for rows in counts)
            row_s = max(most - one, 0.0) / (counts[1] - counts[0])
            found[size] = BatchTime(max(one - row_s, 0.0), row_s)
        return found


def _require_rows(name: str, answer: Tensor, count: int) -> None:
    if not answer.ndim or len(answer) != count or answer.dtype not in NAMES:
        raise ServeError(
            f"{name} answers {count} examples with {answer.dtype} of shape {tuple(answer.shape)}; expected a "
            f"row for each example: batches of several requests must come apart again, also in the first input "
            f"(ids padded to (batch, length), not one after the other)"
        )


def served_specs(nested: Nested, family: Family | None) -> dict[str, SubModel | None]:
    """The sizes to serve, from the worst: the fronts of a family, else Student, TA, and a few between.

    Latencies of small models are close together, so that chance keeps the Student off the front of latencies. It is
    first on that of parameters.
    """
    if family is not None:
        costs = ("latency_ms", "parameters") if family.sizes[0].latencies else ("parameters",)
        served = {size.name for by in costs for size in family.pareto(by)}
        order = sorted(family.sizes, key=lambda size: size.quality, reverse=not family.higher_is_better)
        return {size.name: size.spec for size in order if size.name in served}
    names = layer_names(nested)
    if not names:
        return {STUDENT: None, TA: wide(nested)}
    steps = min(len(names), MOST_BETWEEN + 1)
    between = [wide_narrow_wide(nested, len(names) * k // steps) for k in range(1, steps)]
    return {STUDENT: student_spec(nested), **{size_name(nested, spec): spec for spec in between}, TA: wide(nested)}


def _spec(name: str, tensor: Tensor, open_axes: set[int]) -> TensorSpec:
    if tensor.dtype not in NAMES:
        raise ServeError(f"{name} is of {tensor.dtype}; expected one of: {', '.join(map(str, NAMES))}")
    return TensorSpec(name, tensor.dtype, tuple(OPEN if i in open_axes else n for i, n in enumerate(tensor.shape)))


def _only_model(folder: Path) -> str:
    """The one model in the newest version."""
    try:
        models = [each.stem for each in newest_version(folder).glob("*.safetensors")]
    except CheckpointError:
        models = []
    return models[0] if len(models) == 1 else "student"


def _moved_buffers(old: Nested, new: Nested) -> list[str]:
    """Buffers of the Student, if those of the TA are not what they were: running statistics are each model's own."""
    before = dict(old.ta.named_buffers())
    is_moved = any(not torch.equal(each, before[name]) for name, each in new.ta.named_buffers())
    return [name for name, _ in new.student.named_buffers()] if is_moved else []


@torch.no_grad()
def _take_own(nested: Nested, student: nn.Module) -> None:
    """Copy from a plain Student what the nested one does not share with the TA."""
    values = {**dict(student.named_parameters()), **dict(student.named_buffers())}
    private = [each for each in nested.student.named_parameters() if each[0] in nested.plan.private]
    for name, own in (*private, *nested.student.named_buffers()):
        own.copy_(values[name])


@final
class VersionWatch:
    """Looks into a folder of `matta.Snapshots` for a newer version; of a broken one it tells, and the old one stays.

    Args:
        models: Which are to be served.
        folder: Of the snapshots.
        refused: Told of a broken version, with its name and the reason.
        swapped: Told of a new version that is served now.
    """

    RETRY_S: Final = 30.0  # a version that was refused may have been half copied

    def __init__(
        self, models: ServedModels, folder: Path, *, swapped: Callable[[str], None], refused: Callable[[str, str], None]
    ) -> None:
        self.models, self.folder = models, folder
        self._swapped, self._refused = swapped, refused
        self._seen, self._retry_at = (0, ""), 0.0  # time and name
        self._lock = threading.Lock()

    def look(self) -> None:
        """Swap a new version in, if there is one; it may take as long as loading takes."""
        with self._lock:
            try:
                pointer = self.folder / LATEST
                latest = pointer.stat().st_mtime_ns, pointer.read_text(encoding="utf-8").strip()
            except OSError:
                return
            is_again = latest == self._seen
            if is_again and time.monotonic() < self._retry_at:
                return
            self._seen = latest
            try:
                version = self.models.load(self.folder)
            except (MattaError, OSError, RuntimeError, ValueError) as error:
                self._retry_at = time.monotonic() + self.RETRY_S
                if not is_again:
                    self._refused(latest[1], " ".join(str(error).split()))
                return
            self._retry_at = math.inf
            self.models.current = version
            self._swapped(version.name)
