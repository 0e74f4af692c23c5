"""Check the fields of rows and messages: every field is used, known to be harmless, or an error.

A row may have "tools", a list of functions, and "system", the system prompt; both become part of the first message. A
message may have a flag that says whether it is trained on, a boolean, 0 or 1:

    weight 0 or 1               OpenAI's fine-tuning API, Mistral, Together
    train, training, train_on_turn
                                axolotl, whose message_field_training names the field
    loss                        ChatGLM3, ms-swift, XTuner, AgentGym's data
    loss_mask                   verl and StepFun's data; as a field of the row, a list with a number for each message:
                                LLaMA-Factory's pull request 9630
    trainable                   verl's pull request 5472
    masked                      torchtune, where true means that it is not trained on

trl has no flag: it trains on the "completion" after a "prompt", which --format messages reads. A field that is null,
"", [] or {} counts as missing.
"""

import json
from collections.abc import Collection
from typing import Any

VERSION = 1  # of the rules below; part of the key of the token cache
ROLES = ("system", "user", "assistant", "tool")
TRAIN = "train"  # False in a message that is not trained on; otherwise missing
# The flags, and whether a true value means that the message is trained on.
FLAGS = {
    "weight": True,
    "train": True,
    "training": True,
    "train_on_turn": True,
    "loss": True,
    "loss_mask": True,
    "trainable": True,
    "masked": False,
}
# Metadata of a row, which no model reads; docs/data.md lists them.
_NAMES = """
id name _id uid uuid guid idx index key hash md5 sha1 sha256 __index_level_0__ row_id doc_id document_id sample_id
conversation_id conv_id prompt_id question_id message_id session_id thread_id parent_id user_id
source sources dataset dataset_name data_source subset split origin author authors license copyright publisher
model model_name generator annotator annotations url uri link domain dump file file_path filename path repo
repo_name warc_path
category categories type task task_type task_name topic topics subject tag tags keywords genre difficulty
title language lang language_score lang_score locale
date time timestamp created created_at updated_at year version
score scores score_chosen score_rejected chosen_score rejected_score quality rating ratings rank likes
length num_tokens n_tokens token_count tokens_count text_length text_token_length char_count word_count num_turns
meta metadata info extra comment comments note notes status parallel_tool_calls
"""
HARMLESS = frozenset(_NAMES.split())
_OF_MESSAGES = ("role", "content", "name", "tool_call_id")
_OWNERS = {"tools": "system", "reasoning_content": "assistant", "tool_calls": "assistant"}

Messages = list[dict[str, Any]]


def check_row(row: dict[str, Any], used: Collection[str]) -> None:
    """Raise ValueError for a field of a row that is neither in `used` nor known to be harmless."""
    for name, value in row.items():
        if name not in used and name.lower() not in HARMLESS and not is_empty(value):
            raise ValueError(f"field {_lost(name)}")


def is_empty(value: Any) -> bool:
    """Whether a field counts as missing; 0 and false do not."""
    return value is None or value == "" or value == [] or value == {}


def messages_of(row: dict[str, Any], field: str) -> Messages:
    """The messages in a row's `field`. Raises ValueError if one is malformed."""
    messages = listed(row, field)
    if not messages:
        raise ValueError(f'field "{field}" is empty')
    for number, message in enumerate(messages):
        _check_message(number, message)
    return messages


def listed(row: dict[str, Any], field: str) -> list[Any]:
    """The list in a row's `field`. Raises ValueError if there is none."""
    if field not in row:
        raise ValueError(f'no field "{field}" (fields: {", ".join(list(row)[:4])[:80] or "none"})')
    if not isinstance(row[field], list):
        raise ValueError(f'field "{field}" is {kind_of(row[field])}, not a list of messages')
    return row[field]


def cleaned(messages: Messages, ignored: Collection[str] = ()) -> Messages:
    """The messages without `ignored` fields, with TRAIN in place of all training flags. Raises ValueError for an
    unknown field, contradictory flags, and a flag that asks to train on another role than the assistant."""
    return [_cleaned(number, message, ignored) for number, message in enumerate(messages)]


