"""The web chat without its page: turns of a conversation, answers streamed from the server, texts in two languages."""

from __future__ import annotations

import ipaddress
import json
import time
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal
from urllib.parse import urlsplit

import openai

SAMPLE_TOOLS = [
    {
        "type": "function",
        "function": {
            "name": name,
            "description": description,
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
        },
    }
    for name, description in (("weather", "Weather in a city"), ("clock", "Time in a city"))
]


@dataclass
class Settings:
    """Settings of the side bar. thinking: None leaves it to the model. seed: None for a new answer each time."""

    model: str
    system: str = ""
    thinking: bool | None = None
    temperature: float = 0.7
    top_p: float = 0.9
    repetition_penalty: float = 1.0
    max_tokens: int = 512
    seed: int | None = None
    tools: list[dict[str, Any]] = field(default_factory=list)


@dataclass
class Call:
    """One tool call. arguments: JSON text."""

    id: str
    name: str
    arguments: str


@dataclass
class ChatTurn:
    """One turn of the conversation. call_id: the call that a tool's result belongs to. stopped: the user stopped it.
    cut: it reached the longest answer. dropped: number of old rounds that no longer fit the context. first_after,
    thought_for and seconds: time from the question to the first token, to the end of the reasoning, to the end."""

    role: Literal["user", "assistant", "tool"]
    content: str = ""
    reasoning: str = ""
    calls: list[Call] = field(default_factory=list)
    call_id: str = ""
    stopped: bool = False
    cut: bool = False
    error: str = ""
    tokens: int = 0
    dropped: int = 0
    first_after: float = 0.0
    thought_for: float = 0.0
    seconds: float = 0.0

    @property
    def tokens_per_second(self) -> float:
        writing = self.seconds - self.first_after
        return (self.tokens - 1) / writing if self.tokens > 1 and writing > 0 else 0.0

    def message(self) -> dict[str, Any] | None:
        """The turn as a message of the API; None for an answer that is empty."""
        if self.role == "user":
            return {"role": "user", "content": self.content}
        if self.role == "tool":
            return {"role": "tool", "content": self.content, "tool_call_id": self.call_id}
        if not self.content and not self.calls:
            return None
        message: dict[str, Any] = {"role": "assistant", "content": self.content}
        if self.reasoning:
            message["reasoning_content"] = self.reasoning
        if self.calls:
            message["tool_calls"] = [
                {"id": c.id, "type": "function", "function": {"name": c.name, "arguments": c.arguments}}
                for c in self.calls
            ]
        return message


def connect(url: str, api_key: str | None) -> openai.OpenAI:
    """A client of the server at `url`. The environment's proxy is not used for servers on this machine.
    ValueError, one line, for a proxy that cannot be used."""
    try:
        http = openai.DefaultHttpxClient(trust_env=not _is_local(urlsplit(url).hostname or ""))
    except (ImportError, ValueError) as problem:  # SOCKS needs a package of its own
        raise ValueError(
            f"{url}: the environment's proxy: {problem}; add the server's host to NO_PROXY to use none"
        ) from None
    return openai.OpenAI(base_url=url, api_key=api_key or "none", max_retries=0, http_client=http)


def _is_local(host: str) -> bool:
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return f".{host.lower().rstrip('.')}".endswith(".localhost")
    return address.is_loopback or address.is_unspecified  # 0.0.0.0: the address that a server may print


def parse_tools(text: str) -> list[dict[str, Any]]:
    """Tools from a JSON list in OpenAI's form. ValueError, one line, for anything else."""
    try:
        value = json.loads(text) if text.strip() else []
    except ValueError as problem:
        raise ValueError(f"not JSON: {problem}") from None
    if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
        raise ValueError("not a list of objects")
    return value


def fill(
    client: openai.OpenAI, settings: Settings, turns: Sequence[ChatTurn], turn: ChatTurn
) -> Generator[None, None, None]:
    """Request the answer to `turns` and write it into `turn`, yielding after each piece.

    Closing the generator closes the connection, and the server stops generating. A failure becomes the turn's error.
    The oldest rounds are dropped from a conversation that does not fit the context.
    """
    start = time.perf_counter()
    turn.stopped = True
    kept = list(turns)
    while True:
        try:
            yield from _stream(client, _request(settings, kept), turn, start)
        except openai.BadRequestError as problem:
            rest = _without_oldest(kept) if problem.code == "context_length_exceeded" else []
            if rest:
                kept, turn.dropped = rest, turn.dropped + 1
                continue
            turn.error = problem.message
        except openai.OpenAIError as problem:
            turn.error = str(problem)
        turn.stopped = False
        turn.seconds = time.perf_counter() - start
        return


def _request(settings: Settings, turns: Sequence[ChatTurn]) -> dict[str, Any]:
    extra: dict[str, Any] = {"repetition_penalty": settings.repetition_penalty}
    if settings.thinking is not None:
        extra["chat_template_kwargs"] = {"enable_thinking": settings.thinking}
    system = [{"role": "system", "content": settings.system}] if settings.system.strip() else []
    request = {
        "model": settings.model,
        "messages": [*system, *(message for turn in turns if (message := turn.message()) is not None)],
        "temperature": settings.temperature,
        "top_p": settings.top_p,
        "max_tokens": settings.max_tokens,
        "stream": True,
        "stream_options": {"include_usage": True},
        "extra_body": extra,
    }
    if settings.seed is not None:
        request["seed"] = settings.seed
    if settings.tools:
        request["tools"] = settings.tools
    return request


