"""The real server, in a process of its own, with a real client of the protocol."""

from __future__ import annotations

import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from starlette.testclient import TestClient
from torch import Tensor, nn
from tritonclient import http as triton
from tritonclient.utils import InferenceServerException

import matta
from matta.cli import main
from matta.errors import MattaError, ServeError
from matta.serving.application import Application
from matta.serving.serve_settings import ServeSettings
from matta.serving.served_models import ServedModels
from matta.serving.serving_command import Serving, named_serving, serve

EXAMPLE = {"item": torch.tensor([1, 2]), "x": torch.ones(2, 6), "labels": torch.ones(2)}
INFER = "/v2/models/ranker/infer"


class Ranker(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.items, self.hidden, self.out = nn.Embedding(50, 6), nn.Linear(6, width), nn.Linear(width, 1)

    def forward(self, item: Tensor, x: Tensor) -> Tensor:
        if bool((x == -77).any()):
            time.sleep(0.5)
        if bool((x == -78).any()):
            raise RuntimeError("spoilt")
        return self.out(self.hidden(x + self.items(item)).relu()).squeeze(1)


def pair(seed: int = 0) -> matta.Nested:
    torch.manual_seed(seed)
    return matta.nest(Ranker(4), Ranker(16))


def make() -> Serving:
    return Serving(nested=pair(), example=EXAMPLE)


@contextmanager
def running(*options: str, cwd: Path | None = None) -> Iterator[tuple[subprocess.Popen[str], int]]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    command = [sys.executable, "-m", "matta", "serve", "test_serving:make", "--port", "0", "--name", "ranker"]
    process = subprocess.Popen(
        [*command, *options], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, cwd=cwd
    )
    try:
        assert process.stdout is not None and process.stderr is not None
        line = process.stdout.readline()
        found = re.search(r"http://127.0.0.1:(\d+), sizes: Student; TA", line)
        assert found is not None, line + process.stderr.read()
        yield process, int(found[1])
    finally:
        process.kill()
        process.communicate()


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    with running("--max-request-mb", "1", "--max-wait-ms", "20", "--timeout-s", "5") as (_, port):
        yield port


def post(port: int, content: bytes | dict[str, Any], path: str = INFER, **headers: str) -> tuple[int, Any]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    data = content if isinstance(content, bytes) else json.dumps(content).encode()
    try:
        connection.request("POST", path, data, {name.replace("_", "-"): value for name, value in headers.items()})
        answer = connection.getresponse()
        return answer.status, json.loads(answer.read() or b"null")
    finally:
        connection.close()


def asked(rows: int = 1, value: float = 1.0, item: int = 3, **rest: Any) -> dict[str, Any]:
    x = {"name": "x", "datatype": "FP32", "shape": [rows, 6], "data": [value] * (6 * rows)}
    return {"inputs": [{"name": "item", "datatype": "INT64", "shape": [rows], "data": [item] * rows}, x], **rest}


def triton_inputs(item: np.ndarray, x: np.ndarray, *, binary: bool) -> list[triton.InferInput]:
    made = [triton.InferInput("item", item.shape, "INT64"), triton.InferInput("x", x.shape, "FP32")]
    for each, values in zip(made, (item, x), strict=True):
        each.set_data_from_numpy(values, binary_data=binary)
    return made


@pytest.mark.parametrize("binary", [True, False])
@pytest.mark.parametrize("size", ["Student", "TA"])
def test_tritons_client_gets_the_logits_of_the_size_that_it_names(port: int, binary: bool, size: str) -> None:
    client = triton.InferenceServerClient(f"127.0.0.1:{port}")
    assert client.is_server_live() and client.is_server_ready() and client.is_model_ready("ranker")
    item, x = np.array([1, 49, 7]), np.random.default_rng(0).normal(size=(3, 6)).astype(np.float32)
    result = client.infer(
        "ranker",
        triton_inputs(item, x, binary=binary),
        outputs=[triton.InferRequestedOutput("logits", binary_data=binary)],
        request_id="r1",
        parameters={"size": size},
    )
    module = pair().student if size == "Student" else pair().ta
    expected = module(torch.from_numpy(item), torch.from_numpy(x)).detach().numpy()
    np.testing.assert_allclose(result.as_numpy("logits"), expected, rtol=1e-5, atol=1e-6)
    told = result.get_response()
    assert (told["id"], told["model_version"], told["parameters"]) == ("r1", "1", {"size": size})
    client.close()


def test_metadata_tell_what_the_model_takes_and_gives(port: int) -> None:
    client = triton.InferenceServerClient(f"127.0.0.1:{port}")
    assert client.get_server_metadata()["name"] == "matta"
    found = client.get_model_metadata("ranker", "1")
    assert found["inputs"] == [
        {"name": "item", "datatype": "INT64", "shape": [-1]},
        {"name": "x", "datatype": "FP32", "shape": [-1, 6]},
    ]
    assert found["outputs"] == [{"name": "logits", "datatype": "FP32", "shape": [-1]}]
    assert found["parameters"] == {"sizes": ["Student", "TA"], "size": "TA"}
    with pytest.raises(InferenceServerException, match="there is no model 'other'"):
        client.get_model_metadata("other")
    with pytest.raises(InferenceServerException, match="version '7' is not served"):
        client.get_model_metadata("ranker", "7")
    client.close()


def test_requests_that_come_together_are_one_batch(port: int) -> None:
    found: list[tuple[int, Any]] = []
    threads = [
        threading.Thread(target=lambda k=k: found.append(post(port, asked(value=float(k), id=str(k)))))
        for k in range(12)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    ta = pair().ta
    for status, told in found:
        assert status == 200
        expected = ta(torch.tensor([3]), torch.full((1, 6), float(told["id"]))).item()
        assert told["outputs"][0]["data"] == pytest.approx([expected], rel=1e-5)
    text = metrics(port)
    batches = sum(float(value) for value in re.findall(r"^matta_batch_rows_count.* (.*)$", text, re.M))
    rows = sum(float(value) for value in re.findall(r"^matta_batch_rows_sum.* (.*)$", text, re.M))
    assert rows > batches


def metrics(port: int) -> str:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    connection.request("GET", "/metrics")
    text = connection.getresponse().read().decode()
    connection.close()
    return text


def test_one_spoilt_request_does_not_spoil_those_beside_it(port: int) -> None:
    found: dict[int, int] = {}
    values = [1.0, -78.0, 2.0, 3.0]

    def one(k: int) -> None:
        found[k] = post(port, asked(value=values[k], item=99 if k == 3 else 3))[0]

    threads = [threading.Thread(target=one, args=(k,)) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {0: 200, 1: 500, 2: 200, 3: 400}  # an item that the embedding lacks is the client's fault


def malformed() -> Iterator[tuple[str, bytes | dict[str, Any], dict[str, str]]]:
    """Two hundred requests that no server could answer."""
    good = json.dumps(asked()).encode()
    yield "/v2/models/other/infer", good, {}
    yield "/v2/models/ranker/versions/9/infer", good, {}
    yield "/v2/nothing", good, {}
    yield INFER, good, {"Content_Encoding": "gzip"}
    yield INFER, b"x" * (2**20 + 1), {}
    yield INFER, asked(rows=65), {}
    yield INFER, asked(parameters={"size": "huge"}), {}
    yield INFER, asked(parameters={"size": ["TA"]}), {}
    yield "/v2/models/ranker/outcomes", b"{}", {}
    for cut in range(0, len(good) - 1, 2):
        yield INFER, good[:cut], {}
    for length in range(0, len(good), 2):
        yield INFER, good, {"Inference_Header_Content_Length": str(length)}
    for name in ("inputs", "outputs", "parameters", "id"):
        for value in (3, "x", [3], [[]], {"x": 1}, [None], 1e400, True):
            if (name, value) not in (("id", "x"), ("parameters", {"x": 1})):
                yield INFER, {**asked(), name: value}, {}


def test_two_hundred_malformed_requests_are_refused_and_the_next_one_is_answered(port: int) -> None:
    count = 0
    for path, content, headers in malformed():
        status, told = post(port, content, path, **headers)
        assert 400 <= status < 500, (path, content, headers, told)
        assert told["error"]
        count += 1
    assert count >= 200
    assert post(port, asked())[0] == 200


def test_what_is_no_http_does_not_stop_the_server(port: int) -> None:
    for data in (
        b"\x00" * 100,
        b"GET\r\n\r\n",
        b"POST / HTTP/9.9\r\n\r\n",
        b"POST " + INFER.encode() + b" HTTP/1.1\r\n",
    ):
        with socket.create_connection(("127.0.0.1", port), timeout=5) as connection:
            connection.sendall(data)
    assert post(port, asked())[0] == 200


def test_a_split_of_traffic_is_logged_and_compared(tmp_path: Path) -> None:
    log = tmp_path / "answers.jsonl"
    with running("--split", "Student=0.5,TA=0.5", "--salt", "s", "--log", str(log)) as (process, port):
        arms = {}
        for k in range(40):
            status, told = post(port, asked(rows=2, id=f"r{k}"))
            assert status == 200
            arms[told["id"]] = told["parameters"]["arm"]
            assert told["parameters"]["size"] == told["parameters"]["arm"]
        assert set(arms.values()) == {"Student", "TA"}
        assert post(port, asked(id="named", parameters={"size": "TA"}))[1]["parameters"] == {"size": "TA"}
        lines = "\n".join(json.dumps({"id": each, "outcomes": [1, 0]}) for each in arms)
        assert post(port, lines.encode(), "/v2/models/ranker/outcomes") == (200, {"received": 40})
        assert post(port, b'{"id": "r1", "outcomes": ["x"]}', "/v2/models/ranker/outcomes")[0] == 400
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=20) == 0
    found = [json.loads(line) for line in log.read_text().splitlines()]
    answers = {each["id"]: each["arm"] for each in found if each["kind"] == "answer"}
    assert answers == arms
    assert sum(each["kind"] == "outcome" for each in found) == 40


def test_versions_are_swapped_and_sigterm_is_awaited_without_a_failed_request(tmp_path: Path) -> None:
    nested = pair()
    snapshots = matta.Snapshots(tmp_path, every_s=1e9, models={"ta": matta.wide(nested)})
    snapshots.publish(nested)
    with running("--snapshots", str(tmp_path), "--poll-s", "0.05", "--drain-s", "0.5") as (process, port):
        seen: list[tuple[int, str]] = []
        is_over = threading.Event()

        def load() -> None:
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
            while not is_over.is_set():
                connection.request("POST", INFER, json.dumps(asked()))
                answer = connection.getresponse()
                told = json.loads(answer.read())
                seen.append((answer.status, told.get("model_version", "")))
                if answer.getheader("Connection") == "close":
                    return

        clients = [threading.Thread(target=load) for _ in range(3)]
        for client in clients:
            client.start()
        for number in range(2, 6):
            assert snapshots.publish(pair(number)) == number
            wait_until(lambda number=number: f'"{number}"' in versions(port))
        (tmp_path / "latest").write_text("00000099")
        wait_until(lambda: "matta_versions_refused_total 1.0" in metrics(port))
        process.send_signal(signal.SIGTERM)
        wait_until(lambda: status_of(port, "/v2/health/ready") == 503)
        assert status_of(port, "/v2/health/live") == 200
        for client in clients:
            client.join(timeout=20)
        is_over.set()
        assert process.wait(timeout=20) == 0
    assert {status for status, _ in seen} == {200}
    assert {version for _, version in seen} >= {"2", "3", "4", "5"}


def versions(port: int) -> str:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    connection.request("GET", "/v2/models/ranker")
    found = json.loads(connection.getresponse().read())["versions"]
    connection.close()
    return json.dumps(found)


def status_of(port: int, path: str) -> int:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    connection.request("GET", path)
    status = connection.getresponse().status
    connection.close()
    return status


def wait_until(condition: Any, seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_a_full_queue_turns_requests_away_and_late_ones_are_given_up() -> None:
    with running("--max-queue", "2", "--max-batch", "1", "--timeout-s", "1") as (_, port):
        found: list[int] = []
        headers: list[str | None] = []

        def one() -> None:
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
            connection.request("POST", INFER, json.dumps(asked(value=-77.0)))  # takes half a second
            answer = connection.getresponse()
            found.append(answer.status)
            if answer.status == 503:
                headers.append(answer.getheader("Retry-After"))
            connection.close()

        threads = [threading.Thread(target=one) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert found.count(503) >= 4
        assert 200 in found
        assert 504 in found
        assert headers and all(each is not None and int(each) >= 1 for each in headers)
        assert post(port, asked())[0] == 200


def test_the_size_follows_the_load() -> None:
    with running("--target-ms", "1000") as (_, port):
        told = post(port, asked())[1]
        assert told["parameters"] == {"size": "TA"}
        assert post(port, asked(parameters={"size": "Student"}))[1]["parameters"] == {"size": "Student"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_batch": 0}, "max_batch=0; expected a number over 0"),
        ({"target_ms": -1.0}, "target_ms=-1.0"),
        ({"timeout_s": float("nan")}, "timeout_s=nan"),
        ({"drain_s": -1.0}, "drain_s=-1.0"),
        ({"port": 70000}, "port=70000"),
        ({"name": "a/b"}, "name='a/b'"),
        ({"max_queue": 3}, "max_queue=3"),
        ({"runtime": "tvm"}, "runtime='tvm'"),
        ({"runtime": "onnx", "device": "cuda"}, "device='cuda'"),
        ({"split": "TA"}, "as in Student=0.9,TA=0.1"),
        ({"split": "TA=1e"}, "the shares 'TA=1e'"),
        ({"split": "TA=1"}, "without a log"),
        ({"split": "TA=1", "log": Path("x"), "target_ms": 5.0}, "expected one of them"),
    ],
)
def test_settings_that_cannot_work_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(MattaError, match=re.escape(message)):
        ServeSettings(**options)


def test_names_of_sizes_may_hold_commas() -> None:
    assert ServeSettings(split="wide: 0, 2=0.5,TA@12=1", log=Path("x")).shares == {"wide: 0, 2": 0.5, "TA@12": 1.0}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"size": "huge"}, "the size 'huge'; expected one of: Student; TA"),
        ({"split": "huge=1", "log": Path("x")}, "the size 'huge'"),
        ({"split": "TA@3=1", "log": Path("x")}, "SIZE@NUMBER"),
    ],
)
def test_what_is_not_served_is_refused_at_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ServeError, match=re.escape(message)):
        serve(make(), ServeSettings(**settings))


