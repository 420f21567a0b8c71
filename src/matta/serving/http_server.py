"""The process that serves: uvicorn, with an end in two steps, so that a balancer has time to look elsewhere."""

from __future__ import annotations

import logging
import math
import signal
import socket
import sys
import time
from types import FrameType
from typing import Final, final

import uvicorn

from matta.errors import ServeError
from matta.serving.application import Application

SWITCH_INTERVAL_S: Final = 5e-4  # the thread that computes waits for that of the server at most so long (default: 5e-3)
BACKLOG: Final = 2048
KEEP_ALIVE_S: Final = 75  # longer than clients and balancers keep a connection idle: none is cut while it is used


def run_server(application: Application) -> None:
    """Serve until SIGTERM or Ctrl-C; then the server is not ready, drains, and this returns. A second signal ends it.

    Raises:
        ServeError: the address cannot be had.
    """
    settings = application.settings
    config = uvicorn.Config(
        application.asgi,
        log_config=None,
        access_log=False,
        lifespan="on",
        timeout_keep_alive=KEEP_ALIVE_S,
        timeout_graceful_shutdown=math.ceil(settings.timeout_s),
    )
    with _socket(settings.host, settings.port) as bound:
        host, port = bound.getsockname()[:2]
        sizes = "; ".join(application.models.sizes)
        print(f"serving {settings.name!r} at http://{host}:{port}, sizes: {sizes}", flush=True)
        logging.getLogger("matta.serve").addHandler(_to_stderr())
        logging.getLogger("matta.serve").setLevel(logging.INFO)
        sys.setswitchinterval(SWITCH_INTERVAL_S)
        _DrainingServer(config, application).run(sockets=[bound])


def _socket(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=BACKLOG)
    except OSError as error:
        raise ServeError(f"cannot listen on {host}:{port}: {error.strerror or error}; expected a free port") from None


def _to_stderr() -> logging.Handler:
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("matta serve: %(message)s"))
    return handler


@final
class _DrainingServer(uvicorn.Server):
    """After a signal it is not ready and keeps serving for a while; then it takes no more and works off the rest."""

    def __init__(self, config: uvicorn.Config, application: Application) -> None:
        super().__init__(config)
        self._application = application
        self._leave_at = math.inf

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self._application.is_draining:
            self.force_exit = sig == signal.SIGINT
            self.should_exit = True
            return
        self._application.is_draining = True
        self._leave_at = time.monotonic() + self._application.settings.drain_s

    async def on_tick(self, counter: int) -> bool:
        self.should_exit = self.should_exit or time.monotonic() >= self._leave_at
        return await super().on_tick(counter)
