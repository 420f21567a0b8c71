"""Write a plain module for other runtimes, and compare what was written with the module."""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final, Literal, final, get_args

import torch
from safetensors.torch import load_model, save_model
from torch import Tensor, nn

from matta.choosing.measuring import num_examples, resized, run_example
from matta.choosing.survey import quality_of
from matta.errors import ExportError, MattaError, require_kind
from matta.exporting.deviation import SMALLEST_BATCH, Untraced, is_row_wise, largest_difference, untraced
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
from matta.nesting.nested import Nested
from matta.nesting.slicing import is_live, materialize
from matta.sizes.storage import whole_file

Format = Literal["onnx", "torch_export", "safetensors", "transformers"]
FORMATS: Final = get_args(Format)
TOLERANCE: Final = 1e-3  # relative to the largest logit; other kernels sum in another order
LARGEST_ONNX: Final = 2**31 - 2**24  # bytes of weights: a file is one protobuf message of less than 2 GiB
GRAPH_NAMES: Final = frozenset({"device", "torch", "inf", "nan", "NoneType", "pytree", "fx_pytree"})
"""What the code of a torch.fx graph calls by name: an input of that name hides it."""
FIXED: Final = ("to be a constant", "a static shape")
"""In torch's words: an open length turned out to be fixed. Its first line does not say so."""


@final
@dataclass(frozen=True, kw_only=True)
class Exported:
    """A written file or folder, and how far its logits are from the module's.

    `error` is the largest difference over the largest logit, on the example, a batch of another size, one row, and
    lengths that a branch of the module excludes; 0 for weights that were read back bit for bit. `quality` is what
    `evaluate` gave for the file.
    """

    path: Path
    format: Format
    bytes: int
    error: float
    tolerance: float
    quality: float | None = None


