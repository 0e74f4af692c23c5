"""The ASGI application: routes, errors, the engine's life."""

from __future__ import annotations

import inspect
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import APIRouter, FastAPI, Security
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import PlainTextResponse
from fastapi.security import HTTPBearer
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4

from minimind import __version__
from minimind.serving.chat_route import chat_router
from minimind.serving.completions_route import completions_router
from minimind.serving.errors import ApiError, documented, install_handlers
from minimind.serving.gate import Gate
from minimind.serving.service import Service

# Origins of what this machine serves: pages, and programs in a web view, whose scheme is their own (tauri://localhost).
LOOPBACK = r"[a-z][a-z0-9+.-]*://(([a-z0-9-]+\.)*localhost|127(\.\d+){3}|0\.0\.0\.0|\[::1\])(:\d+)?"


def create_app(service: Service) -> FastAPI:
    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        service.worker.start()
        yield
        await service.worker.stop()

    app = FastAPI(title="MiniMind", version=__version__, lifespan=lifespan)
    install_handlers(app)
    protected = [] if service.api_key is None else [Security(HTTPBearer(auto_error=False))]  # for the API's page
    for router in (chat_router, completions_router, models_router):
        app.include_router(router(service), dependencies=protected)
    app.include_router(state_router(service))
    app.add_middleware(Gate, api_key=service.api_key, max_body=service.max_body, metrics=service.metrics)
    options: dict[str, Any] = {"allow_methods": ["GET", "POST"], "allow_headers": ["*"]}
    options |= {"allow_origins": service.allow_origins, "allow_origin_regex": LOOPBACK}
    if "allow_private_network" in inspect.signature(CORSMiddleware).parameters:
        options["allow_private_network"] = True  # a page of the internet that may call calls into this network
    # before the gate: a browser asks whether it may send the key before it sends it
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
    """Open to everybody: no text goes through here."""
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
