"""What clients send. The field's names and meanings are OpenAI's; what is added to them is said.

null means the same as leaving a field out. A parameter that is not known is refused, and so is a value that would
change the answer and is not served: an answer never ignores half of a question. Values that ask for nothing are
accepted, those of other servers' parameters among them (NEUTRAL). Inside messages and tools, where clients keep notes
of their own, fields that are not known do not count.
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
Int64 = Annotated[int, Field(ge=-(2**63), lt=2**63)]  # the API's description holds bounds as floats: 2^63 - 1 is none
Limit = Annotated[int, Field(ge=1, lt=2**31)] | Literal[-1]  # -1: as many as there is room for
Stops = Annotated[list[str], Field(max_length=MAX_STOPS)]  # an empty one stops nothing
# Parameters of vLLM, llama.cpp and others, which their clients send with the value that changes nothing.
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
    def _without_nulls(cls, given: Any) -> Any:
        return {k: v for k, v in given.items() if v is not None} if isinstance(given, dict) else given


class Strict(Lenient):
    model_config = ConfigDict(extra="forbid")


class TextPart(Lenient):
    type: Literal["text"]
    text: str


class RefusalPart(Lenient):
    """OpenAI's word for an answer that declines: what the assistant said."""

    type: Literal["refusal"]
    refusal: str

    @property
    def text(self) -> str:
        return self.refusal


Content = str | list[TextPart]
Said = str | list[Annotated[TextPart | RefusalPart, Field(discriminator="type")]]


class FunctionCall(Lenient):
    """arguments: JSON, as the model wrote it; where its answer was cut, the beginning of some. Or that as an object."""

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
    """An answer as it was given. reasoning_content: what the model thought; the template decides what becomes of it."""

    role: Literal["assistant"]
    content: Said | None = None
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
    """include_obfuscation: whether chunks are padded against eavesdroppers, which they never are here. Without `stream`
    none of this means anything: a whole answer says its usage."""

    include_usage: bool = False
    include_obfuscation: bool = False
    continuous_usage_stats: Literal[False] = False


class TemplateOptions(Strict):
    """What the chat template can be told; both names mean the same."""

    enable_thinking: bool | None = None
    open_thinking: bool | None = None


class SamplingFields(Strict):
    """top_k (0 or -1: all), min_p and repetition_penalty are additions. presence_penalty and repetition_penalty count
    tokens of the prompt too. A temperature below 1e-5 is taken as 0: dividing by it would leave the numbers' range.
    user, metadata, store, service_tier, safety_identifier, prompt_cache_key and prompt_cache_retention change nothing
    here and are accepted."""

    @model_validator(mode="before")
    @classmethod
    def _without_neutral(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        own = cls.model_fields
        return {k: v for k, v in given.items() if k in own or k not in NEUTRAL or v != NEUTRAL[k]}

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
    """prediction: what the answer may look like, by which other servers write it faster."""

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