def export(
    module: nn.Module,
    path: str | os.PathLike[str],
    *,
    format: Format,
    example: Batch | None = None,
    open_axes: Sequence[int] = (0,),
    int8: bool = False,
    evaluate: Callable[[nn.Module], float] | None = None,
    tolerance: float | None = None,
    logits: str | Callable[[Any], Any] | None = None,
) -> Exported:
    """Write a module for another runtime: with a batch axis of any length, and compared with the module afterwards.

    | format | what is written | read by |
    |---|---|---|
    | "onnx" | a file of operators and weights | ONNX Runtime and others (`matta.OnnxModule(path)`) |
    | "torch_export" | a file of torch's own graph, `.pt2` | `torch.export.load(path).module()` |
    | "safetensors" | a file of weights by name | `safetensors.torch.load_model(module, path)`, a module of your class |
    | "transformers" | a folder | `from_pretrained(path)` |

    Args:
        module: A module on the CPU, such as `matta.extract` gives, or a live one. One of several heads, which returns
            a mapping of tensors, has an output for each.
        path: The file or folder to be; a file that is there is replaced, when all went well.
        format: See the table.
        example: A batch as in training, for "onnx" and "torch_export".
        open_axes: Axes of the inputs whose length is left open: the batch, and (0, 1) for the length of token ids too.
            Of tensors that are not as long as the batch (ids of bags by offsets, a mask) the first axis is open where
            the module allows it.
        int8: Weights of matrix products as 8-bit integers, by ONNX Runtime's dynamic quantisation. How far its logits
            are off is told; `tolerance` is not asked, since only `evaluate` can judge it.
        evaluate: The quality of a module, which is measured on what was written ("onnx" and "torch_export").
        tolerance: The most that logits may differ, over the largest logit; None: 1e-3, or where that is more, four
            times the precision of the weights (0.03 for bfloat16).
        logits: Where the logits are in what the module returns, as in `CoTraining`; a function may give a mapping of
            several outputs.

    Raises:
        ExportError: an unknown format, a path that cannot be written, an operator that the format lacks, logits that
            differ by more than the tolerance, or a package of the extra `export` is missing.
        MattaError: what is no plain module, an example on which it does not run; for "transformers", what the folder
            cannot hold.

    Example:
        >>> import matta, tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     done = matta.export(nn.Linear(3, 1), f"{folder}/ranker.safetensors", format="safetensors")
        ...     done.format, done.error, done.path.name
        ('safetensors', 0.0, 'ranker.safetensors')
    """
    require_kind("module", module, nn.Module, "a plain module, such as matta.extract(nested, size.spec)")
    if isinstance(module, Nested):
        raise ExportError(
            "received a nesting; expected one of its sizes: matta.extract(nested, size.spec) or nested.ta"
        )
    if format not in FORMATS:
        raise ExportError(f"format={format!r}; expected one of: {', '.join(FORMATS)}")
    if int8 and format != "onnx":
        raise ExportError(f"int8=True with format={format!r}; expected 'onnx': it is ONNX Runtime's quantisation")
    target = _target(path, is_folder=format == "transformers")
    module = materialize(module) if is_live(module) else module
    with eval_mode(module):
        if format == "safetensors":
            return _safetensors(module, target)
        if format == "transformers":
            return _transformers(module, target)
        if example is None:
            raise ExportError(f"format={format!r} without an example; expected a batch to trace the module with")
        inputs, axes = split_labels(example)[0], _axes(open_axes)
        if format == "onnx":
            _require_one_file(module)
        names = tuple(outputs_by_name(run_example(module, inputs), logits))
        inputs = resized(inputs, max(SMALLEST_BATCH, num_examples(inputs)))
        write = partial(_onnx, int8=int8, names=names, logits=logits) if format == "onnx" else _torch_export
        allowed = _tolerance(module) if tolerance is None else tolerance
        with whole_file(target) as made:
            with _in_a_line(format, tensor_names(inputs)), _quiet():
                read, rest = write(module, made, inputs, axes)
                in_file = None if format == "onnx" else logits  # an ONNX file gives the logits alone
                ours, theirs = partial(_outputs, module, logits), partial(_outputs, read, in_file)
                error, where = largest_difference(ours, theirs, inputs, axes, rest)
            if not int8 and not error <= allowed:
                raise ExportError(
                    f"the logits of the exported file differ by {error:.2g} of the largest one{where}, more than the "
                    f"tolerance {allowed:g}; nothing is written: raise tolerance= if that will do, or choose another "
                    f"format"
                )
            quality = None if evaluate is None else quality_of(evaluate, read)
            size = made.stat().st_size
    return Exported(path=target, format=format, bytes=size, error=error, tolerance=allowed, quality=quality)


def _tolerance(module: nn.Module) -> float:
    kinds = {each.dtype for each in module.parameters() if each.is_floating_point()}
    return max(TOLERANCE, *(4 * torch.finfo(kind).eps for kind in kinds), 0.0)


def _outputs(module: nn.Module, logits: Any, batch: Any) -> dict[str, Tensor]:
    return outputs_by_name(call(module, batch), logits)


def _require_one_file(module: nn.Module) -> None:
    size = sum(each.numel() * each.element_size() for each in module.parameters())
    if size > LARGEST_ONNX:
        raise ExportError(
            f"the module has {size:,} bytes of weights; expected at most {LARGEST_ONNX:,} for one ONNX file: export "
            f"format='torch_export' or 'safetensors'"
        )


def _target(path: str | os.PathLike[str], *, is_folder: bool) -> Path:
    """Where to write; its folder is made.

    Raises:
        ExportError: a file is to be where a folder is, or the folder cannot be made.
    """
    target = Path(path)
    if not is_folder and target.is_dir():
        raise ExportError(f"{target} is a folder; expected the name of a file in it, such as {target / 'model.onnx'}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ExportError(
            f"{target} cannot be written: {error.strerror}: {error.filename}; take another path"
        ) from None
    return target


def _axes(open_axes: Any) -> tuple[int, ...]:
    if isinstance(open_axes, Sequence) and all(isinstance(axis, int) and axis >= 0 for axis in open_axes):
        return tuple(sorted({0, *open_axes}))
    raise ExportError(f"received open_axes={open_axes!r}; expected axes from 0 up, such as (0, 1)")


