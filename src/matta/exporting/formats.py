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
from matta.exporting.onnx_runtime import OnnxModule
from matta.nesting.batches import (
    Batch,
    call,
    eval_mode,
    map_tensors,
    outputs_by_name,
    relative_difference,
    split_labels,
    tensor_names,
    tensors_of,
)
from matta.nesting.nested import Nested
from matta.sizes.storage import whole_file

Format = Literal["onnx", "torch_export", "safetensors", "transformers"]
FORMATS: Final = get_args(Format)
TOLERANCE: Final = 1e-3  # relative to the largest logit; other kernels sum in another order
SMALLEST_BATCH: Final = 2  # a traced batch of one would be taken for a constant
LARGEST_ONNX: Final = 2**31 - 2**24  # bytes of weights: a file is one protobuf message of less than 2 GiB
GRAPH_NAMES: Final = frozenset({"device", "torch", "inf", "nan", "NoneType", "pytree", "fx_pytree"})
"""What the code of a torch.fx graph calls by name: an input of that name hides it."""

OTHER_BATCH: Final = 3  # added to the example's, to compare with a batch of another size


@final
@dataclass(frozen=True, kw_only=True)
class Exported:
    """A written file or folder, and how far its logits are from the module's.

    `error` is the largest difference over the largest logit, on the example and on a batch of another size; 0 for
    weights that were read back bit for bit. `quality` is what `evaluate` gave for the file.
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
        module: A plain module, such as `matta.extract` gives, on the CPU. One of several heads, which returns a
            mapping of tensors, has an output for each.
        path: The file or folder to be; a file that is there is replaced, when all went well.
        format: See the table.
        example: A batch as in training, for "onnx" and "torch_export".
        open_axes: Axes of the inputs whose length is left open: the batch, and (0, 1) for the length of token ids too.
            Of tensors that are not as long as the batch (ids of bags by offsets, a mask) the first axis is open where
            the module allows it.
        int8: Weights of matrix products as 8-bit integers, by ONNX Runtime's dynamic quantisation. How far its logits
            are off is told; `tolerance` is not asked, since only `evaluate` can judge it.
        evaluate: The quality of a module, which is measured on what was written ("onnx" and "torch_export").
        tolerance: The most that logits may differ, over the largest logit; None: 1e-3.
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
        allowed = TOLERANCE if tolerance is None else tolerance
        with whole_file(target) as made:
            with _in_a_line(format, tensor_names(inputs)), _quiet():
                read = write(module, made, inputs, axes)
                error = _largest_difference(module, read, inputs, axes, logits)
            if not int8 and not error <= allowed:
                raise ExportError(
                    f"the logits of the exported file differ by {error:.2g} of the largest one, more than the "
                    f"tolerance {allowed:g}; nothing is written: raise tolerance= if that will do, or choose another "
                    f"format"
                )
            quality = None if evaluate is None else quality_of(evaluate, read)
            size = made.stat().st_size
    return Exported(path=target, format=format, bytes=size, error=error, tolerance=allowed, quality=quality)


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


@torch.no_grad()
def _largest_difference(
    module: nn.Module, other: nn.Module, inputs: Any, open_axes: Sequence[int], logits: Any
) -> float:
    """Of the logits, relative to the largest, on the inputs and on a batch of another size, shorter on open axes."""
    found = 0.0
    size = num_examples(inputs)
    in_output = None if isinstance(other, OnnxModule) else logits  # an ONNX file gives the logits alone
    has_rows = all(_is_row_wise(each, size) for each in tensors_of(inputs))
    other_size = size + OTHER_BATCH if has_rows else size - 1  # offsets of bags stay in order only if they are cut
    for batch in (inputs, _shorter(resized(inputs, other_size), other_size, open_axes)):
        outputs = outputs_by_name(call(module, batch), logits)
        others = outputs_by_name(call(other, batch), in_output)
        found = max(found, *(_difference(each.float(), others[name].float()) for name, each in outputs.items()))
    return found


def _difference(expected: Tensor, got: Tensor) -> float:
    if got.shape != expected.shape:
        raise ExportError(
            f"the exported file gives logits of shape {tuple(got.shape)}, and the module {tuple(expected.shape)}, "
            f"for a batch of another size: an operation of the module has taken a length for a constant"
        )
    return relative_difference(expected, got)


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


def _is_row_wise(tensor: Tensor, count: int) -> bool:
    return not tensor.ndim or len(tensor) in (1, count)


def _open(values: list[Tensor], count: int, axes: Sequence[int]) -> tuple[dict[int, Any], ...]:
    """The open axes of each tensor that has a row for each example; of others the first, where the module allows it."""
    dynamic, if_possible = torch.export.Dim.DYNAMIC, torch.export.Dim.AUTO
    return tuple(
        {axis: dynamic for axis in axes if axis < each.ndim}
        if each.ndim and len(each) == count
        else ({} if _is_row_wise(each, count) else {0: if_possible})
        for each in values
    )


def _shorter(inputs: Any, count: int, axes: Sequence[int]) -> Any:
    """The inputs, one shorter on every open axis beside that of the batch."""

    def cut(tensor: Tensor) -> Tensor:
        for axis in axes:
            if axis and axis < tensor.ndim and len(tensor) == count and tensor.shape[axis] > SMALLEST_BATCH:
                tensor = tensor.narrow(axis, 0, tensor.shape[axis] - 1)
        return tensor

    return map_tensors(inputs, cut)


def _onnx(
    module: nn.Module,
    made: Path,
    inputs: Any,
    open_axes: Sequence[int],
    *,
    int8: bool,
    names: Sequence[str],
    logits: Any,
) -> nn.Module:
    for package in ("onnx", "onnxscript", "onnxruntime"):
        try:
            __import__(package)
        except ModuleNotFoundError:
            raise ExportError(f"{package} is not installed; pip install 'matta[export]'") from None
    values = tensors_of(inputs)
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
    return OnnxModule(made)


def _quantised(file: Path) -> Path:
    """The file with the weights of its matrix products in 8 bits."""
    from onnxruntime.quantization import QuantType, quant_pre_process, quantize_dynamic

    prepared, small = file.with_name("prepared.onnx"), file.with_name("int8.onnx")
    quant_pre_process(file, prepared, skip_symbolic_shape=True)
    quantize_dynamic(prepared, small, weight_type=QuantType.QInt8)
    return small


def _torch_export(module: nn.Module, made: Path, inputs: Any, open_axes: Sequence[int]) -> nn.Module:
    values = tensors_of(inputs)
    axes = iter(_open(values, num_examples(inputs), open_axes))
    args = () if isinstance(inputs, Mapping) else tuple(inputs) if isinstance(inputs, tuple | list) else (inputs,)
    kwargs = dict(inputs) if isinstance(inputs, Mapping) else {}
    shapes = map_tensors(kwargs or args, lambda _: next(axes))
    program = torch.export.export(module, args, kwargs, dynamic_shapes=shapes, strict=False)
    with made.open("wb") as file:
        torch.export.save(program, file)
    with made.open("rb") as file:
        return torch.export.load(file).module()


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
        remedy = f"rename the input {taken[0]!r}, a name in torch's own code" if taken else "replace that operation"
        raise ExportError(
            f"the module cannot be exported as {format}: {_reason(error)}; {remedy}, or export format='safetensors' "
            f"and load it into your class where it is served"
        ) from error


def _reason(error: BaseException) -> str:
    """The innermost cause, its first line: the outer ones tell how to report a fault to PyTorch."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
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
