"""Errors in the shape that OpenAI's clients expect: {"error": {"message", "type", "param", "code"}}."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException

TYPES = {401: "authentication_error", 429: "rate_limit_error", 500: "server_error", 503: "server_error"}


class ErrorInfo(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    error: ErrorInfo


class ApiError(HTTPException):
    """An answer that is an error. param: the field at fault; code: a name for programs."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(status, message, dict(headers or {}))
        self.param, self.code = param, code

    def __str__(self) -> str:
        return str(self.detail)

    def body(self) -> dict[str, Any]:
        return error_body(self.status_code, str(self.detail), self.param, self.code)

    def response(self) -> JSONResponse:
        return JSONResponse(self.body(), self.status_code, self.headers)


def error_body(status: int, message: str, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    kind = TYPES.get(status, "invalid_request_error")
    return {"error": {"message": _text(message), "type": kind, "param": param and _text(param), "code": code}}


def _text(said: str) -> str:
    """One line that UTF-8 can hold: clients choose the names of fields, lone surrogates among them."""
    return " ".join(said.encode(errors="replace").decode().split())


def documented(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """For a route's OpenAPI entry: which errors it answers with."""
    return {status: {"model": ErrorBody} for status in statuses}


def documented_stream(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """The same for a route whose answer may be a stream."""
    content: dict[str, Any] = {"application/json": {}, "text/event-stream": {}}
    return {200: {"description": "The answer, or its events", "content": content}, **documented(*statuses)}


def install_handlers(app: FastAPI) -> None:
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _http)
    app.add_exception_handler(Exception, _unexpected)


async def _invalid(request: Request, problem: Exception) -> JSONResponse:
    """Malformed JSON is a 400; JSON of another shape than asked for a 422. The input is not repeated: it may be long,
    or no text at all."""
    assert isinstance(problem, RequestValidationError)
    first = max(problem.errors(), key=lambda error: len(error["loc"]))  # of a union, the form that fits best
    place = [str(part) for part in first["loc"] if part != "body"]
    if first["type"] == "json_invalid":
        return JSONResponse(error_body(400, "the body is not JSON"), 400)
    param = ".".join(place) or None
    message = f"{param or 'the body'}: {first['msg'].removeprefix('Value error, ')}"
    return JSONResponse(error_body(422, message, param), 422)


async def _http(request: Request, problem: Exception) -> JSONResponse:
    if isinstance(problem, ApiError):
        return problem.response()
    assert isinstance(problem, HTTPException)
    path = request.url.path
    hint = "" if path.startswith("/v1/") or problem.status_code != 404 else "; what there is lies below /v1"
    message = f"{request.method} {path}: {problem.detail}{hint}"
    return JSONResponse(error_body(problem.status_code, message), problem.status_code, problem.headers)


async def _unexpected(request: Request, problem: Exception) -> JSONResponse:
    """The traceback goes to the log, not to the client."""
    return JSONResponse(error_body(500, "the server failed; its log says how"), 500)
