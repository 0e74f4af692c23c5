"""uvicorn, and how it begins and ends: running answers are finished first, for a while."""

from __future__ import annotations

import socket
from collections.abc import Callable

import uvicorn

from minimind.serving.app import create_app
from minimind.serving.service import Service

_SPARE_SECONDS = 3.0  # for what was cancelled at the limit to say so


class Server(uvicorn.Server):
    """drain_seconds: how long running answers may take after Ctrl-C or SIGTERM; a second one ends at once.
    on_start: called when requests are served."""

    def __init__(
        self, service: Service, drain_seconds: float = 30.0, on_start: Callable[[], None] = lambda: None
    ) -> None:
        self._service, self._drain_seconds, self._on_start = service, drain_seconds, on_start
        super().__init__(
            uvicorn.Config(
                create_app(service),
                log_level="warning",
                lifespan="on",
                timeout_graceful_shutdown=int(drain_seconds + _SPARE_SECONDS),
            )
        )

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            self._on_start()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._service.worker.drain(self._drain_seconds)
        await super().shutdown(sockets)


def listen(host: str, port: int) -> socket.socket:
    """ValueError, one line, where that cannot be."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=2048)
    except OSError as problem:
        reason = problem.strerror or problem
        raise ValueError(f"--host {host} --port {port}: {reason}; choose another (--port 0 finds one)") from None
    except OverflowError:
        raise ValueError(f"--port {port}: from 0 to 65535") from None