def _safetensors(module: nn.Module, target: Path) -> Exported:
    """Weights and buffers by name; of tied names the first, which `load_model` ties again."""
    with whole_file(target) as made, _in_a_line("safetensors"):
        save_model(module, str(made))
        read = copy.deepcopy(module)
        load_model(read, made, device=str(next((each.device for each in module.parameters()), "cpu")))
        state = module.state_dict()
        if not all(_same(value, state[name]) for name, value in read.state_dict().items()):
            raise ExportError(f"{target} was read back otherwise than it was written; nothing is written")
        size = made.stat().st_size
    return Exported(path=target, format="safetensors", bytes=size, error=0.0, tolerance=0.0)


def _same(left: Any, right: Any) -> bool:
    """Bit for bit, whatever the bits mean."""
    if not isinstance(left, Tensor):
        return bool(left == right)
    bits = [each.contiguous().view(-1).view(torch.uint8) for each in (left, right)]
    return left.dtype == right.dtype and torch.equal(*bits)


def _transformers(module: nn.Module, target: Path) -> Exported:
    from matta.lm.folders import export as write_folder  # which names the extra that it needs

    write_folder(module, target)
    size = sum(file.stat().st_size for file in target.rglob("*") if file.is_file())
    return Exported(path=target, format="transformers", bytes=size, error=0.0, tolerance=0.0)


class _Positional(nn.Module):
    """A module that takes the tensors of a batch one by one, and returns its logits alone."""

    def __init__(self, module: nn.Module, inputs: Any, logits: Any) -> None:
        super().__init__()
        self.module, self.inputs, self.logits = module, inputs, logits

    def forward(self, *values: Tensor) -> tuple[Tensor, ...]:
        left = iter(values)
        output = call(self.module, map_tensors(self.inputs, lambda _: next(left)))
        return tuple(outputs_by_name(output, self.logits).values())


def _open(values: list[Tensor], count: int, axes: Sequence[int]) -> tuple[dict[int, Any], ...]:
    """The open axes of each tensor that has a row for each example; of others the first, where the module allows it."""
    dynamic, if_possible = torch.export.Dim.DYNAMIC, torch.export.Dim.AUTO
    return tuple(
        {axis: dynamic for axis in axes if axis < each.ndim}
        if each.ndim and len(each) == count
        else ({} if is_row_wise(each, count) else {0: if_possible})
        for each in values
    )


def _onnx(
    module: nn.Module,
    made: Path,
    inputs: Any,
    open_axes: Sequence[int],
    *,
    int8: bool,
    names: Sequence[str],
    logits: Any,
) -> tuple[nn.Module, list[Untraced]]:
    _require_own_names(names, tensor_names(inputs))
    for package in ("onnx", "onnxscript", "onnxruntime"):
        try:
            __import__(package)
        except ModuleNotFoundError:
            raise ExportError(f"{package} is not installed; pip install 'matta[export]'") from None
    values = tensors_of(inputs)
    _forget_kernels()
    program = torch.onnx.export(
        _Positional(module, inputs, logits),
        tuple(values),
        input_names=tensor_names(inputs),
        output_names=list(names),
        dynamic_shapes=(_open(values, num_examples(inputs), open_axes),),
        dynamo=True,
        verbose=False,
    )
    assert program is not None
    with tempfile.TemporaryDirectory(dir=made.parent) as folder:
        file = Path(folder, "model.onnx")
        program.save(file)
        if int8:
            file = _quantised(file)
        file.replace(made)
    return OnnxModule(made), [] if int8 else untraced(program.exported_program)


def _forget_kernels() -> None:
    """Let torch.onnx put its kernels for any length in the place of recurrent layers', which torch keeps once they ran.

    Without it a process exports a recurrent layer with an open length once, and then no more.
    """
    for operator in (torch.ops.aten.lstm.input, torch.ops.aten.gru.input):
        getattr(operator, "_dispatch_cache", {}).clear()