def test_an_answer_that_cannot_be_logged_is_still_given(tmp_path: Path) -> None:
    models = ServedModels(pair(), example=EXAMPLE)
    application = Application(models, ServeSettings(split="TA=1", log=tmp_path / "log", name="ranker"))
    assert application.log is not None
    application.log.close()  # what is written then is refused
    with TestClient(application.asgi) as client:
        assert client.post(INFER, json=asked()).status_code == 200


def test_a_log_without_a_split_has_each_answer_under_its_size(tmp_path: Path) -> None:
    models = ServedModels(pair(), example=EXAMPLE)
    application = Application(models, ServeSettings(log=tmp_path / "log.jsonl", name="ranker"))
    with TestClient(application.asgi) as client:
        for name, parameters in (("a", {}), ("b", {"size": "Student"})):
            assert client.post(INFER, json=asked(id=name, parameters=parameters)).status_code == 200
        client.post("/v2/models/ranker/outcomes", content='{"id": "a", "outcomes": [1]}')
    found = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [(each["kind"], each["id"], each.get("arm")) for each in found] == [
        ("answer", "a", "TA"),
        ("answer", "b", "Student"),
        ("outcome", "a", None),
    ]


def test_a_version_that_is_named_is_no_part_of_the_split(tmp_path: Path) -> None:
    """The current one too: it is what was asked for, and not drawn."""
    versions = [pair(1), pair(2)]
    snapshots = matta.Snapshots(tmp_path / "versions", every_s=1e9, models={"ta": matta.wide(versions[0])})
    for each in versions:
        snapshots.publish(each)
    settings = ServeSettings(snapshots=tmp_path / "versions", split="TA@1=1", log=tmp_path / "log.jsonl", name="ranker")
    application = Application(ServedModels(pair(), example=EXAMPLE), settings)
    with TestClient(application.asgi) as client:
        drawn = client.post(INFER, json=asked()).json()
        assert (drawn["model_version"], drawn["parameters"]) == ("1", {"size": "TA", "arm": "TA@1"})
        for number, nested in enumerate(versions, start=1):
            answer = client.post(f"/v2/models/ranker/versions/{number}/infer", json=asked()).json()
            assert (answer["model_version"], answer["parameters"]) == (str(number), {"size": "TA"})
            expected = nested.ta(torch.tensor([3]), torch.ones(1, 6))
            torch.testing.assert_close(torch.tensor(answer["outputs"][0]["data"]), expected)
        current, answer_of = application.models.current, application.batcher.answer

        async def answer_after_a_swap(*asked: Any) -> Any:
            application.models.current = replace(current, name="3")
            return await answer_of(*asked)

        application.batcher.answer = answer_after_a_swap  # type: ignore[method-assign]
        answer = client.post("/v2/models/ranker/versions/2/infer", json=asked())
        assert (answer.status_code, answer.json()["error"]) == (404, "version '2' was replaced meanwhile; expected '3'")
    assert len((tmp_path / "log.jsonl").read_text().splitlines()) == 2, "the split, and the answer drawn"


