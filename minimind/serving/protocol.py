"""What clients send. The field's names and meanings are OpenAI's; what is added to them is said.

null means the same as leaving a field out. A parameter that is not known is refused, and so is a value that would
change the answer and is not served: an answer never ignores half of a question. Inside messages, where clients keep
notes of their own, fields that are not known do not count.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, FiniteFloat, model_validator

MAX_STOPS, MAX_N = 16, 128
MAX_DEPTH = 64  # Python gives up rendering at some 300 levels, llguidance parsing at 128; written schemas have a dozen


def shallow(value: dict[str, Any]) -> dict[str, Any]:
    """`value`; ValueError where objects and lists in it lie deeper than MAX_DEPTH."""
    level: list[Any] = [value]
    for _ in range(MAX_DEPTH):
        inner = [x for outer in level for x in (outer.values() if isinstance(outer, dict) else outer)]
        level = [x for x in inner if isinstance(x, dict | list)]
        if not level:
            return value
    raise ValueError(f"more than {MAX_DEPTH} levels of objects and lists")


JsonObject = Annotated[dict[str, Any], AfterValidator(shallow)]
Int64 = Annotated[
    int, Field(ge=-(2**63), lt=2**63)
]  # the API's description holds bounds as floats: 2^63 - 1 is none
Limit = Annotated[int, Field(ge=1, lt=2**31)] | Literal[-1]  # -1: as many as there is room for
StopString = Annotated[str, Field(min_length=1)]
Stops = Annotated[list[StopString], Field(max_length=MAX_STOPS)]


class Lenient(BaseModel):
    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, given: Any) -> Any:
        return {k: v for k, v in given.items() if v is not None} if isinstance(given, dict) else given


class Strict(Lenient):
    model_config = ConfigDict(extra="forbid")


class TextPart(Lenient):
    type: Literal["text"]
    text: str


Content = str | list[TextPart]


class FunctionCall(Lenient):
    """arguments: JSON, as the model wrote it; where its answer was cut, the beginning of some."""

    name: str
    arguments: str = ""


class ToolCall(Lenient):
    id: str = ""
    type: Literal["function"] = "function"
    function: FunctionCall


class InputMessage(Lenient):
    role: Literal["system", "developer", "user"]
    content: Content


class AssistantMessage(Lenient):
    """An answer as it was given. reasoning_content: what the model thought; the template decides what becomes of it."""

    role: Literal["assistant"]
    content: Content | None = None
    reasoning_content: str | None = None
    tool_calls: list[ToolCall] | None = None


class ToolMessage(Lenient):
    role: Literal["tool"]
    content: Content = ""
    tool_call_id: str = ""


Message = Annotated[InputMessage | AssistantMessage | ToolMessage, Field(discriminator="role")]


class Function(Strict):
    name: Annotated[str, Field(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")]
    description: str | None = None
    parameters: JsonObject | None = None
    strict: bool | None = None


class Tool(Strict):
    type: Literal["function"]
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
    """Field `schema` of OpenAI's, which pydantic keeps for itself."""

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
    """include_obfuscation: whether chunks are padded against eavesdroppers, which they never are here."""

    include_usage: bool = False
    include_obfuscation: bool = False


class TemplateOptions(Strict):
    """What the chat template can be told; both names mean the same."""

    enable_thinking: bool | None = None
    open_thinking: bool | None = None


class Sampling(Strict):
    """top_k, min_p and repetition_penalty are additions. presence_penalty and repetition_penalty count tokens of the
    prompt too. A temperature below 1e-5 is taken as 0: dividing by it would leave the numbers' range. user, metadata,
    store, service_tier, safety_identifier and prompt_cache_key change nothing here and are accepted."""

    model: str
    temperature: Annotated[FiniteFloat, Field(ge=0, le=2)] | None = None
    top_p: Annotated[FiniteFloat, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    min_p: Annotated[FiniteFloat, Field(ge=0, le=1)] | None = None
    presence_penalty: Annotated[FiniteFloat, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[FiniteFloat, Field(ge=-2, le=2)] | None = None
    repetition_penalty: Annotated[FiniteFloat, Field(ge=0.1, le=10)] | None = None
    n: Annotated[int, Field(ge=1, le=MAX_N)] | None = None
    seed: Int64 | None = None
    stop: StopString | Stops | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    logit_bias: dict[str, float] | None = None
    user: str | None = None
    metadata: dict[str, str] | None = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None


class ChatRequest(Sampling):
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
    chat_template_kwargs: TemplateOptions | None = None
    open_thinking: bool | None = None


TokenIds = Annotated[list[Annotated[int, Field(ge=0, lt=2**31)]], Field(min_length=1)]


class CompletionRequest(Sampling):
    """prompt: text, in which the names of special tokens are read as those tokens and which begins with the tokenizer's
    bos token, whether it is written there or not; or token ids, as they are; or a list of either."""

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
