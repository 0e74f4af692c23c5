"""Rewards that judge an answer by rules: its form and length, a reference answer, JSON, and calls of tools.

Each is in 0..1, where 1 is right, except `overlong`, a penalty in -1..0. The rewards that check content (number, exact,
json, tools) look at the answer only: the text after the reasoning, or inside <answer>...</answer> if there is one.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import Any, Literal

import numpy as np

from minimind.tokenization.chat_template import parse_messages
from minimind.tokenization.reasoning import parse_answer, parse_reply


@dataclass(frozen=True)
class Sample:
    """A prompt and one sampled answer, the input of every reward.

    prompt: the messages before the answer; the system message may carry "tools". text: the answer with its reasoning
    and markup, without the token that ends the turn; it begins with <think> if the prompt ended with that. token_ids:
    the tokens that the model generated. finish_reason: "length" if the answer was cut off. reference: the right answer,
    if the prompt has one. metadata: the other columns of the data's row, for custom rewards. thinking: True if the
    prompt asked for reasoning, False if it asked for none, None if it left the choice to the model.
    """

    prompt: Sequence[Mapping[str, Any]]
    text: str
    token_ids: Sequence[int] = ()
    finish_reason: Literal["stop", "length"] = "stop"
    reference: str | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)
    thinking: bool | None = None


Reward = Callable[[Sequence[Sample]], np.ndarray]
"""samples -> float64 [n], one number per sample; NaN if a sample could not be judged."""


_MARKERS = {"think": ("<think>", "</think>"), "answer": ("<think>", "</think>", "<answer>", "</answer>")}


def each(judge: Callable[[Sample], float]) -> Reward:
    """Make a reward from a function of one sample."""

    def reward(samples: Sequence[Sample]) -> np.ndarray:
        return np.array([judge(sample) for sample in samples], np.float64)

    return reward


def format_reward(kind: str = "think") -> Reward:
    """1 for a reply of the right form in which no part is empty; else half the share of markers that occur exactly
    once, which guides a model that uses none of them yet.

    think: <think>reasoning</think>, then the answer. answer: the same, with the answer in <answer>...</answer>. If the
    prompt asked for no reasoning: 1 for an answer without any marker, else 0.
    """
    if kind not in _MARKERS:
        raise ValueError(f"format={kind}: choose think or answer")
    markers = _MARKERS[kind]

    def judge(sample: Sample) -> float:
        if sample.thinking is False:
            plain = parse_answer(sample.text)
            return float(plain is not None and plain.answer != "")
        reply = parse_reply(sample.text)
        wrapped = kind == "think" or sample.text.rstrip().endswith("</answer>")
        if reply is not None and reply.reasoning and reply.answer and wrapped:
            return 1.0
        return 0.5 * sum(sample.text.count(marker) == 1 for marker in markers) / len(markers)

    return each(judge)


@dataclass(frozen=True)
class Range:
    """A range of whole numbers, such as "20..200"; "..200" starts at 0."""

    low: int
    high: int

    @staticmethod
    def parse(name: str, text: str) -> Range:
        match = re.fullmatch(r"(\d*)\.\.(\d+)", text)
        if match is None or int(match[1] or 0) >= int(match[2]):
            raise ValueError(f"{name}={text}: write LOW..HIGH with numbers of tokens, such as {name}=20..200")
        return Range(int(match[1] or 0), int(match[2]))


def length_reward(bounds: str) -> Reward:
    """1 for answers of LOW..HIGH tokens. A shorter answer gets tokens / LOW; above HIGH the reward falls linearly to 0
    at twice HIGH."""
    limits = Range.parse("length", bounds)

    def judge(sample: Sample) -> float:
        tokens = len(sample.token_ids)
        if tokens < limits.low:
            return tokens / limits.low
        return float(np.clip(2 - tokens / limits.high, 0, 1))

    return each(judge)


def overlong_penalty(bounds: str) -> Reward:
    """0 up to LOW tokens, then linearly down to -1 at HIGH, -1 beyond: DAPO's soft overlong punishment (2503.14476),
    whose cache is LOW..HIGH."""
    limits = Range.parse("overlong", bounds)
    room = limits.high - limits.low
    return each(lambda sample: float(np.clip((limits.low - len(sample.token_ids)) / room, -1, 0)))


def repetition_reward(size: str = "3") -> Reward:
    """Number of distinct token n-grams / number of all in an answer: 1 if none repeats or the answer is shorter than
    n."""
    if not size.isdigit() or int(size) < 1:
        raise ValueError(f"repetition={size}: give the length of the n-grams, a whole number above 0")
    n = int(size)

    def judge(sample: Sample) -> float:
        ids = tuple(sample.token_ids)
        grams = [ids[i : i + n] for i in range(len(ids) - n + 1)]
        return len(set(grams)) / len(grams) if grams else 1.0

    return each(judge)


def regex_reward(pattern: str) -> Reward:
    """1 if Python's regular expression matches anywhere in the answer (without flags), else 0."""
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise ValueError(f"regex={pattern}: not a regular expression ({error})") from None
    return each(lambda sample: float(compiled.search(sample.text) is not None))


