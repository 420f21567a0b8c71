"""The Open Inference Protocol (V2 over HTTP) with its binary extension: requests to tensors, and tensors to answers.

As KServe and Triton speak it: JSON, or JSON followed by the bytes of tensors, whose length is in the header
`Inference-Header-Content-Length`. Tensors have a row for each example.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, Final, NoReturn, final

import numpy as np
import torch
from torch import Tensor

DATATYPES: Final[Mapping[str, torch.dtype]] = {
    "BOOL": torch.bool,
    "UINT8": torch.uint8,
    "INT8": torch.int8,
    "INT16": torch.int16,
    "INT32": torch.int32,
    "INT64": torch.int64,
    "FP16": torch.float16,
    "FP32": torch.float32,
    "FP64": torch.float64,
    "BF16": torch.bfloat16,
}
NAMES: Final = {dtype: name for name, dtype in DATATYPES.items()}
HEADER_LENGTH: Final = "Inference-Header-Content-Length"
JSON, BINARY = "application/json", "application/octet-stream"
OPEN: Final = -1


@final
class ProtocolError(Exception):
    """A request that cannot be answered: the status of HTTP, and why."""

    def __init__(self, status: int, message: str, retry_after_s: int | None = None) -> None:
        super().__init__(message)
        self.status, self.retry_after_s = status, retry_after_s


@final
@dataclass(frozen=True)
class TensorSpec:
    """A tensor that a model takes or gives; axes of any length are -1."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def datatype(self) -> str:
        """The protocol's name of the dtype."""
        return NAMES[self.dtype]

    def to_json(self) -> dict[str, Any]:
        """The tensor as a model's metadata describe it."""
        return {"name": self.name, "datatype": self.datatype, "shape": list(self.shape)}


@final
@dataclass(frozen=True, kw_only=True)
class InferenceRequest:
    """What a client asks: tensors by name, all with `rows` rows, and how it wants the answer.

    `binary` says which outputs are to be bytes; outputs that it lacks are not wanted.
    """

    id: str
    inputs: Mapping[str, Tensor]
    rows: int
    parameters: Mapping[str, Any]
    binary: Mapping[str, bool]


def read_request(
    body: bytes, header_length: str | None, inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec]
) -> InferenceRequest:
    """The request in a body.

    Raises:
        ProtocolError: it is none, or its tensors are not those that the model takes (status 400).

    Example:
        >>> x, y = TensorSpec("x", torch.float32, (-1, 2)), TensorSpec("logits", torch.float32, (-1,))
        >>> body = b'{"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 2], "data": [0.5, 1]}]}'
        >>> read_request(body, None, [x], [y]).inputs
        {'x': tensor([[0.5000, 1.0000]])}
    """
    values, rest = _parts(body, header_length)
    given = _list_of_mappings(values, "inputs", required=True)
    tensors: dict[str, Tensor] = {}
    specs = {spec.name: spec for spec in inputs}
    for each in given:
        name = each.get("name")
        if not isinstance(name, str) or name not in specs or name in tensors:
            _refuse(f"received the input {name!r}; expected, once each: {', '.join(specs)}")
        tensors[name], rest = _tensor(each, specs[name], rest)
    if missing := [name for name in specs if name not in tensors]:
        _refuse(f"the request lacks the input {missing[0]!r}; expected: {', '.join(specs)}")
    if len(rest):
        _refuse(f"{len(rest)} bytes follow the last tensor; expected none")
    counts = {len(tensor) for tensor in tensors.values()}
    if len(counts) != 1 or not min(counts):
        _refuse(f"received inputs of {sorted(counts)} rows; expected the same number in each, over zero")
    parameters = _mapping(values, "parameters")
    return InferenceRequest(
        id=_identity(values),
        inputs={name: tensors[name] for name in specs},
        rows=counts.pop(),
        parameters=parameters,
        binary=_wanted(values, parameters, [spec.name for spec in outputs]),
    )


