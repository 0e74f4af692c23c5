"""What every HTTP request passes first: the API key and the size of the body, before any of it is parsed."""

from __future__ import annotations

import hmac
import re

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from minimind.serving.errors import ApiError
from minimind.serving.metrics import Metrics

JSON = re.compile(r"application/([\w.+-]+\+)?json\s*(;.*)?", re.IGNORECASE)


class Gate:
    """Below /v1 it asks for the key, where there is one. Counts responses by route and status.

    A body that is not said to be JSON is read as JSON all the same: curl -d calls it a form, fetch in Node plain text.
    Not one that a web page sends: its browser asks before it sends JSON, and does not before it sends a form or text.
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
                    raise ApiError(415, "a web page says Content-Type: application/json with what it sends")
                MutableHeaders(scope=scope)["content-type"] = "application/json"
        except ApiError as problem:
            await problem.response()(scope, receive, counted)
            return
        await self._app(scope, self._limited(receive), counted)

    @staticmethod
    def _check_key(header: str, key: bytes) -> None:
        scheme, _, given = header.partition(" ")
        if scheme.lower() != "bearer" or not hmac.compare_digest(given.strip().encode("latin-1"), key):
            message = "give this server's API key as Authorization: Bearer KEY"
            raise ApiError(401, message, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})

    def _check_size(self, length: str) -> None:
        if length.isdecimal() and int(length) > self._max_body:
            raise self._too_large()

    def _too_large(self) -> ApiError:
        return ApiError(413, f"the body is larger than {self._max_body:,} bytes", code="body_too_large")

    def _limited(self, receive: Receive) -> Receive:
        """For bodies that do not say how long they are."""
        seen = 0

        async def limited() -> Message:
            nonlocal seen
            message = await receive()
            seen += len(message.get("body", b""))
            if seen > self._max_body:
                raise self._too_large()
            return message

        return limited
