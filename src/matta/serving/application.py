"""The server as an ASGI application: addresses of the Open Inference Protocol, limits, versions, and the split."""

from __future__ import annotations

import asyncio
import json
import logging
import math
import re
import time
import traceback
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from typing import Final, final

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from matta import __version__
from matta.ab_testing.traffic import AnswerLog, Split
from matta.errors import DAMAGE, AbError, ServeError, first_line
from matta.serving.batching import Answer, Batcher, QueueFull
from matta.serving.inference_protocol import (
    HEADER_LENGTH,
    InferenceRequest,
    ProtocolError,
    read_request,
    write_answer,
)
from matta.serving.serve_settings import ServeSettings
from matta.serving.served_models import ServedModels, VersionWatch
from matta.serving.serving_metrics import ServingMetrics
from matta.serving.size_policy import SizePolicy

LOG: Final = logging.getLogger("matta.serve")
BEFORE: Final = "0"  # the version of the weights of the start, where snapshots count from 1
LINGER_S: Final = 2.0
METRICS_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"
MEGABYTE: Final = 2**20
OUT_OF_RANGE: Final = re.compile("out of (data )?bounds|out of range|valid range")  # of ids, in tables of embeddings
Handler = Callable[[Request], Awaitable[Response]]


@final
class Application:
    """The addresses, and what stands behind them.

    Args:
        models: What computes.
        settings: How; host and port are the server's.

    Raises:
        ServeError: a size that is not served, or a split between such.
        CheckpointError: a version of the split that is not there.
    """

    def __init__(self, models: ServedModels, settings: ServeSettings) -> None:
        self.models, self.settings = models, settings
        self.size = models.sizes[-1] if settings.size is None else settings.size
        self._require_size(self.size)
        self._require_one_value()
        self.arms = {arm: self._arm(arm) for arm in settings.shares}
        self.split = Split(shares=settings.shares, salt=settings.salt) if settings.shares else None
        self.log = AnswerLog(settings.log, split=self.split) if settings.log is not None else None
        self.metrics = ServingMetrics()
        self._failures: set[tuple[object, ...]] = set()
        self.is_draining = False
        self._watch = None
        if settings.snapshots is not None:
            models.current = replace(models.current, name=BEFORE)
        self.metrics.serves(models.current.name)
        if settings.snapshots is not None:
            self._watch = VersionWatch(models, settings.snapshots, swapped=self._swapped, refused=self._refused)
            self._watch.look()
            if models.current.name == BEFORE:
                LOG.warning("%s has no version that is served; the weights of the start are, as 0", settings.snapshots)
        self.asgi = Starlette(
            routes=self._routes(), lifespan=self._lifespan, exception_handlers={HTTPException: _as_json}
        )

    def _require_size(self, size: str) -> None:
        if size not in self.models.sizes:
            raise ServeError(f"received the size {size!r}; expected one of: {'; '.join(self.models.sizes)}")

    def _require_one_value(self) -> None:
        outputs = self.models.outputs
        if self.settings.log is not None and (len(outputs) > 1 or math.prod(outputs[0].shape[1:]) != 1):
            told = ", ".join(f"{each.name} of shape {list(each.shape)}" for each in outputs)
            raise ServeError(f"the model gives {told}; expected one logit for each row, for a log of predictions")

    def _arm(self, arm: str) -> tuple[str, str | None]:
        """Size and pinned version of an arm; the version is loaded."""
        size, _, version = arm.partition("@")
        self._require_size(size)
        if not version:
            return size, None
        if self.settings.snapshots is None or not version.isdigit():
            raise ServeError(f"received the arm {arm!r}; expected SIZE@NUMBER, a version in a folder of snapshots")
        self.models.pin(self.settings.snapshots, int(version))
        return size, version

    def _swapped(self, version: str) -> None:
        self.metrics.swapped(version)
        LOG.info("serving version %s", version)

    def _refused(self, version: str, reason: str) -> None:
        self.metrics.refused()
        LOG.warning("version %s is refused, the one before it stays: %s", version, reason)

    def _routes(self) -> list[Route]:
        model, of_version = "/v2/models/{model}", "/v2/models/{model}/versions/{version}"
        routes = [
            Route("/v2/health/live", self._live),
            Route("/v2/health/ready", self._ready),
            Route("/v2", self._server),
            Route("/metrics", self._metrics),
            Route("/v2/models/{model}/outcomes", self._guarded(self._outcomes), methods=["POST"]),
        ]
        for path in (model, of_version):
            routes += [
                Route(path, self._guarded(self._metadata)),
                Route(f"{path}/ready", self._guarded(self._model_ready)),
                Route(f"{path}/infer", self._guarded(self._infer), methods=["POST"]),
            ]
        return routes

    @asynccontextmanager
    async def _lifespan(self, _: Starlette) -> AsyncIterator[None]:
        settings = self.settings
        policy = None
        if settings.target_ms is not None:
            policy = SizePolicy(self.models.times, settings.target_ms / 1e3, max_rows=settings.max_batch)
        self.batcher = Batcher(
            self.models,
            size=self.size,
            policy=policy,
            max_rows=settings.max_batch,
            max_wait_s=settings.max_wait_ms / 1e3,
            max_waiting_rows=settings.max_queue,
            ran=self.metrics.ran,
        )
        looking = asyncio.create_task(self._look())
        try:
            yield
        finally:
            looking.cancel()
            with suppress(asyncio.CancelledError):
                await looking
            await asyncio.to_thread(self.batcher.close)
            if self.log is not None:
                self.log.close()

    async def _look(self) -> None:
        while self._watch is not None:
            await asyncio.sleep(self.settings.poll_s)
            await asyncio.to_thread(self._watch.look)

    async def _live(self, _: Request) -> Response:
        return JSONResponse({"live": True})

    async def _ready(self, _: Request) -> Response:
        return JSONResponse({"ready": not self.is_draining}, status_code=503 if self.is_draining else 200)

    async def _server(self, _: Request) -> Response:
        return JSONResponse({"name": "matta", "version": __version__, "extensions": ["binary_tensor_data"]})

    async def _metrics(self, _: Request) -> Response:
        return Response(self.metrics.text(self.batcher.rows), media_type=METRICS_TYPE)

    async def _model_ready(self, request: Request) -> Response:
        self._version(request)
        return JSONResponse(
            {"name": self.settings.name, "ready": not self.is_draining}, status_code=503 if self.is_draining else 200
        )

    async def _metadata(self, request: Request) -> Response:
        self._version(request)
        models = self.models
        return JSONResponse(
            {
                "name": self.settings.name,
                "versions": [models.current.name, *models.pinned],
                "platform": "matta_pytorch",
                "inputs": [each.to_json() for each in models.inputs],
                "outputs": [each.to_json() for each in models.outputs],
                "parameters": {"sizes": list(models.sizes), "size": self.size},
            }
        )

    def _version(self, request: Request) -> str | None:
        """The pinned version that an address names; None: the current one.

        Raises:
            ProtocolError: it is not served.
        """
        model, version = request.path_params["model"], request.path_params.get("version")
        if model != self.settings.name:
            raise ProtocolError(404, f"there is no model {model!r}; expected {self.settings.name!r}")
        current = self.models.current.name
        if version is None or version == current:
            return None
        if version not in self.models.pinned:
            raise ProtocolError(404, f"version {version!r} is not served; expected {current!r}")
        return str(version)

    async def _infer(self, request: Request) -> Response:
        start = time.perf_counter()
        version = self._version(request)
        if request.headers.get("content-encoding", "identity") != "identity":
            raise ProtocolError(415, "the body is compressed; expected it as it is")
        body = await self._body(request)
        models = self.models
        asked = read_request(body, request.headers.get(HEADER_LENGTH), models.inputs, models.outputs)
        if asked.rows > self.settings.max_batch:
            raise ProtocolError(400, f"received {asked.rows} rows; expected at most {self.settings.max_batch}")
        identity = asked.id or uuid.uuid4().hex
        named = request.path_params.get("version")
        arm, size, version = self._chosen(asked, identity, version, is_named=named is not None)
        answer = await self._answer(asked, size, version)
        if named not in (None, answer.version):
            raise ProtocolError(404, f"version {named!r} was replaced meanwhile; expected {answer.version!r}")
        seconds = time.perf_counter() - start
        if self.log is not None and (arm is not None or self.split is None):  # of a split, what it drew alone
            self._write(identity, arm or answer.size, answer, seconds)
        head = {
            "model_name": self.settings.name,
            "model_version": answer.version,
            "id": identity,
            "parameters": {"size": answer.size, **({} if arm is None else {"arm": arm})},
        }
        content, headers = write_answer(answer.outputs, asked.binary, head)
        self.metrics.answered(answer.size, 200, seconds)
        return Response(content, headers=headers)

    def _chosen(
        self, asked: InferenceRequest, identity: str, version: str | None, *, is_named: bool
    ) -> tuple[str | None, str | None, str | None]:
        """The arm of a split, the size, and the pinned version of a request; what it names itself comes first."""
        size = asked.parameters.get("size")
        if size is not None:
            if size not in self.models.sizes:
                raise ProtocolError(400, f"received the size {size!r}; expected one of: {'; '.join(self.models.sizes)}")
            return None, str(size), version
        if self.split is None or is_named:
            return None, None, version
        arm = self.split.arm(identity)
        return arm, *self.arms[arm]

    async def _answer(self, asked: InferenceRequest, size: str | None, version: str | None) -> Answer:
        try:
            async with asyncio.timeout(self.settings.timeout_s):
                return await self.batcher.answer(asked.inputs, asked.rows, size, version)
        except QueueFull as full:
            raise ProtocolError(503, str(full), retry_after_s=max(1, math.ceil(full.retry_after_s))) from None
        except TimeoutError:
            raise ProtocolError(504, f"no answer within {self.settings.timeout_s:g} s") from None
        except Exception as error:  # of the user's model: any kind
            if isinstance(error, IndexError) or OUT_OF_RANGE.search(str(error)):
                raise ProtocolError(400, f"the model does not take these inputs: {first_line(error)}") from None
            if empty := [name for name, each in asked.inputs.items() if not each.numel()]:
                raise ProtocolError(400, f"the model does not take an input without values: {empty[0]}") from None
            self._tell_failure(error)
            raise ProtocolError(500, f"the model failed: {type(error).__name__}") from None

    def _tell_failure(self, error: Exception) -> None:
        """Log a failure of the model, with its traceback the first time: a client must not fill the disk."""
        place = traceback.extract_tb(error.__traceback__)[-1]
        kind = type(error).__name__, place.filename, place.lineno
        known, self._failures = kind in self._failures, self._failures | {kind}
        LOG.error("the model failed: %s: %s", kind[0], first_line(error), exc_info=None if known else error)

    def _write(self, identity: str, arm: str, answer: Answer, seconds: float) -> None:
        """Log an answer; what cannot be logged (a full disk, values that are not finite) does not keep it back."""
        assert self.log is not None
        try:
            self.log.answer(
                identity,
                arm=arm,
                model=answer.size,
                version=answer.version,
                predictions=[value for each in answer.outputs.values() for value in each.flatten().tolist()],
                latency_ms=1e3 * seconds,
            )
        except (AbError, OSError) as error:
            LOG.error("the answer to %r is not logged: %s", identity, error)

    async def _outcomes(self, request: Request) -> Response:
        """Outcomes by id, as JSON lines: {"id": ..., "outcomes": [...]}."""
        self._version(request)
        if self.log is None:
            raise ProtocolError(409, "there is no log to write outcomes to; start with --log FILE")
        outcomes = _outcomes_in(await self._body(request))
        now = time.time()
        try:
            for identity, values in outcomes:
                self.log.outcome(identity, outcomes=values, time_s=now)
        except (AbError, OSError) as error:
            LOG.error("outcomes are not logged: %s", error)
            raise ProtocolError(503, f"the outcomes cannot be logged: {first_line(error)}") from None
        return JSONResponse({"received": len(outcomes)})

    async def _body(self, request: Request) -> bytes:
        """The body of a request, if it is not too large and comes in time.

        Raises:
            ProtocolError: it is (413), or does not (408).
        """
        most = int(self.settings.max_request_mb * MEGABYTE)
        length = request.headers.get("content-length", "0")
        if not length.isdigit() or int(length[:20]) > most:
            raise ProtocolError(413, f"the request is too large; expected at most {most} bytes")
        chunks, size = [], 0
        try:
            async with asyncio.timeout(self.settings.timeout_s):
                async for chunk in request.stream():
                    size += len(chunk)
                    if size > most:
                        raise ProtocolError(413, f"the request is too large; expected at most {most} bytes")
                    chunks.append(chunk)
        except TimeoutError:
            raise ProtocolError(408, f"the body did not come within {self.settings.timeout_s:g} s") from None
        return b"".join(chunks)

    def _guarded(self, handler: Handler) -> Handler:
        """A handler whose refusals are answers; while the server drains, connections are closed."""
        is_inference = handler == self._infer

        async def guarded(request: Request) -> Response:
            try:
                response = await handler(request)
            except ProtocolError as error:
                headers = {} if error.retry_after_s is None else {"Retry-After": str(error.retry_after_s)}
                response = JSONResponse({"error": str(error)}, status_code=error.status, headers=headers)
                if error.status in (408, 413):
                    await _discard(request)
                    response.headers["Connection"] = "close"  # what is left of the body is not read
                if is_inference:
                    self.metrics.answered("", error.status, 0.0)
            except ClientDisconnect:
                return Response(status_code=400)
            if self.is_draining:
                response.headers["Connection"] = "close"
            return response

        return guarded