def with_row_fields(messages: Messages, row: dict[str, Any]) -> Messages:
    """The messages, with the row's "system", "tools" and "loss_mask" moved into them. Raises ValueError if a message
    contradicts the row."""
    system, tools = row.get("system"), row.get("tools")
    if not is_empty(row.get("loss_mask")):
        messages = _masked(messages, row["loss_mask"])
    if is_empty(system) and is_empty(tools):
        return messages
    if system is not None and not isinstance(system, str):
        raise ValueError(f'field "system" is {kind_of(system)}, not a string')
    begins = bool(messages) and messages[0]["role"] == "system"
    first = dict(messages[0]) if begins else {"role": "system", "content": ""}
    row_fields: list[tuple[str, str, Any]] = [("system", "content", system), ("tools", "tools", tools)]
    for field, name, value in row_fields:
        if is_empty(value):
            continue
        if not is_empty(first.get(name)) and _plain(first[name]) != _plain(value):
            raise ValueError(f'field "{field}" differs from the system message; keep one of them')
        first[name] = value
    return [first, *messages[begins:]]


def _lost(name: str) -> str:
    return f'"{name}" is unknown and would be lost; --ignore-fields {name} drops it (docs/data.md)'


def _cleaned(number: int, message: dict[str, Any], ignored: Collection[str]) -> dict[str, Any]:
    role = message.get("role")
    message = {name: value for name, value in message.items() if name not in ignored}
    kept = {name: value for name, value in message.items() if name not in FLAGS}
    for name, value in kept.items():
        if is_empty(value) or name in _OF_MESSAGES or name.lower() in HARMLESS:
            continue
        if name not in _OWNERS:
            raise ValueError(f"message {number}: field {_lost(name)}")
        if role not in (None, _OWNERS[name]):
            raise ValueError(f'message {number}, of the {role}: "{name}" belongs to the {_OWNERS[name]}')
    if not _trained(number, message):
        kept[TRAIN] = False
    return kept


def _trained(number: int, message: dict[str, Any]) -> bool:
    flags = {}
    for name, meaning in FLAGS.items():
        value = message.get(name)
        if is_empty(value):
            continue
        if not isinstance(value, (bool, int, float)) or value not in (0, 1):
            raise ValueError(f'message {number}: "{name}" is {json.dumps(value)[:20]}, not 0, 1, false or true')
        flags[name] = bool(value) is meaning
    if len(set(flags.values())) > 1:
        raise ValueError(f"message {number}: {' and '.join(flags)} contradict each other")
    trained = next(iter(flags.values()), True)
    if flags and trained and message.get("role") != "assistant":
        raise ValueError(
            f'message {number}, of the {message.get("role")}: "{next(iter(flags))}" asks to train on it, but only the '
            "assistant's messages are trained on"
        )
    return trained or message.get("role") != "assistant"


def _masked(messages: Messages, mask: Any) -> Messages:
    """The messages, without training on those whose number in `mask` is 0. Numbers of other roles than the assistant's
    are ignored, as in LLaMA-Factory."""
    if not isinstance(mask, list) or len(mask) != len(messages):
        raise ValueError(f'field "loss_mask" is not a list of {len(messages)} numbers, one for each message')
    masked = []
    for number, (message, value) in enumerate(zip(messages, mask, strict=True)):
        if message["role"] == "assistant":
            _trained(number, message | {"loss_mask": value})
            message = {**message, TRAIN: False} if value is not None and not value else message
        masked.append(message)
    return masked


def _plain(value: Any) -> Any:
    """The value of tools, which may be a string of JSON."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except ValueError:
        return value


def _check_message(number: int, message: Any) -> None:
    if not isinstance(message, dict):
        raise ValueError(f"message {number} is {kind_of(message)}, not an object")
    role, content = message.get("role"), message.get("content")
    if role not in ROLES:
        raise ValueError(f"message {number} has the role {role!r}; use {', '.join(ROLES)}")
    if content is not None and not isinstance(content, str):
        raise ValueError(f'message {number}: "content" is {kind_of(content)}, not a string')
    reasoning = message.get("reasoning_content")
    if reasoning is not None and not isinstance(reasoning, str):
        raise ValueError(f'message {number}: "reasoning_content" is {kind_of(reasoning)}, not a string')
    parts = (content, reasoning, message.get("tool_calls"))
    if role in ("user", "assistant") and not any(part and not _blank(part) for part in parts):
        raise ValueError(f"message {number}, of the {role}, is empty")


def _blank(part: Any) -> bool:
    return isinstance(part, str) and part.isspace()


def kind_of(value: Any) -> str:
    """The JSON type of `value`, for error messages."""
    names = {str: "a string", bool: "a boolean", list: "a list", dict: "an object", type(None): "null"}
    return names.get(type(value), "a number")