# A minus after a digit or letter is not a sign: "7-3" ends in 3. Commas separate thousands: "1,234.5".
# A minus after a letter or a digit is a hyphen or a difference; after a Chinese character it is a sign.
_NUMBER = re.compile(
    r"(?<![\d.])(?:(?<![^\W\u4e00-\u9fff])[-+−])?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?(?:\s*/\s*\d+)?%?"
)
_CALL = re.compile(r"<tool_call>(.*?)</tool_call>", re.DOTALL)
_TYPES: dict[str, Any] = {
    "string": str,
    "number": (int, float),
    "integer": int,
    "boolean": bool,
    "array": list,
    "object": dict,
    "null": type(None),
}


def final_answer(text: str) -> str:
    """The content of the last <answer>...</answer>, else the text after the last </think>; "" if the reply was cut off
    within its reasoning."""
    wrapped = re.findall(r"<answer>(.*?)</answer>", text, re.DOTALL)
    if wrapped:
        return wrapped[-1].strip()
    _, marker, after = text.rpartition("</think>")
    if marker:
        return after.strip()
    return "" if "<think>" in text else text.strip()


def answer_only(reward: Reward) -> Reward:
    """Apply `reward` to each sample's final_answer instead of its whole text."""

    def reward_answers(samples: Sequence[Sample]) -> np.ndarray:
        return reward([replace(sample, text=final_answer(sample.text)) for sample in samples])

    return reward_answers


def number_reward() -> Reward:
    """1 if the last number of the answer equals the last number of the reference exactly, else 0. 0.5, 1/2 and 50% are
    equal, and so are 1,000 and 1000. ValueError for a sample whose reference has no number."""

    def judge(sample: Sample) -> float:
        expected = last_number(_reference(sample))
        if expected is None:
            raise ValueError(f"the reference {sample.reference!r} contains no number")
        return float(last_number(final_answer(sample.text)) == expected)

    return each(judge)


def last_number(text: str) -> Fraction | None:
    """The last number in a text, exactly; None if there is none, or if it divides by 0."""
    numbers = _NUMBER.findall(text)
    if not numbers:
        return None
    digits = numbers[-1].replace(",", "").replace("−", "-").replace("+", "")
    numerator, _, denominator = digits.removesuffix("%").partition("/")
    try:
        value = Fraction(numerator.strip()) / Fraction(denominator.strip() or 1)
    except ZeroDivisionError:
        return None
    return value / 100 if digits.endswith("%") else value


def exact_reward() -> Reward:
    """1 if the answer equals the reference, ignoring case, spaces and a final full stop, else 0."""
    return each(lambda sample: float(_normalized(final_answer(sample.text)) == _normalized(_reference(sample))))


def json_reward(keys: str = "") -> Reward:
    """1 if the answer, or a fenced block in it, is JSON. keys "a,b": the JSON must be an object, and the reward is the
    share of these keys that it has."""
    required = [key.strip() for key in keys.split(",") if key.strip()]

    def judge(sample: Sample) -> float:
        try:
            value = parse_json(_unfenced(final_answer(sample.text)))
        except ValueError:
            return 0.0
        if not required:
            return 1.0
        return sum(key in value for key in required) / len(required) if isinstance(value, dict) else 0.0

    return each(judge)


