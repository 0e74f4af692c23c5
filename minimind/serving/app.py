"""The HTTP server: the ASGI application with its routes, the checks before them, and a graceful shutdown."""

from __future__ import annotations

import hmac
import inspect
import re
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import uvicorn
from fastapi import APIRouter, FastAPI, Security
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import PlainTextResponse
from fastapi.security import HTTPBearer
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from minimind import __version__
from minimind.serving.protocol import ApiError, documented, install_handlers
from minimind.serving.routes import chat_router, completions_router
from minimind.serving.service import Metrics, Service

# Origins on this machine: local pages, and programs in a web view, which have a scheme of their own (tauri://localhost).
LOOPBACK = r"[a-z][a-z0-9+.-]*://(([a-z0-9-]+\.)*localhost|127(\.\d+){3}|0\.0\.0\.0|\[::1\])(:\d+)?"


def create_app(service: Service) -> FastAPI:
    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        service.worker.start()
        yield
        await service.worker.stop()

    app = FastAPI(title="MiniMind", version=__version__, lifespan=lifespan)
    install_handlers(app)
    protected = (
        [] if service.api_key is None else [Security(HTTPBearer(auto_error=False))]
    )  # shows the key's field at /docs
    for router in (chat_router, completions_router, models_router):
        app.include_router(router(service), dependencies=protected)
    app.include_router(state_router(service))
    app.add_middleware(Gate, api_key=service.api_key, max_body=service.max_body, metrics=service.metrics)
    options: dict[str, Any] = {"allow_methods": ["GET", "POST"], "allow_headers": ["*"]}
    options |= {"allow_origins": service.allow_origins, "allow_origin_regex": LOOPBACK}
    if "allow_private_network" in inspect.signature(CORSMiddleware).parameters:
        options["allow_private_network"] = True  # allowed pages of the internet may call into the local network
    # outside the gate: a browser's preflight request carries no key
    app.add_middleware(CORSMiddleware, **options)
    return app


def models_router(service: Service) -> APIRouter:
    router = APIRouter()
    card = {"id": service.model, "object": "model", "created": service.created, "owned_by": "minimind",
            "max_model_len": service.context}  # fmt: skip

    @router.get("/v1/models", responses=documented(401))
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [card]}

    @router.get("/v1/models/{model:path}", responses=documented(401, 404))
    async def model(model: str) -> dict[str, Any]:
        service.check_model(model)
        return card

    return router


def state_router(service: Service) -> APIRouter:
    """/health and /metrics. They need no key, since they show no text."""
    router = APIRouter()

    @router.get("/health", responses=documented(503))
    async def health() -> dict[str, Any]:
        if not service.worker.alive or service.worker.draining:
            raise ApiError(503, "the server is shutting down", code="shutting_down")
        return {"status": "ok", "model": service.model}

    @router.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> PlainTextResponse:
        text = service.metrics.render(await service.worker.stats())
        return PlainTextResponse(text, media_type=CONTENT_TYPE_PLAIN_0_0_4)

    return router


_SPARE_SECONDS = 3.0  # after drain_seconds, for cancelled answers to send their error


class Server(uvicorn.Server):
    """uvicorn with a graceful shutdown. drain_seconds: how long running answers may take after Ctrl-C or SIGTERM; a
    second signal ends the server at once. on_start: called when the server accepts requests."""

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
    """A listening TCP socket. ValueError, one line, if the address is not available."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=2048)
    except OSError as problem:
        reason = problem.strerror or problem
        raise ValueError(f"--host {host} --port {port}: {reason}; choose another (--port 0 finds a free one)") from None
    except OverflowError:
        raise ValueError(f"--port {port}: must be between 0 and 65535") from None


JSON = re.compile(r"application/([\w.+-]+\+)?json\s*(;.*)?", re.IGNORECASE)


class Gate:
    """Checks the API key of every request below /v1 and the size of its body before the body is parsed, and counts
    responses by route and status.

    A body with another content type is read as JSON too: curl -d calls it a form, fetch in Node plain text. Requests
    of web pages are the exception: browsers send a preflight request before JSON, but none before a form or text.
    """

    def __init__(self, app: ASGIApp, api_key: str | None, max_body: int, metrics: Metrics) -> None:
        self._app, self._max_body, self._metrics = app, max_body, metrics
        self._key = None if api_key is None else api_key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                route = scope.get("route")
                self._metrics.responses.labels(getattr(route, "path", "other"), message["status"]).inc()
            await send(message)

        headers = Headers(scope=scope)
        try:
            if self._key is not None and (scope["path"] + "/").startswith("/v1/"):
                self._check_key(headers.get("authorization", ""), self._key)
            self._check_size(headers.get("content-length", "0"))
            if scope["method"] == "POST" and not JSON.fullmatch(headers.get("content-type", "").strip()):
                if "origin" in headers:
                    raise ApiError(415, "requests of web pages need Content-Type: application/json")
                MutableHeaders(scope=scope)["content-type"] = "application/json"
        except ApiError as problem:
            await problem.response()(scope, receive, counted)
            return
        await self._app(scope, self._limited(receive), counted)

    @staticmethod
    def _check_key(header: str, key: bytes) -> None:
        scheme, _, client_key = header.partition(" ")
        if scheme.lower() != "bearer" or not hmac.compare_digest(client_key.strip().encode("latin-1"), key):
            message = "give this server's API key as Authorization: Bearer KEY"
            raise ApiError(401, message, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})

    def _check_size(self, length: str) -> None:
        if length.isdecimal() and int(length) > self._max_body:
            raise self._too_large()

    def _too_large(self) -> ApiError:
        return ApiError(413, f"the body is larger than {self._max_body:,} bytes", code="body_too_large")

    def _limited(self, receive: Receive) -> Receive:
        """`receive` with the size limit, for bodies without a content-length."""
        received = 0

        async def limited() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > self._max_body:
                raise self._too_large()
            return message

        return limited
