"""The HTTP protocol: request bodies and error bodies in OpenAI's form. Docstrings name what we add to OpenAI's fields.

null means the same as leaving a field out. Unknown parameters are refused, and so are values that would change the
answer but are not supported: no part of a request is silently ignored. Values that change nothing are accepted, also
for parameters of other servers (NEUTRAL). Inside messages and tools, where clients keep notes of their own, unknown
fields are ignored.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, FiniteFloat, model_validator
from starlette.exceptions import HTTPException

MAX_STOPS, MAX_N = 16, 128
MAX_DEPTH = 64  # Python fails to render some 300 levels, llguidance to parse 128; real schemas have a dozen


def limit_depth(value: dict[str, Any]) -> dict[str, Any]:
    """`value` itself; ValueError if its objects and lists are nested deeper than MAX_DEPTH."""
    level: list[Any] = [value]
    for _ in range(MAX_DEPTH):
        inner = [x for outer in level for x in (outer.values() if isinstance(outer, dict) else outer)]
        level = [x for x in inner if isinstance(x, dict | list)]
        if not level:
            return value
    raise ValueError(f"more than {MAX_DEPTH} levels of nested objects and lists")


JsonObject = Annotated[dict[str, Any], AfterValidator(limit_depth)]
Int64 = Annotated[int, Field(ge=-(2**63), lt=2**63)]  # OpenAPI writes bounds as floats, and 2^63 - 1 is not one
Limit = Annotated[int, Field(ge=1, lt=2**31)] | Literal[-1]  # -1: as many tokens as fit
Stops = Annotated[list[str], Field(max_length=MAX_STOPS)]  # an empty string stops nothing
# Parameters of vLLM, llama.cpp and others, with the value that changes nothing; their clients often send them.
NEUTRAL: dict[str, Any] = {
    "add_generation_prompt": True, "add_special_tokens": False, "best_of": 1, "continue_final_message": False,
    "dry_multiplier": 0, "dynatemp_range": 0, "echo": False, "ignore_eos": False, "include_stop_str_in_output": False,
    "length_penalty": 1, "min_tokens": 0, "mirostat": 0, "priority": 0, "repeat_penalty": 1,
    "skip_special_tokens": True, "spaces_between_special_tokens": True, "stop_token_ids": [], "tfs_z": 1,
    "typical_p": 1, "use_beam_search": False, "xtc_probability": 0,
}  # fmt: skip


class Lenient(BaseModel):
    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, value: Any) -> Any:
        return {k: v for k, v in value.items() if v is not None} if isinstance(value, dict) else value


class Strict(Lenient):
    model_config = ConfigDict(extra="forbid")


class TextPart(Lenient):
    type: Literal["text"]
    text: str


class RefusalPart(Lenient):
    """A refusal by the assistant, which OpenAI's API keeps apart from text."""

    type: Literal["refusal"]
    refusal: str

    @property
    def text(self) -> str:
        return self.refusal


Content = str | list[TextPart]
AssistantContent = str | list[Annotated[TextPart | RefusalPart, Field(discriminator="type")]]


class FunctionCall(Lenient):
    """arguments: JSON text as the model wrote it, possibly cut short; or an object."""

    name: str
    arguments: str | JsonObject = ""


class ToolCall(Lenient):
    id: str = ""
    type: Literal["function"] = "function"
    function: FunctionCall


class InputMessage(Lenient):
    role: Literal["system", "developer", "user"]
    content: Content


class AssistantMessage(Lenient):
    """An earlier answer. reasoning_content: its reasoning; the chat template decides whether to include it."""

    role: Literal["assistant"]
    content: AssistantContent | None = None
    reasoning_content: str | None = None
    tool_calls: list[ToolCall] | None = None


class ToolMessage(Lenient):
    role: Literal["tool"]
    content: Content = ""
    tool_call_id: str = ""


Message = Annotated[InputMessage | AssistantMessage | ToolMessage, Field(discriminator="role")]


