"""Whatever is written in place of a good input, a reader reads it, or refuses it in one line."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import matta
from matta.ab_testing.joining import read_logs
from matta.errors import MattaError
from matta.lm.documents import TextSource, held_out_documents
from matta.lm.recipe_files import read_recipe
from matta.serving.inference_protocol import ProtocolError, TensorSpec, read_request
from matta.streams import Categorical, Folder, Numeric, Schema, Stream

sys.path.insert(0, str(Path(__file__).parent))
from bad_weights import VERSION, extract, labels, snapshot
from good_inputs import make_inputs

_TRIES = settings.default.max_examples  # type: ignore[union-attr]
FUZZ = settings(max_examples=_TRIES if _TRIES < 1000 else 10_000)  # the latter under `make stress`

PIECES = [
    *b"null true [] {} -1 0 1e999 NaN 1.5 9223372036854775808 [[ }} , : = \x00 \xff \xef\xbb\xbf".split(),
    *(b" ", b"\n", b"\r\n", b'"\\ud800"', b'""', b"..", b"/etc/passwd"),
    *(b"9" * 5000, b"[" * 3000, b'"' + b"a" * 300 + b'"'),
]
ANY_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.sampled_from([2**70, -1, 1e308]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@st.composite
def changed(draw: st.DrawFn, good: bytes) -> bytes:
    """The bytes, cut, with pieces put in or in place of others, or with bits flipped."""
    found = bytearray(good)
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, len(found)))
        end = min(len(found), start + draw(st.sampled_from([0, 0, 1, 4, 40, len(found)])))
        kind = draw(st.sampled_from(["piece", "bytes", "flip", "copy"]))
        if kind == "piece":
            found[start:end] = draw(st.sampled_from(PIECES))
        elif kind == "bytes":
            found[start:end] = draw(st.binary(max_size=8))
        elif kind == "copy":
            found[start:start] = found[start:end]
        elif start < len(found):
            found[start] ^= 1 << draw(st.integers(0, 7))
    return bytes(found)


@st.composite
def changed_json(draw: st.DrawFn, good: bytes) -> bytes:
    """A JSON text in which some values are others, or gone."""
    root = {"": json.loads(good)}
    for _ in range(draw(st.integers(1, 3))):
        node: Any = root
        path: Any = ""
        while isinstance(node[path], dict | list) and node[path] and draw(st.booleans()):
            node = node[path]
            path = draw(st.sampled_from(sorted(node) if isinstance(node, dict) else range(len(node))))
        if isinstance(node, dict) and node is not root and draw(st.booleans()):
            del node[path]
        else:
            node[path] = draw(ANY_JSON)
    return json.dumps(root[""]).encode()


def fuzzed(good: bytes) -> st.SearchStrategy[bytes]:
    try:
        json.loads(good)
    except ValueError:
        return changed(good)
    return changed(good) | changed_json(good)


def require_one_line(read: Callable[[], object]) -> None:
    """What is refused is refused in a few words of matta's, or of the operating system's; nothing else is raised."""
    told = "read"
    try:
        read()
    except (MattaError, ProtocolError, OSError) as error:
        told = str(error)
    assert 0 < len(told) < 5000


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("good")
    make_inputs(folder)
    for each in ("nesting", VERSION, "labels"):
        (folder / each / "CRC32SUMS").unlink()  # else that is where all tries would end
    return folder


def recipe(folder: Path) -> object:
    return read_recipe(folder / "recipe.toml")


def table(folder: Path) -> object:
    family = matta.Family.load(folder / "nesting")
    with suppress(matta.errors.ChoiceError):
        family.choose(parameters=10**6)
    return str(family), family.pareto(), [size.spec for size in family.sizes]


def log(folder: Path) -> object:
    return read_logs([folder / "data" / "answers.jsonl"])


def whole_labels(folder: Path) -> object:
    """The labels, which are those written if they are read at all."""
    found: Any = labels(folder)
    assert found.indices[:, 1:].tolist() == [[[0, 1]] * 3] * 3
    assert bool((found.log_probs[:, 1:] == -1).all())
    return found


def text(ending: str) -> Callable[[Path], object]:
    return lambda folder: held_out_documents(TextSource(path=folder / "data" / f"text{ending}"), 100)


READERS: dict[str, tuple[str, Callable[[Path], object]]] = {
    "recipe": ("recipe.toml", recipe),
    "plans": ("nesting/nested.json", extract),
    "weights": ("nesting/nested.safetensors", extract),
    "snapshot": (f"{VERSION}/student.safetensors", snapshot),
    "its description": (f"{VERSION}/snapshot.json", snapshot),
    "labels": ("labels/labels-00000.safetensors", whole_labels),
    "their manifest": ("labels/teacher.json", labels),
    "family": ("nesting/family.json", table),
    "log": ("data/answers.jsonl", log),
    "text": ("data/text.txt", text(".txt")),
    "lines": ("data/text.jsonl", text(".jsonl")),
    "Parquet": ("data/text.parquet", text(".parquet")),
}


@pytest.mark.parametrize("kind", READERS)
def test_a_reader_reads_or_refuses(kind: str, good: Path) -> None:
    name, read = READERS[kind]
    file = good / name
    content = file.read_bytes()
    read(good)

    @FUZZ
    @given(bad=fuzzed(content))
    def refuses(bad: bytes) -> None:
        file.write_bytes(bad)
        require_one_line(lambda: read(good))

    try:
        refuses()
    finally:
        file.write_bytes(content)


SCHEMA = Schema(columns={"x": Numeric(), "c": Categorical(vocabulary=4)}, label="label")
EVENTS = {
    "csv": b"x,c,label\n1.5,a,0\n2.5,b,1\n,c,1\n",
    "jsonl": b'{"x": 1.5, "c": "a", "label": 0}\n{"x": 2.5, "c": 3, "label": 1}\n{"x": null, "label": 1}\n',
}


@pytest.mark.parametrize("ending", EVENTS)
def test_a_stream_gives_finite_batches_whatever_its_rows(ending: str, tmp_path: Path) -> None:
    folder, aside = tmp_path / "events", tmp_path / "aside.jsonl"
    folder.mkdir()

    @FUZZ
    @given(bad=changed(EVENTS[ending]))
    def streams(bad: bytes) -> None:
        (folder / f"1.{ending}").write_bytes(bad)
        for left in tmp_path.glob("aside*"):
            left.unlink()
        for batch in Stream(Folder(folder, idle_s=0), SCHEMA, batch_size=2, quarantine=aside):
            assert all(bool(value.isfinite().all()) for value in batch.values())
            assert set(batch["labels"].tolist()) <= {0.0, 1.0}
        for line in aside.read_text().splitlines() if aside.exists() else ():
            json.loads(line)

    streams()


X = TensorSpec("x", torch.float32, (-1, 2))
IDS = TensorSpec("ids", torch.int64, (-1,))
REQUEST: dict[str, Any] = {
    "id": "r1",
    "parameters": {"size": "TA", "binary_data_output": True},
    "inputs": [
        {"name": "x", "datatype": "FP32", "shape": [1, 2], "parameters": {"binary_data_size": 8}},
        {"name": "ids", "datatype": "INT64", "shape": [1], "data": [3]},
    ],
    "outputs": [{"name": "y"}],
}
HEAD = json.dumps(REQUEST).encode()


@FUZZ
@given(head=fuzzed(HEAD), data=st.just(bytes(8)) | st.binary(max_size=12), length=st.none() | st.text(max_size=4))
def test_a_request_is_read_or_refused(head: bytes, data: bytes, length: str | None) -> None:
    def read() -> None:
        said = str(len(head)) if length is None else length
        request = read_request(head + data, said, [X, IDS], [TensorSpec("y", torch.float32, (-1,))])
        assert request.rows == len(request.inputs["x"]) == len(request.inputs["ids"])

    require_one_line(read)
