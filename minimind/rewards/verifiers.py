"""Rewards that check an answer: against the right one, as JSON, as calls of the tools that the prompt offers.

Only the answer counts, what stands behind the reasoning and in <answer>...</answer> where there is one. Every reward
lies in 0..1.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from fractions import Fraction
from typing import Any

import numpy as np

from minimind.rewards.base import Reward, Sample
from minimind.rewards.rules import each
from minimind.tokenization.chat_template import parse_messages

# A sign is one only where no digit or letter stands before it: "7-3" ends in 3. Commas are of thousands: "1,234.5".
_NUMBER = re.compile(r"(?<![\d.])(?:(?<!\w)[-+−])?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?(?:\s*/\s*\d+)?%?")
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
    """What an answer says in the end: the last <answer>...</answer>, or else what follows the last </think>; of a
    reply that was cut off in its reasoning, nothing."""
    wrapped = re.findall(r"<answer>(.*?)</answer>", text, re.DOTALL)
    if wrapped:
        return wrapped[-1].strip()
    _, marker, after = text.rpartition("</think>")
    if marker:
        return after.strip()
    return "" if "<think>" in text else text.strip()


def answer_only(reward: Reward) -> Reward:
    """`reward` of samples whose text is their final_answer, which of one that was cut off in its reasoning is empty."""

    def of_answers(samples: Sequence[Sample]) -> np.ndarray:
        return reward([replace(sample, text=final_answer(sample.text)) for sample in samples])

    return of_answers


def number_reward() -> Reward:
    """1 where the last number of the answer is the last one of the reference, exactly, else 0. 0.5, 1/2 and 50% are one
    number, and so are 1,000 and 1000. ValueError for a sample whose reference has none."""

    def judge(sample: Sample) -> float:
        right = last_number(_reference(sample))
        if right is None:
            raise ValueError(f"the reference {sample.reference!r} holds no number")
        return float(last_number(final_answer(sample.text)) == right)

    return each(judge)


def last_number(text: str) -> Fraction | None:
    """The last number in a text, exactly; None where there is none, or it divides by 0."""
    found = _NUMBER.findall(text)
    if not found:
        return None
    digits = found[-1].replace(",", "").replace("−", "-").replace("+", "")
    numerator, _, denominator = digits.removesuffix("%").partition("/")
    try:
        value = Fraction(numerator.strip()) / Fraction(denominator.strip() or 1)
    except ZeroDivisionError:
        return None
    return value / 100 if digits.endswith("%") else value


def exact_reward() -> Reward:
    """1 where the answer is the reference, whatever its case, spaces and last full stop, else 0."""
    return each(lambda sample: float(_plain(final_answer(sample.text)) == _plain(_reference(sample))))


def json_reward(keys: str = "") -> Reward:
    """1 for an answer that is JSON, a fenced block or all of it. keys "a,b": an object is asked for, and the reward is
    the share of these keys that it has; 0 for other JSON."""
    wanted = [key.strip() for key in keys.split(",") if key.strip()]

    def judge(sample: Sample) -> float:
        try:
            value = parse_json(_unfenced(final_answer(sample.text)))
        except ValueError:
            return 0.0
        if not wanted:
            return 1.0
        return sum(key in value for key in wanted) / len(wanted) if isinstance(value, dict) else 0.0

    return each(judge)


def tools_reward() -> Reward:
    """The share of an answer's <tool_call>s that are {"name": ..., "arguments": {...}} of a tool that the prompt's
    system message offers, with arguments that fit its schema; 0 where a mark of a call is left over. An answer without
    a call is right where no tool is on offer, and wrong where one is."""

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
    """JSON schema of the arguments by name of each tool that the system message carries, in either common form."""
    tools: dict[str, Mapping[str, Any]] = {}
    for message in parse_messages(prompt):
        for tool in message.get("tools") or []:
            function = tool.get("function", tool)
            tools[function["name"]] = function.get("parameters") or {}
    return tools


def parse_json(text: str) -> Any:
    """ValueError also for what is no JSON but Python would take, and for what is nested too deep."""

    def refuse(name: str) -> Any:
        raise ValueError(f"{name} is not JSON")

    try:
        return json.loads(text, parse_constant=refuse)
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
    """Whether a JSON value fits a schema's type, enum, properties, required, additionalProperties and items, which is
    what tools use; other words of JSON Schema allow everything. A property that an object's schema does not name is
    refused unless it allows more: a made-up argument is an error."""
    kinds = schema.get("type", [])
    kinds = [kinds] if isinstance(kinds, str) else kinds
    if kinds and not any(_is_of(value, kind) for kind in kinds):
        return False
    if "enum" in schema and value not in schema["enum"]:
        return False
    if isinstance(value, list) and "items" in schema:
        return all(fits(item, schema["items"]) for item in value)
    if not isinstance(value, dict):
        return True
    if any(name not in value for name in schema.get("required", [])):
        return False
    if "properties" not in schema:
        return True
    properties = schema["properties"]
    if set(value) - set(properties) and not schema.get("additionalProperties", False):
        return False
    return all(fits(item, properties[name]) for name, item in value.items() if name in properties)


def _is_of(value: Any, kind: str) -> bool:
    if isinstance(value, bool) and kind in ("number", "integer"):
        return False
    if kind == "integer" and isinstance(value, float):
        return value.is_integer()
    return isinstance(value, _TYPES.get(kind, object))


def _unfenced(text: str) -> str:
    found = re.search(r"```(?:json)?\s*\n(.*?)```", text, re.DOTALL)
    return found[1] if found else text


def _plain(text: str) -> str:
    return " ".join(text.split()).rstrip(".。").casefold()


def _reference(sample: Sample) -> str:
    if sample.reference is None:
        raise ValueError("the prompt has no reference answer to check against")
    return sample.reference