def _require_own_names(outputs: Sequence[str], inputs: Sequence[str]) -> None:
    """Refuse an output with the name of an input, of which a file has one.

    Raises:
        ExportError: there is one.
    """
    if both := [name for name in outputs if name in inputs]:
        raise ExportError(
            f"{both[0]!r} is the name of an input and of an output, and a file has one thing of a name; rename the "
            f"input, or name the output by logits=lambda output: {{'score': ...}}"
        )


def _quantised(file: Path) -> Path:
    """The file with the weights of its matrix products in 8 bits."""
    from onnxruntime.quantization import QuantType, quant_pre_process, quantize_dynamic

    prepared, small = file.with_name("prepared.onnx"), file.with_name("int8.onnx")
    quant_pre_process(file, prepared, skip_symbolic_shape=True)
    quantize_dynamic(prepared, small, weight_type=QuantType.QInt8)
    return small


def _torch_export(
    module: nn.Module, made: Path, inputs: Any, open_axes: Sequence[int]
) -> tuple[nn.Module, list[Untraced]]:
    values = tensors_of(inputs)
    axes = iter(_open(values, num_examples(inputs), open_axes))
    args = () if isinstance(inputs, Mapping) else tuple(inputs) if isinstance(inputs, tuple | list) else (inputs,)
    kwargs = dict(inputs) if isinstance(inputs, Mapping) else {}
    shapes = _shapes(kwargs or args, axes)
    program = torch.export.export(module, args, kwargs, dynamic_shapes=shapes, strict=False)
    with made.open("wb") as file:
        torch.export.save(program, file)
    with made.open("rb") as file:
        read = torch.export.load(file).module()
    vars(read).update(dict.fromkeys(("train", "eval"), lambda *_: read))  # torch's refuse; a graph has one mode
    return read, untraced(program)


def _shapes(value: Any, axes: Iterator[Any]) -> Any:
    """The open axes in the structure of the inputs; None where there is no tensor."""
    if isinstance(value, Mapping):
        return {name: _shapes(each, axes) for name, each in value.items()}
    if isinstance(value, tuple | list):
        return type(value)(_shapes(each, axes) for each in value)
    return next(axes) if isinstance(value, Tensor) else None


@contextlib.contextmanager
def _in_a_line(format: Format, input_names: Sequence[str] = ()) -> Iterator[None]:
    """What goes wrong inside, in a line of ours."""
    try:
        yield
    except MattaError:
        raise
    except OSError as error:
        raise ExportError(f"{error.filename} cannot be written: {error.strerror}; take another path") from None
    except Exception as error:
        taken = sorted({*input_names} & GRAPH_NAMES) if format == "torch_export" else []
        reason = _reason(error)
        remedy = f"rename the input {taken[0]!r}, a name in torch's own code" if taken else "replace that operation"
        if any(each in reason for each in FIXED):
            remedy = "write x.shape[0] for len(x), which fixes a length, leave that axis out of open_axes"
        raise ExportError(
            f"the module cannot be exported as {format}: {reason}; {remedy}, or export format='safetensors' "
            f"and load it into your class where it is served"
        ) from error


def _reason(error: BaseException) -> str:
    """The innermost cause, its first line: the outer ones tell how to report a fault to PyTorch."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    fixed = [line for line in lines if any(each in line for each in FIXED)]
    lines = [line.removeprefix("- ").partition(". ")[0] for line in fixed] or lines
    return f"{type(error).__name__}: {lines[0] if lines else 'no message'}"[:300].rstrip(".:")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporters' messages about themselves, and the graphs that they print when they fail."""
    names = ("torch.onnx", "torch.export", "torch.fx", "onnxscript", "onnx_ir", "root")
    loggers = [logging.getLogger(name) for name in names]
    levels, printed = [each.level for each in loggers], io.StringIO()
    with warnings.catch_warnings(), contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        warnings.simplefilter("ignore")
        for each in loggers:
            each.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for each, level in zip(loggers, levels, strict=True):
                each.setLevel(level)
