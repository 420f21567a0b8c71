"""`matta serve` under load, on this machine alone: throughput, latency, a spike, swaps of version, and its end.

    python benchmarks/serve.py            about five minutes
    python benchmarks/serve.py --quick    shorter, the spike with sizes by load alone, in under a minute

With --json one JSON object and nothing else. The model is a ranker (an MLP); a request has 32 rows. Server and clients
are processes on the same processor cores, each model with one thread.

- `throughput_vs_bare`: rows per second over HTTP, over those of the same model called directly with batches of the
  sizes that the server's metrics tell, in turn.
- `p50_ms`, `p99_ms`: with half of that load, at random (Poisson) times.
- `spike_p99_ratio`: 99th percentile over the target with four times what the TA can take. `elastic` picks sizes by
  load, beside the TA alone and the Student alone; `loss` is the mean over the answers of the held-out loss
  of the size that gave them, over the least possible.
- `memory_ratio`: bytes of the weights of all sizes over those of the TA.
- `onnx_speed`: throughput of ONNX Runtime over torch, by size, batches in turn.
- `swap_failures`, `term_failures`: requests without a right answer over swaps of version, and over a SIGTERM.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from statistics import fmean, median, quantiles
from typing import Any

import torch
from torch import Tensor, nn

import matta
from figures import benchmark_parser, print_figures
from matta.serving.served_models import ServedModels

FEATURES, ROWS, MOST_ROWS = 64, 32, 256
STUDENT, TA = 32, 2048
TARGET_MS, CONNECTIONS = 150.0, 32
WEIGHTS = "MATTA_BENCHMARK_WEIGHTS"  # where the server finds the trained pair


def tower(hidden: int) -> nn.Module:
    layers = nn.Linear(FEATURES, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, 1)
    return nn.Sequential(*layers)


def labelled(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Inputs and probabilities of a fixed function that small models follow less well."""
    fixed = torch.Generator().manual_seed(12345)
    waves, mix = torch.randn(FEATURES, 8, generator=fixed), torch.randn(8, generator=fixed)
    x = torch.randn(count, FEATURES, generator=torch.Generator().manual_seed(seed))
    return x, (2.0 * ((0.2 * x @ waves).sin() @ mix)).sigmoid()


def excess_loss(module: nn.Module) -> float:
    """Cross-entropy on held-out rows, over the least that there can be."""
    x, y = labelled(4096, 2)
    with torch.inference_mode():
        loss = matta.objectives.Binary().cross_entropy(module(x), y)
    return float(loss - matta.objectives.Binary().cross_entropy(y.logit(), y))


def trained_pair(num_steps: int) -> matta.Nested:
    torch.manual_seed(0)
    nested = matta.nest(tower(STUDENT), tower(TA))
    cotrain = matta.CoTraining(nested, matta.objectives.Binary(), sample=matta.random_sub_model(nested))
    optimizer = torch.optim.AdamW(nested.parameters(), lr=1e-3)
    x, y = labelled(128 * num_steps, 1)
    for rows in torch.arange(len(x)).split(128):
        optimizer.zero_grad()
        cotrain((x[rows], y[rows])).loss.backward()
        optimizer.step()
    return nested


def serving() -> matta.Serving:
    """What the server is started with."""
    nested = matta.load(os.environ[WEIGHTS], tower(STUDENT), tower(TA))
    return matta.Serving(nested=nested, example=(torch.zeros(4, FEATURES), torch.ones(4)))