def test_weights_of_the_start_are_not_version_one_of_the_snapshots(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings = ServeSettings(snapshots=tmp_path, poll_s=0.02, name="ranker")
    application = Application(ServedModels(pair(), example=EXAMPLE), settings)
    with TestClient(application.asgi) as client:
        assert client.post(INFER, json=asked()).json()["model_version"] == "0"
        assert f"{tmp_path} has no version that is served; the weights of the start are, as 0" in caplog.messages
        assert "matta_model_version 0.0" in client.get("/metrics").text
        other = pair(1)
        matta.Snapshots(tmp_path, every_s=1e9, models={"ta": matta.wide(other)}).publish(other)
        wait_until(lambda: client.post(INFER, json=asked()).json()["model_version"] == "1")
        assert "matta_model_version 1.0" in client.get("/metrics").text
    alone = Application(ServedModels(pair(), example=EXAMPLE), ServeSettings())
    assert b"matta_model_version 1.0" in alone.metrics.text(0)


def test_a_log_needs_one_value_for_each_row(tmp_path: Path) -> None:
    serving = Serving(nested=nn.Linear(3, 2), example=(torch.ones(2, 3), None))
    with pytest.raises(ServeError, match="expected one logit for each row"):
        serve(serving, ServeSettings(log=tmp_path / "log"))


class Watched(nn.Module):
    """Two heads."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.hidden, self.click, self.minutes = nn.Linear(3, width), nn.Linear(width, 1), nn.Linear(width, 2)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        hidden = self.hidden(x).relu()
        return {"click": self.click(hidden).squeeze(1), "minutes": self.minutes(hidden)}


def test_an_input_without_values_that_fails_is_the_clients_fault() -> None:
    class Mean(nn.Module):
        def forward(self, ids: Tensor) -> Tensor:
            return ids.view(*ids.shape, -1).mean((1, 2))

    models = ServedModels(Mean(), example={"ids": torch.ones(2, 6)}, open_axes=(0, 1))
    with TestClient(Application(models, ServeSettings()).asgi) as client:
        request = {"inputs": [{"name": "ids", "datatype": "FP32", "shape": [1, 0], "data": []}]}
        answer = client.post("/v2/models/model/infer", json=request)
    assert answer.status_code == 400 and "an input without values: ids" in answer.json()["error"]


@pytest.mark.parametrize("runtime", ["torch", "onnx"])
def test_several_heads_are_several_outputs(runtime: str) -> None:
    nested = matta.nest(Watched(4), Watched(8))
    x = torch.randn(2, 3, generator=torch.Generator().manual_seed(0))
    models = ServedModels(nested, example=(x, None), runtime=runtime)
    assert [each.shape for each in models.outputs] == [(-1,), (-1, 2)]
    with TestClient(Application(models, ServeSettings()).asgi) as client:
        request = {"inputs": [{"name": "input_0", "datatype": "FP32", "shape": [2, 3], "data": x.tolist()}]}
        click, minutes = client.post("/v2/models/model/infer", json=request).json()["outputs"]
        expected = nested.ta(x)
        torch.testing.assert_close(torch.tensor(click["data"]), expected["click"])
        torch.testing.assert_close(torch.tensor(minutes["data"]).view(2, 2), expected["minutes"])
        answer = client.post("/v2/models/model/infer", json={**request, "outputs": [{"name": "minutes"}]})
        assert [each["name"] for each in answer.json()["outputs"]] == ["minutes"]


def test_a_failure_is_told_with_its_traceback_once(caplog: pytest.LogCaptureFixture) -> None:
    class Failing(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            if bool((x == 7).any()):
                raise RuntimeError("seven")
            if bool((x == 8).any()):
                raise RuntimeError("eight")
            return super().forward(x)

    models = ServedModels(Failing(3, 1), example=(torch.ones(2, 3), None))
    with TestClient(Application(models, ServeSettings()).asgi) as client:
        for value in (7, 7, 8, 7, 8):
            entry = {"name": "input_0", "datatype": "FP32", "shape": [1, 3], "data": [value] * 3}
            assert client.post("/v2/models/model/infer", json={"inputs": [entry]}).status_code == 500
    told = [(each.getMessage(), bool(each.exc_info)) for each in caplog.records if each.name == "matta.serve"]
    seven, eight = "the model failed: RuntimeError: seven", "the model failed: RuntimeError: eight"
    assert told == [(seven, True), (seven, False), (eight, True), (seven, False), (eight, False)]


def test_an_answer_without_its_rows_does_not_end_the_batches() -> None:
    class Losing(Watched):
        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return super().forward(x[1:] if bool((x > 100).any()) else x)

    models = ServedModels(matta.nest(Losing(4), Losing(8)), example=(torch.ones(2, 3), None))
    with TestClient(Application(models, ServeSettings()).asgi) as client:
        statuses = []
        for value in (1.0, 101.0, 1.0):
            entry = {"name": "input_0", "datatype": "FP32", "shape": [2, 3], "data": [value] * 6}
            statuses.append(client.post("/v2/models/model/infer", json={"inputs": [entry]}).status_code)
    assert statuses == [200, 500, 200]


def test_a_port_that_is_taken_is_told_in_a_line() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ServeError, match=f"cannot listen on 127.0.0.1:{port}"):
            serve(make(), ServeSettings(port=port))


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("nowhere", "expected a folder of a run of matta train, or module:name"),
        ("nowhere:make", "there is no module 'nowhere'"),
        ("json:make", "json has no 'make'"),
        ("json:dumps_", "json has no"),
        ("math:pi", "math:pi is of type float"),
    ],
)
def test_a_source_that_is_none_is_told_in_a_line(source: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ServeError, match=re.escape(message)):
        named_serving(source)
    assert main(["serve", source]) == 2
    assert message in capsys.readouterr().err


def test_the_last_position_alone_is_for_runs() -> None:
    with pytest.raises(ServeError, match="--last for 'a:b', no run of matta train"):
        named_serving("a:b", last=True)