class Function(Lenient):
    name: Annotated[str, Field(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")]
    description: str | None = None
    parameters: JsonObject | None = None
    strict: bool | None = None


class Tool(Lenient):
    type: Literal["function"] = "function"
    function: Function


class NamedFunction(Strict):
    name: str


class NamedTool(Strict):
    type: Literal["function"]
    function: NamedFunction


class TextFormat(Strict):
    type: Literal["text"]


class JsonFormat(Strict):
    type: Literal["json_object"]


class JsonSchema(Lenient):
    """schema_: OpenAI's field `schema`, a name that pydantic reserves."""

    model_config = ConfigDict(extra="forbid", populate_by_name=True)
    name: str = ""
    description: str | None = None
    schema_: JsonObject = Field(alias="schema")
    strict: bool | None = None


class JsonSchemaFormat(Strict):
    type: Literal["json_schema"]
    json_schema: JsonSchema


Format = Annotated[TextFormat | JsonFormat | JsonSchemaFormat, Field(discriminator="type")]


class StreamOptions(Strict):
    """include_obfuscation is accepted, but chunks are never padded. Without `stream` these options have no effect: a
    whole answer always contains its usage."""

    include_usage: bool = False
    include_obfuscation: bool = False
    continuous_usage_stats: Literal[False] = False


class TemplateOptions(Strict):
    """Variables of the chat template; both names mean the same."""

    enable_thinking: bool | None = None
    open_thinking: bool | None = None


class SamplingFields(Strict):
    """top_k (0 or -1: all), min_p and repetition_penalty are additions. presence_penalty and repetition_penalty count
    tokens of the prompt too. A temperature below 1e-5 is taken as 0, since dividing by it would overflow. user,
    metadata, store, service_tier, safety_identifier, prompt_cache_key and prompt_cache_retention are accepted and have
    no effect."""

    @model_validator(mode="before")
    @classmethod
    def _without_neutral(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        own = cls.model_fields
        return {k: v for k, v in value.items() if k in own or k not in NEUTRAL or v != NEUTRAL[k]}

    model: str
    temperature: Annotated[FiniteFloat, Field(ge=0, le=2)] | None = None
    top_p: Annotated[FiniteFloat, Field(ge=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, lt=2**31)] | None = None
    min_p: Annotated[FiniteFloat, Field(ge=0, le=1)] | None = None
    presence_penalty: Annotated[FiniteFloat, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[FiniteFloat, Field(ge=-2, le=2)] | None = None
    repetition_penalty: Annotated[FiniteFloat, Field(ge=0.1, le=10)] | None = None
    n: Annotated[int, Field(ge=1, le=MAX_N)] | None = None
    seed: Int64 | None = None
    stop: str | Stops | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    logit_bias: dict[str, float] | None = None
    user: Any = None
    metadata: Any = None
    store: Any = None
    service_tier: Any = None
    safety_identifier: Any = None
    prompt_cache_key: Any = None
    prompt_cache_retention: Any = None


class ChatRequest(SamplingFields):
    """prediction: an expected answer, by which other servers decode faster; it has no effect here."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_tokens: Limit | None = None
    max_completion_tokens: Limit | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    tools: list[Tool] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    response_format: Format | None = None
    modalities: Annotated[list[Literal["text"]], Field(max_length=1)] | None = None
    reasoning_effort: Literal["medium"] | None = None
    verbosity: Literal["medium"] | None = None
    functions: Annotated[list[Any], Field(max_length=0)] | None = None
    function_call: Literal["none", "auto"] | None = None
    prediction: Any = None
    chat_template_kwargs: TemplateOptions | None = None
    open_thinking: bool | None = None


TokenIds = Annotated[list[Annotated[int, Field(ge=0, lt=2**31)]], Field(min_length=1)]


class CompletionRequest(SamplingFields):
    """prompt: text, token ids, or a list of either. In text the names of special tokens stand for those tokens, and the
    tokenizer's bos token is put in front unless it is there. Token ids are used unchanged."""

    prompt: (
        str
        | Annotated[list[str], Field(min_length=1, max_length=MAX_N)]
        | TokenIds
        | Annotated[list[TokenIds], Field(min_length=1, max_length=MAX_N)]
    )
    max_tokens: Limit | None = None
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    echo: bool | None = None
    suffix: str | None = None
    best_of: int | None = None


TYPES = {401: "authentication_error", 429: "rate_limit_error", 500: "server_error", 503: "server_error"}


class ErrorInfo(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    error: ErrorInfo


class ApiError(HTTPException):
    """An error response. param: the field at fault; code: an identifier for programs."""

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


def _text(text: str) -> str:
    """`text` in one line, with lone surrogates replaced: names of fields come from clients and may contain some."""
    return " ".join(text.encode(errors="replace").decode().split())


def documented(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """The OpenAPI `responses` of a route that may answer with these error statuses."""
    return {status: {"model": ErrorBody} for status in statuses}


def documented_stream(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """The same for a route whose answer may be streamed."""
    content: dict[str, Any] = {"application/json": {}, "text/event-stream": {}}
    return {200: {"description": "The answer, or its events", "content": content}, **documented(*statuses)}


def install_handlers(app: FastAPI) -> None:
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _http)
    app.add_exception_handler(Exception, _unexpected)


async def _invalid(request: Request, problem: Exception) -> JSONResponse:
    """400 for malformed JSON, 422 for JSON that does not match the schema. The message does not repeat the input, which
    may be long or not text."""
    assert isinstance(problem, RequestValidationError)
    first = max(problem.errors(), key=lambda error: len(error["loc"]))  # in a union, the variant that fits best
    place = [str(part) for part in first["loc"] if part != "body"]
    if first["type"] == "json_invalid":
        return JSONResponse(error_body(400, "the body is not JSON"), 400)
    param = ".".join(place) or None
    message = f"{param or 'the body'}: {first['msg'].removeprefix('Value error, ')}"
    return JSONResponse(error_body(422, message, param), 422)


# Routes of OpenAI's API that clients call by themselves or by default, and that this server does not have.
MISSING = ("assistants", "audio", "batches", "embeddings", "files", "images", "moderations", "rerank", "responses")


async def _http(request: Request, problem: Exception) -> JSONResponse:
    if isinstance(problem, ApiError):
        return problem.response()
    assert isinstance(problem, HTTPException)
    path, detail = request.url.path, problem.detail
    if problem.status_code == 404:
        kind = path.removeprefix("/v1/").split("/")[0]
        if not path.startswith("/v1/"):
            detail = f"{detail}; the API is below /v1"
        elif kind in MISSING:
            detail = f"this server has no {kind}, only /v1/chat/completions, /v1/completions and /v1/models"
    message = f"{request.method} {path}: {detail}"
    return JSONResponse(error_body(problem.status_code, message), problem.status_code, problem.headers)


async def _unexpected(request: Request, problem: Exception) -> JSONResponse:
    """500; the traceback goes to the log, not to the client."""
    return JSONResponse(error_body(500, "the server failed; its log has the details"), 500)
