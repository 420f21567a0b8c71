import json
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from matta.serving.inference_protocol import (
    DATATYPES,
    ProtocolError,
    TensorSpec,
    read_request,
    write_answer,
)

X = TensorSpec("x", torch.float32, (-1, 2))
IDS = TensorSpec("ids", torch.int64, (-1,))
LOGITS = TensorSpec("logits", torch.float32, (-1, 1))


def entry(name: str = "x", datatype: str = "FP32", shape: Any = (1, 2), **rest: Any) -> dict[str, Any]:
    return {"name": name, "datatype": datatype, "shape": list(shape) if isinstance(shape, tuple) else shape, **rest}


def body(*inputs: dict[str, Any], **rest: Any) -> bytes:
    return json.dumps({"inputs": list(inputs), **rest}).encode()


GOOD = body(entry(data=[1.0, 2.0]))


@pytest.mark.parametrize("data", [[[1, 2], [3, 4.5]], [1, 2, 3, 4.5], [[[1, 2]], [[3, 4.5]]]])
def test_json_data_are_flat_or_nested(data: list[Any]) -> None:
    request = read_request(body(entry(shape=(2, 2), data=data)), None, [X], [LOGITS])
    assert torch.equal(request.inputs["x"], torch.tensor([[1, 2], [3, 4.5]]))
    assert (request.rows, request.id, request.binary) == (2, "", {"logits": False})


@pytest.mark.parametrize("datatype", DATATYPES)
def test_a_tensor_of_any_dtype_makes_the_round_trip_as_bytes(datatype: str) -> None:
    dtype = DATATYPES[datatype]
    values = torch.tensor([[1, 0], [0, 1], [1, 1]]).to(dtype)
    content, headers = write_answer({"x": values}, {"x": True}, {})
    length = headers["Inference-Header-Content-Length"]
    told = json.loads(content[: int(length)])["outputs"][0]
    asked = json.dumps({"inputs": [told]}).encode()
    request = read_request(asked + content[int(length) :], str(len(asked)), [TensorSpec("x", dtype, (-1, 2))], [LOGITS])
    assert request.inputs["x"].dtype == dtype
    assert torch.equal(request.inputs["x"], values)


def test_inputs_as_json_and_as_bytes_can_stand_side_by_side() -> None:
    data = torch.tensor([[0.5, 1.5]]).numpy().tobytes()
    text = body(entry(parameters={"binary_data_size": 8}), entry("ids", "INT64", (1,), data=[3]))
    request = read_request(text + data, str(len(text)), [IDS, X], [LOGITS])
    assert request.inputs["x"].tolist() == [[0.5, 1.5]]
    assert request.inputs["ids"].tolist() == [3]


@pytest.mark.parametrize(
    ("outputs", "parameters", "expected"),
    [
        ([], {}, {"logits": False}),
        ([], {"binary_data_output": True}, {"logits": True}),
        ([{"name": "logits", "parameters": {"binary_data": True}}], {}, {"logits": True}),
        ([{"name": "logits", "parameters": {"binary_data": False}}], {"binary_data_output": True}, {"logits": False}),
    ],
)
def test_outputs_are_as_asked(outputs: list[Any], parameters: dict[str, Any], expected: dict[str, bool]) -> None:
    asked = body(entry(data=[1, 2]), outputs=outputs, parameters=parameters)
    assert read_request(asked, None, [X], [LOGITS]).binary == expected