def tools_reward() -> Reward:
    """The share of an answer's <tool_call>s that are valid: {"name": ..., "arguments": {...}} of a tool that the
    prompt's system message offers, with arguments that fit its schema. 0 if a tag of a call has no partner. An answer
    without a call gets 1 if no tool is offered, and 0 if one is."""

    def judge(sample: Sample) -> float:
        tools = offered_tools(sample.prompt)
        text = sample.text.rpartition("</think>")[2]
        calls = _CALL.findall(text)
        rest = _CALL.sub("", text)
        if "<tool_call>" in rest or "</tool_call>" in rest:
            return 0.0
        if not calls:
            return float(not tools)
        return sum(_is_valid_call(call, tools) for call in calls) / len(calls)

    return each(judge)


def offered_tools(prompt: Sequence[Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    """The tools in the system message, in either common form: {name: JSON schema of its arguments}."""
    tools: dict[str, Mapping[str, Any]] = {}
    for message in parse_messages(prompt):
        for tool in message.get("tools") or []:
            function = tool.get("function", tool)
            tools[function["name"]] = function.get("parameters") or {}
    return tools


def parse_json(text: str) -> Any:
    """Parse strict JSON. ValueError for anything else, including NaN and Infinity, and for nesting that is too deep."""

    def reject(name: str) -> Any:
        raise ValueError(f"{name} is not JSON")

    try:
        return json.loads(text, parse_constant=reject)
    except RecursionError:
        raise ValueError("nested too deep") from None


def _is_valid_call(text: str, tools: Mapping[str, Mapping[str, Any]]) -> bool:
    try:
        call = parse_json(text)
    except ValueError:
        return False
    if not isinstance(call, dict) or call.get("name") not in tools or set(call) - {"name", "arguments"}:
        return False
    schema = {"type": "object"} | dict(tools[call["name"]])
    return fits(call.get("arguments", {}), schema)


def fits(value: Any, schema: Mapping[str, Any]) -> bool:
    """Whether a JSON value fits a schema, as far as `misfit` reads it."""
    return misfit(value, schema) is None


def misfit(value: Any, schema: Mapping[str, Any], what: str = "it") -> str | None:
    """Why a JSON value does not fit a schema, None if it fits. what: the value's name in the message. The keywords
    type, enum, properties, required, additionalProperties and items are checked, others ignored. A property that the
    schema does not name is an error, unless the schema allows additional ones."""
    if not isinstance(schema, Mapping):
        return None  # true: anything
    kinds = schema.get("type", [])
    kinds = [kinds] if isinstance(kinds, str) else kinds
    if kinds and not any(_has_type(value, kind) for kind in kinds):
        return f"{what} must be of type {' or '.join(kinds)}"
    if "enum" in schema and value not in schema["enum"]:
        return f"{what} must be one of {', '.join(map(str, schema['enum']))}"
    if isinstance(value, list) and "items" in schema:
        return next((wrong for item in value if (wrong := misfit(item, schema["items"], f"each of {what}"))), None)
    if not isinstance(value, dict):
        return None
    missing = [name for name in schema.get("required", []) if name not in value]
    if missing:
        return f"{what} lack {', '.join(missing)}"
    if "properties" not in schema:
        return None
    properties = schema["properties"]
    if set(value) - set(properties) and not schema.get("additionalProperties", False):
        return f"{what} may only hold {', '.join(properties)}"
    known = [(name, item) for name, item in value.items() if name in properties]
    return next((wrong for name, item in known if (wrong := misfit(item, properties[name], name))), None)


def _has_type(value: Any, kind: str) -> bool:
    if isinstance(value, bool) and kind in ("number", "integer"):
        return False
    if kind == "integer" and isinstance(value, float):
        return value.is_integer()
    return isinstance(value, _TYPES.get(kind, object))


def _unfenced(text: str) -> str:
    block = re.search(r"```(?:json)?\s*\n(.*?)```", text, re.DOTALL)
    return block[1] if block else text


def _normalized(text: str) -> str:
    return " ".join(text.split()).rstrip(".。").casefold()


def _reference(sample: Sample) -> str:
    if sample.reference is None:
        raise ValueError("the prompt has no reference answer")
    return sample.reference