def write_answer(
    outputs: Mapping[str, Tensor], binary: Mapping[str, bool], head: Mapping[str, Any]
) -> tuple[bytes, dict[str, str]]:
    """The body of an answer, and its headers.

    Args:
        outputs: Tensors by name, on the CPU; those that `binary` lacks are left out.
        binary: Whether each output is written as bytes.
        head: `model_name` and all else that stands beside the outputs.

    Raises:
        ProtocolError: JSON cannot hold a value that is not finite (status 500).

    Example:
        >>> write_answer({"y": torch.ones(2)}, {"y": False}, {"id": "1"})[0]
        b'{"id": "1", "outputs": [{"name": "y", "datatype": "FP32", "shape": [2], "data": [1.0, 1.0]}]}'
    """
    entries, chunks = [], []
    for name, as_bytes in binary.items():
        tensor = outputs[name].contiguous()
        entry: dict[str, Any] = {"name": name, "datatype": NAMES[tensor.dtype], "shape": list(tensor.shape)}
        if as_bytes:
            chunks.append(tensor.view(-1).view(torch.uint8).numpy().tobytes())
            entry["parameters"] = {"binary_data_size": len(chunks[-1])}
        else:
            entry["data"] = tensor.view(-1).tolist()
        entries.append(entry)
    try:
        text = json.dumps({**head, "outputs": entries}, allow_nan=False).encode()
    except ValueError:
        raise ProtocolError(
            500, "the model's answer has values that are not finite, which JSON cannot hold; ask for binary_data"
        ) from None
    if not chunks:
        return text, {"Content-Type": JSON}
    return b"".join((text, *chunks)), {"Content-Type": BINARY, HEADER_LENGTH: str(len(text))}