MALFORMED = {
    "empty": b"",
    "not JSON": b"{",
    "not UTF-8": b"\xff\xfe",
    "a list": b"[]",
    "a number": b"3",
    "NaN": b'{"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 2], "data": [NaN, 1]}]}',
    "deep": b"[" * 100_000,
    "no inputs": b"{}",
    "inputs of another type": b'{"inputs": 3}',
    "an input of another type": b'{"inputs": [3]}',
    "no name": b'{"inputs": [{"datatype": "FP32", "shape": [1, 2], "data": [1, 2]}]}',
    "another name": body(entry("y", data=[1, 2])),
    "a name that is none": body({**entry(data=[1, 2]), "name": ["x"]}),
    "twice": body(entry(data=[1, 2]), entry(data=[1, 2])),
    "another datatype": body(entry(datatype="FP64", data=[1, 2])),
    "an unknown datatype": body(entry(datatype="BYTES", data=["a", "b"])),
    "no shape": body({"name": "x", "datatype": "FP32", "data": [1, 2]}),
    "another shape": body(entry(shape=(1, 3), data=[1, 2, 3])),
    "more axes": body(entry(shape=(1, 1, 2), data=[1, 2])),
    "a negative shape": body(entry(shape=(-1, 2), data=[1, 2])),
    "a shape of text": body(entry(shape=["1", 2], data=[1, 2])),
    "a shape of booleans": body(entry(shape=[True, 2], data=[1, 2])),
    "a huge shape": body(entry(shape=(2**40, 2), data=[1, 2])),
    "no rows": body(entry(shape=(0, 2), data=[])),
    "no data": body(entry()),
    "too few data": body(entry(data=[1])),
    "too many data": body(entry(data=[1, 2, 3])),
    "ragged data": body(entry(shape=(2, 2), data=[[1, 2], [3]])),
    "nested the other way": body(entry(shape=(3, 2), data=[[1, 3, 5], [2, 4, 6]])),
    "nested in rows of another length": body(entry(shape=(2, 2), data=[[1, 2, 3, 4]])),
    "a flag of text": body(entry(data=[1, 2]), parameters={"binary_data_output": "false"}),
    "a flag of an output that is a number": body(
        entry(data=[1, 2]), outputs=[{"name": "logits", "parameters": {"binary_data": 1}}]
    ),
    "data of text": body(entry(data=["1", "2"])),
    "data of booleans and text": body(entry(data=[True, "x"])),
    "data of null": body(entry(data=[None, 1])),
    "data of objects": body(entry(data=[{}, 1])),
    "an integer beyond all": body(entry(data=[10**400, 1])),
    "a number beyond float32": body(entry(data=[1e39, 1])),
    "bytes that are not there": body(entry(parameters={"binary_data_size": 8})),
    "bytes of another length": body(entry(parameters={"binary_data_size": 4})) + b"1234",
    "a length that is none": body(entry(parameters={"binary_data_size": "8"})),
    "a negative length": body(entry(parameters={"binary_data_size": -8})),
    "parameters of another type": body(entry(data=[1, 2]), parameters=[1]),
    "parameters of an input of another type": body(entry(data=[1, 2], parameters=3)),
    "an unknown output": body(entry(data=[1, 2]), outputs=[{"name": "y"}]),
    "outputs of another type": body(entry(data=[1, 2]), outputs=3),
    "an output of another type": body(entry(data=[1, 2]), outputs=["logits"]),
    "an id of another type": body(entry(data=[1, 2]), id=3),
    "a long id": body(entry(data=[1, 2]), id="x" * 300),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_requests_are_refused(name: str) -> None:
    with pytest.raises(ProtocolError) as caught:
        read_request(MALFORMED[name], None, [X], [LOGITS])
    assert caught.value.status == 400
    assert str(caught.value)


@pytest.mark.parametrize("length", ["-1", "x", "", "1e3", "99999", "9" * 5000, "٣"])
def test_a_header_length_that_is_none_is_refused(length: str) -> None:
    with pytest.raises(ProtocolError, match="Inference-Header-Content-Length"):
        read_request(GOOD, length, [X], [LOGITS])


def test_bytes_behind_the_last_tensor_are_refused() -> None:
    with pytest.raises(ProtocolError, match="3 bytes follow"):
        read_request(GOOD + b"abc", str(len(GOOD)), [X], [LOGITS])


@pytest.mark.parametrize(("data", "dtype"), [([300], "UINT8"), ([-1], "UINT8"), ([1.5], "INT64"), ([1], "BOOL")])
def test_numbers_that_a_dtype_lacks_are_refused(data: list[Any], dtype: str) -> None:
    with pytest.raises(ProtocolError):
        read_request(
            body(entry(datatype=dtype, shape=(1,), data=data)), None, [TensorSpec("x", DATATYPES[dtype], (-1,))], []
        )


def test_inputs_of_different_rows_are_refused() -> None:
    asked = body(entry(data=[1, 2]), entry("ids", "INT64", (2,), data=[3, 4]))
    with pytest.raises(ProtocolError, match=r"inputs of \[1, 2\] rows"):
        read_request(asked, None, [X, IDS], [LOGITS])


def test_a_missing_input_is_named() -> None:
    with pytest.raises(ProtocolError, match="lacks the input 'ids'"):
        read_request(GOOD, None, [X, IDS], [LOGITS])


def test_values_that_json_cannot_hold_are_refused_as_json_and_given_as_bytes() -> None:
    values = {"x": torch.tensor([float("inf")])}
    with pytest.raises(ProtocolError) as caught:
        write_answer(values, {"x": False}, {})
    assert caught.value.status == 500
    assert write_answer(values, {"x": True}, {})[0].endswith(values["x"].numpy().tobytes())


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=10,
)
KEYS = st.sampled_from(["name", "datatype", "shape", "data", "parameters", "binary_data_size"])


@given(
    whole=st.dictionaries(st.sampled_from(["inputs", "outputs", "parameters", "id"]), json_values)
    | st.fixed_dictionaries({"inputs": st.lists(st.dictionaries(KEYS, json_values), max_size=2)}),
    changes=st.dictionaries(KEYS, json_values, max_size=2),
    length=st.none() | st.text(max_size=4) | st.integers(0, 300).map(str),
)
def test_anything_is_a_request_or_is_refused(whole: Any, changes: Any, length: str | None) -> None:
    for values in (whole, {"inputs": [{**entry(data=[1, 2]), **changes}]}):
        try:
            request = read_request(json.dumps(values).encode(), length, [X], [LOGITS])
        except ProtocolError as error:
            status = error.status
        else:
            status = 400 if request.inputs["x"].shape[1:] == (2,) else 200
        assert status == 400


@given(st.binary(max_size=200), st.integers(0, 210))
def test_any_bytes_are_a_request_or_are_refused(data: bytes, length: int) -> None:
    with pytest.raises(ProtocolError):
        read_request(data, str(length), [X], [LOGITS])