@contextmanager
def server(weights: Path, *options: str) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """A server of its own process on a free port, until it is no longer needed."""
    command = [sys.executable, "-m", "matta", "serve", "serve:serving", "--port", "0", "--max-batch", str(MOST_ROWS)]
    environment = {**os.environ, WEIGHTS: str(weights), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [*command, *options], cwd=Path(__file__).parent, env=environment, stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        found = re.search(r":(\d+),", process.stdout.readline())
        assert found is not None, "the server did not start"
        port = int(found[1])
        while fetch(port, "/v2/health/ready") is None:
            time.sleep(0.05)
        yield process, port
    finally:
        process.terminate()
        process.wait(timeout=60)


def fetch(port: int, path: str) -> str | None:
    """What an address of the server gives; None: nothing yet."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=10) as answer:
            return str(answer.read().decode())
    except OSError:
        return None


def request(size: str | None = None) -> bytes:
    """An HTTP request with the rows of a tensor as bytes."""
    data = labelled(ROWS, 7)[0].numpy().tobytes()
    tensor = {"name": "input_0", "datatype": "FP32", "shape": [ROWS, FEATURES]}
    asked: dict[str, Any] = {"inputs": [{**tensor, "parameters": {"binary_data_size": len(data)}}]}
    asked["parameters"] = {"binary_data_output": True, **({"size": size} if size else {})}
    text = json.dumps(asked).encode()
    head = f"POST /v2/models/model/infer HTTP/1.1\r\nHost: x\r\nInference-Header-Content-Length: {len(text)}\r\n"
    return head.encode() + f"Content-Length: {len(text) + len(data)}\r\n\r\n".encode() + text + data


@dataclass
class Load:
    """What clients saw."""

    seconds: list[float] = field(default_factory=list)
    sizes: Counter[str] = field(default_factory=Counter)
    versions: Counter[str] = field(default_factory=Counter)
    failures: Counter[str] = field(default_factory=Counter)

    def percentile_ms(self, percent: int) -> float:
        return 1e3 * quantiles(self.seconds, n=100)[percent - 1]


class Client:
    """One connection, kept alive; after `Connection: close` it is done."""

    def __init__(self, port: int, load: Load) -> None:
        self.port, self.load, self.writer, self.is_done = port, load, None, False

    async def send(self, message: bytes, since: float) -> None:
        """Send a request and count its answer; its time is from `since`."""
        try:
            if self.writer is None:
                self.reader, self.writer = await asyncio.open_connection("127.0.0.1", self.port)
            self.writer.write(message)
            head = (await self.reader.readuntil(b"\r\n\r\n")).decode().lower()
            body = await self.reader.readexactly(int(head.split("\ncontent-length: ")[1].split("\r\n")[0]))
        except (OSError, asyncio.IncompleteReadError) as error:
            self.load.failures[type(error).__name__] += 1
            self.is_done = True
            return
        self.is_done = "connection: close" in head
        if (status := head[9:12]) != "200":
            self.load.failures[status] += 1
            return
        told = json.loads(body[: int(head.split("inference-header-content-length: ")[1].split("\r\n")[0])])
        self.load.seconds.append(time.perf_counter() - since)
        self.load.sizes[told["parameters"]["size"]] += 1
        self.load.versions[told["model_version"]] += 1


async def closed_loop(port: int, seconds: float, message: bytes, connections: int = CONNECTIONS) -> Load:
    """Each client sends its next request when it has the answer to the last."""
    load = Load()
    end = time.perf_counter() + seconds

    async def one() -> None:
        client = Client(port, load)
        while time.perf_counter() < end and not client.is_done:
            await client.send(message, time.perf_counter())

    await asyncio.gather(*(one() for _ in range(connections)))
    return load


async def open_loop(port: int, seconds: float, message: bytes, rate: float) -> Load:
    """Requests at random times, whether earlier ones are answered or not; their time is from when they were due."""
    load, random = Load(), Random(0)
    idle: list[Client] = []
    tasks: set[asyncio.Task[None]] = set()

    async def one(due: float) -> None:
        client = idle.pop() if idle else Client(port, load)
        await client.send(message, due)
        if not client.is_done:
            idle.append(client)

    due = time.perf_counter()
    end = due + seconds
    while (due := due + random.expovariate(rate)) < end:
        if (left := due - time.perf_counter()) > 0:
            await asyncio.sleep(left)
        task = asyncio.create_task(one(due))
        tasks.add(task)
        task.add_done_callback(tasks.discard)
    await asyncio.gather(*tasks)
    return load


def batch_rows(port: int) -> float:
    """Mean rows of a batch, by the server's metrics."""
    text = fetch(port, "/metrics") or ""
    total, count = (
        sum(float(each) for each in re.findall(rf"^matta_batch_rows_{what}{{.*}} (.*)$", text, re.M))
        for what in ("sum", "count")
    )
    return total / max(count, 1.0)


def bare_rows_per_s(model: nn.Module, rows: int, seconds: float) -> float:
    x, done = torch.randn(rows, FEATURES), 0
    start = time.perf_counter()
    with torch.inference_mode():
        while time.perf_counter() - start < seconds:
            model(x)
            done += rows
    return done / (time.perf_counter() - start)


def throughput(weights: Path, ta: nn.Module, seconds: float) -> dict[str, float]:
    """Rows per second over HTTP and bare, in turn; then the latency with half of that load."""
    served, bare, rows = [], [], 0.0
    with server(weights) as (_, port):
        asyncio.run(closed_loop(port, 1.0, request()))
        for _ in range(3):
            load = asyncio.run(closed_loop(port, seconds / 3, request()))
            served.append(ROWS * len(load.seconds) / (seconds / 3))
            rows = batch_rows(port)
            bare.append(bare_rows_per_s(ta, round(rows), seconds / 6))
        half = asyncio.run(open_loop(port, seconds, request(), 0.5 * median(served) / ROWS))
    return {
        "throughput_vs_bare": median(served) / median(bare),
        "rows_per_s": median(served),
        "bare_rows_per_s": median(bare),
        "batch_rows": rows,
        "p50_ms": half.percentile_ms(50),
        "p99_ms": half.percentile_ms(99),
        "half_load_failures": float(half.failures.total()),
    }


def spike(
    weights: Path, losses: dict[str, float], rate: float, seconds: float, around_s: float, num_ways: int
) -> dict[str, Any]:
    """Four times what the TA can take, with sizes by load, with the TA alone and with the Student alone."""
    target = ("--target-ms", str(TARGET_MS))
    found: dict[str, Any] = {}
    ways = {"elastic": target, "ta": ("--size", "TA"), "student": ("--size", "Student")}
    for name, options in [*ways.items()][:num_ways]:
        with server(weights, *options) as (_, port):
            asyncio.run(open_loop(port, around_s, request(), rate / 8))
            load = asyncio.run(open_loop(port, seconds, request(), rate))
            after = asyncio.run(open_loop(port, around_s, request(), rate / 16))
        answered = max(sum(load.sizes.values()), 1)
        found[name] = {
            "p99_ratio": load.percentile_ms(99) / TARGET_MS,
            "p50_ms": load.percentile_ms(50),
            "failures": dict(load.failures),
            "shares": {size: load.sizes[size] / answered for size in losses},
            "loss": sum(losses[size] * count for size, count in load.sizes.items()) / answered,
            "loss_after": fmean(losses[size] for size in after.sizes.elements()),
        }
    return found


def swaps(weights: Path, nested: matta.Nested, count: int) -> dict[str, float]:
    """New versions under load; then SIGTERM under load."""
    with tempfile.TemporaryDirectory() as folder:
        snapshots = matta.Snapshots(folder, every_s=1e9, models={"ta": matta.wide(nested)})
        snapshots.publish(nested)
        with server(weights, "--snapshots", folder, "--poll-s", "0.05") as (process, port):

            def publish() -> None:
                for _ in range(count):
                    number = snapshots.publish(nested)
                    while f'"versions":["{number}"]' not in (fetch(port, "/v2/models/model") or ""):
                        time.sleep(0.02)
                stop.set()

            stop = threading.Event()
            publisher = threading.Thread(target=publish)
            publisher.start()
            total = Load()
            while not stop.is_set():
                load = asyncio.run(closed_loop(port, 1.0, request(), 4))
                total.versions += load.versions
                total.failures += load.failures
            publisher.join()
            threading.Timer(1.0, process.send_signal, [signal.SIGTERM]).start()
            last = asyncio.run(closed_loop(port, 20.0, request(), 4))
            code = process.wait(timeout=60)
    return {
        "swaps": float(count),
        "swap_versions_seen": float(len(total.versions)),
        "swap_requests": float(sum(total.versions.values())),
        "swap_failures": float(total.failures.total()),
        "term_requests": float(len(last.seconds)),
        "term_failures": float(last.failures.total() + (code != 0)),
    }


def memory_ratio(models: ServedModels) -> float:
    """Bytes of all weights in memory over those of the TA's."""
    modules = models.current.modules
    storages = {
        each.untyped_storage().data_ptr(): each.untyped_storage().nbytes()
        for module in modules.values()
        for each in (*module.parameters(), *module.buffers())
    }
    best = modules[models.sizes[-1]]
    return sum(storages.values()) / sum(each.numel() * each.element_size() for each in best.parameters())


def onnx_speed(models: ServedModels, calls: int) -> dict[str, float]:
    """Throughput of ONNX Runtime over that of torch on the served views, by size; batches in turn."""
    x = torch.randn(MOST_ROWS, FEATURES)
    seconds: dict[tuple[str, str], list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        ways: dict[tuple[str, str], nn.Module] = {}
        for size in ("Student", "TA"):
            ways[size, "torch"] = module = models.current.modules[size]
            done = matta.export(module, f"{folder}/{size}.onnx", format="onnx", example=(x[:4], torch.ones(4)))
            ways[size, "onnx"] = matta.OnnxModule(done.path)
        with torch.inference_mode():
            for _ in range(calls):
                for way, module in ways.items():
                    start = time.perf_counter()
                    module(x)
                    seconds.setdefault(way, []).append(time.perf_counter() - start)
    return {size: median(seconds[size, "torch"]) / median(seconds[size, "onnx"]) for size in ("Student", "TA")}


def main() -> None:
    options = benchmark_parser(
        "The HTTP server beside the bare model.", quick="shorter, the spike by load alone: under a minute"
    ).parse_args()
    torch.set_num_threads(1)
    quick = options.quick
    nested = trained_pair(20 if quick else 400)
    models = ServedModels(nested, example=(torch.zeros(4, FEATURES), torch.ones(4)), max_rows=MOST_ROWS)
    losses = {size: excess_loss(module) for size, module in models.current.modules.items()}
    with tempfile.TemporaryDirectory() as folder:
        weights = matta.save(nested, Path(folder, "pair"))
        results: dict[str, Any] = throughput(weights, models.current.modules["TA"], 2.0 if quick else 20.0)
        most = 4.0 * results["bare_rows_per_s"] / ROWS
        results["spike"] = spike(weights, losses, most, *((2.0, 1.0, 1) if quick else (30.0, 3.0, 3)))
        results["spike_requests_per_s"] = most
        results["spike_p99_ratio"] = results["spike"]["elastic"]["p99_ratio"]
        results["memory_ratio"] = memory_ratio(models)
        results["onnx_speed"] = onnx_speed(models, 10 if quick else 100)
        results["losses"] = losses
        results |= swaps(weights, nested, 3 if quick else 100)
    print_figures(results, as_json=options.json)


if __name__ == "__main__":
    main()