def _stream(client: openai.OpenAI, request: dict[str, Any], turn: ChatTurn, start: float) -> Iterator[None]:
    with client.chat.completions.create(**request) as stream:
        for chunk in stream:
            now = time.perf_counter() - start
            if chunk.usage is not None:
                turn.tokens = chunk.usage.completion_tokens
            for choice in chunk.choices:
                if _take(turn, choice.delta):
                    turn.first_after = turn.first_after or now
                if turn.reasoning and not turn.content and not turn.calls:
                    turn.thought_for = now
                turn.cut = turn.cut or choice.finish_reason == "length"
            yield


def _take(turn: ChatTurn, delta: Any) -> bool:
    """Add a delta to the turn; returns whether it contained anything."""
    reasoning = getattr(delta, "reasoning_content", None) or ""
    turn.reasoning += reasoning
    turn.content += delta.content or ""
    for call in delta.tool_calls or []:
        if call.id:
            turn.calls.append(Call(call.id, call.function.name or "", ""))
        turn.calls[call.index].arguments += call.function.arguments or ""
    return bool(reasoning or delta.content or delta.tool_calls)


def _without_oldest(turns: list[ChatTurn]) -> list[ChatTurn]:
    """The turns from the second question on; [] if there is only one question."""
    later = [i for i, turn in enumerate(turns) if turn.role == "user" and i > 0]
    return turns[later[0] :] if later else []


LANGUAGES = {"en": "English", "zh": "中文"}

TEXT: dict[str, tuple[str, str]] = {
    "tagline": ("A small model, trained from scratch, on this machine.", "从零训练的小模型，就在这台机器上运行。"),
    "ask": ("Ask MiniMind anything", "向 MiniMind 提问"),
    "try": ("Try one of these", "试试这些问题"),
    "language": ("Language", "语言"),
    "model": ("Model", "模型"),
    "new": ("New chat", "新对话"),
    "stop": ("Stop", "停止"),
    "sampling": ("Sampling", "采样"),
    "temperature": ("Temperature", "温度"),
    "temperature_help": ("0 takes the likeliest token", "0 表示总取最可能的词元"),
    "top_p": ("Top p", "Top p"),
    "top_p_help": (
        "sample from the smallest set of tokens with this probability",
        "只在概率之和达到该值的最小集合中采样",
    ),
    "repetition": ("Repetition penalty", "重复惩罚"),
    "repetition_help": ("above 1, tokens that have occurred become less likely", "大于 1 时，出现过的词更不易再出现"),
    "max_tokens": ("Longest answer, tokens", "回答长度上限（词元）"),
    "seed": ("Seed", "随机种子"),
    "seed_help": (
        "the same seed gives the same answer; empty: a new answer each time",
        "相同种子得到相同回答；留空则每次不同",
    ),
    "thinking": ("Thinking", "思考"),
    "auto": ("Auto", "自动"),
    "on": ("On", "开"),
    "off": ("Off", "关"),
    "system": ("System message", "系统提示词"),
    "tools": ("Tools", "工具"),
    "tools_asked": ("Run here, after you allow it", "在此运行，每次先征得同意"),
    "tools_unasked": ("Run here, without asking", "在此运行，不再询问"),
    "run": ("Run", "运行"),
    "refuse": ("Do not run", "不运行"),
    "tools_on": ("Offer tools whose results you write", "提供由你填写结果的工具"),
    "tools_json": ("JSON list in OpenAI's form", "JSON 列表，格式同 OpenAI"),
    "thinking_now": ("Thinking", "思考中"),
    "thought": ("Thought for {:.1f} s", "思考了 {:.1f} 秒"),
    "calls": ("Calls {}", "调用 {}"),
    "result_of": ("Result of {}", "{} 的结果"),
    "send_result": ("Send", "发送"),
    "result": ("Result", "结果"),
    "stopped": ("stopped", "已停止"),
    "cut": ("cut off at the longest answer", "已到长度上限"),
    "dropped": ("the oldest {} rounds no longer fit", "最早的 {} 轮已放不下"),
    "figures": ("{} tokens, the first in {:.0f} ms", "{} 个词元，首词元 {:.0f} 毫秒"),
    "rate": ("{:.0f} tokens/s", "{:.0f} 词元/秒"),
    "unreachable": ("No server answers at {}. Start one: minimind serve", "{} 没有服务响应。请启动：minimind serve"),
    "refused": ("The server at {} refused the request: {}", "{} 的服务拒绝了请求：{}"),
}

SUGGESTIONS = {
    "en": ("Who are you?", "What is the capital of France?", "What is 8 + 6?", "What is horse in Chinese?"),
    "zh": ("你是谁？", "“火”的英文是什么？", "法国的首都是哪里？", "8加6等于多少？"),
}


def text(name: str, language: str, *values: object) -> str:
    return TEXT[name][list(LANGUAGES).index(language)].format(*values)