def _outcomes_in(body: bytes) -> list[tuple[str, list[float]]]:
    """The ids and outcomes in a body of JSON lines: all of them, before any is logged.

    Raises:
        ProtocolError: a line is none.
    """
    found = []
    try:
        for line in filter(str.strip, body.decode("utf-8").splitlines()):
            values = json.loads(line)
            identity, outcomes = values["id"], values["outcomes"]
            numbers = [float(value) for value in outcomes]
            is_list = isinstance(outcomes, list) and bool(numbers)
            if not (isinstance(identity, str) and is_list and all(map(math.isfinite, numbers))):
                raise ValueError(f"received {line:.100}")
            found.append((identity, numbers))
    except DAMAGE as error:
        raise ProtocolError(
            400, f"expected lines such as {{'id': 'a', 'outcomes': [1]}}: {first_line(error)}"
        ) from None
    return found


async def _discard(request: Request) -> None:
    """Read on for a while: a client that is still sending when its connection closes never sees the answer."""
    with suppress(TimeoutError, ClientDisconnect, RuntimeError):  # RuntimeError: it was read to the end
        async with asyncio.timeout(LINGER_S):
            async for _ in request.stream():
                pass


async def _as_json(request: Request, error: Exception) -> Response:
    """Refusals of the router (an unknown address, another method) like those of the handlers."""
    assert isinstance(error, HTTPException)
    message = f"{request.method} {request.url.path}: {error.detail}"
    return JSONResponse({"error": message}, status_code=error.status_code, headers=error.headers)