def _parts(body: bytes, header_length: str | None) -> tuple[dict[str, Any], memoryview]:
    """The JSON of a body, and the bytes behind it."""
    length = len(body)
    if header_length is not None:
        if not (header_length.isascii() and header_length.isdigit()) or int(header_length[:20]) > length:
            _refuse(f"received {HEADER_LENGTH}: {header_length[:40]!r}; expected at most the body's {length} bytes")
        length = int(header_length)
    try:
        values = json.loads(body[:length].decode("utf-8"), parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        _refuse(f"the body is no JSON: {error}")
    if not isinstance(values, dict):
        _refuse(f"received JSON of type {type(values).__name__}; expected an object with 'inputs'")
    return values, memoryview(body)[length:]


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _tensor(entry: Mapping[str, Any], spec: TensorSpec, rest: memoryview) -> tuple[Tensor, memoryview]:
    """The tensor of an entry, and the bytes that are left for those behind it."""
    shape, datatype = entry.get("shape"), entry.get("datatype")
    if datatype != spec.datatype:
        _refuse(f"{spec.name}: received the datatype {datatype!r}; expected {spec.datatype}")
    if not isinstance(shape, list) or not all(type(n) is int and 0 <= n < 2**31 for n in shape):
        _refuse(f"{spec.name}: received the shape {shape!r}; expected a list of lengths")
    if len(shape) != len(spec.shape) or any(e not in (OPEN, n) for n, e in zip(shape, spec.shape, strict=True)):
        _refuse(f"{spec.name}: received the shape {shape}; expected {list(spec.shape)}, where -1 is any length")
    size = _mapping(entry, "parameters").get("binary_data_size")
    if size is None:
        return _from_json(entry.get("data"), spec, shape), rest
    expected = prod(shape) * spec.dtype.itemsize
    if type(size) is not int or size != expected or size > len(rest):
        _refuse(f"{spec.name}: received {size!r} bytes, of {len(rest)}; expected {expected} for the shape {shape}")
    return _from_bytes(rest[:size], spec).view(shape), rest[size:]


def _from_bytes(data: memoryview, spec: TensorSpec) -> Tensor:
    raw = torch.from_numpy(np.frombuffer(data, dtype=np.uint8).copy())
    if spec.dtype == torch.bool:
        return raw != 0
    return raw.view(spec.dtype)


def _from_json(data: Any, spec: TensorSpec, shape: list[int]) -> Tensor:
    """The tensor of a list of numbers, flat or nested."""
    if not isinstance(data, list):
        _refuse(f"{spec.name}: received no data; expected a list of numbers, or binary_data_size and bytes")
    try:
        values = np.asarray(data)
    except (ValueError, OverflowError, RecursionError):
        _refuse(f"{spec.name}: the data are ragged or too large; expected {prod(shape)} numbers")
    if values.size != prod(shape):
        _refuse(f"{spec.name}: received {values.size} numbers; expected {prod(shape)} for the shape {shape}")
    if values.ndim > 1 and _without_ones(values.shape) != _without_ones(shape):
        _refuse(f"{spec.name}: received data nested as {list(values.shape)}; expected {shape}, or a flat list")
    kinds = "b" if spec.dtype == torch.bool else "biuf" if spec.dtype.is_floating_point else "biu"
    if values.size and values.dtype.kind not in kinds:
        _refuse(f"{spec.name}: received data of type {values.dtype}; expected {spec.datatype}")
    if values.size and values.dtype.kind in "iu" and not spec.dtype.is_floating_point and spec.dtype != torch.bool:
        limits = torch.iinfo(spec.dtype)
        if int(values.min()) < limits.min or int(values.max()) > limits.max:
            _refuse(f"{spec.name}: received numbers beyond {spec.datatype}")
    if values.dtype == np.uint64:
        values = values.astype(np.float64 if spec.dtype.is_floating_point else np.int64)
    tensor = torch.from_numpy(np.ascontiguousarray(values)).to(spec.dtype)
    if spec.dtype.is_floating_point and not bool(tensor.isfinite().all()):  # JSON itself has no infinity
        _refuse(f"{spec.name}: received numbers beyond {spec.datatype}")
    return tensor.view(shape)


def _without_ones(shape: Sequence[int]) -> list[int]:
    return [length for length in shape if length != 1]


def _identity(values: Mapping[str, Any]) -> str:
    identity = values.get("id", "")
    if not isinstance(identity, str) or len(identity) > 256:
        _refuse("received an id that is no text of at most 256 characters")
    return identity


def _wanted(values: Mapping[str, Any], parameters: Mapping[str, Any], names: Sequence[str]) -> dict[str, bool]:
    """Which outputs are wanted, and whether as bytes."""
    default = _flag(parameters, "binary_data_output", default=False)
    asked = _list_of_mappings(values, "outputs", required=False)
    if not asked:
        return dict.fromkeys(names, default)
    found = {}
    for each in asked:
        name = each.get("name")
        if name not in names:
            _refuse(f"received the output {name!r}; expected of: {', '.join(names)}")
        found[str(name)] = _flag(_mapping(each, "parameters"), "binary_data", default=default)
    return found


def _flag(parameters: Mapping[str, Any], name: str, *, default: bool) -> bool:
    value = parameters.get(name, default)
    if not isinstance(value, bool):
        _refuse(f"received {name}={value!r:.40}; expected true or false")
    return value


def _mapping(values: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    found = values.get(name, {})
    if not isinstance(found, dict):
        _refuse(f"received {name!r} of type {type(found).__name__}; expected an object")
    return found


def _list_of_mappings(values: Mapping[str, Any], name: str, *, required: bool) -> list[Mapping[str, Any]]:
    found = values.get(name, [])
    if not isinstance(found, list) or not all(isinstance(each, dict) for each in found) or (required and not found):
        _refuse(f"received no list of tensors in {name!r}; expected such as [{{'name': ..., 'shape': ...}}]")
    return found


def _refuse(message: str) -> NoReturn:
    raise ProtocolError(400, message)
