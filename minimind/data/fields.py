"""What rows and messages may hold beside the text: every field is used, is known to mean nothing, or is an error.

Of a row: "tools", the functions on offer, and "system", the system message's words, both as if the first message said
them. Of a message: whether the assistant's words in it are learnt, in the spellings of

    weight 0 or 1               OpenAI's fine-tuning API, and those that follow it (Mistral, Together)
    train, training, train_on_turn
                                axolotl, whose message_field_training names the field
    loss                        ChatGLM3, ms-swift, XTuner, AgentGym's data
    loss_mask                   verl and StepFun's data; beside the messages, a list with a number for each of them:
                                LLaMA-Factory's pull request 9630
    trainable                   verl's pull request 5472
    masked                      torchtune, where true means that it is not learnt

each a boolean, 0 or 1. trl has none: it learns the "completion" behind a "prompt" alone, which --format messages reads.
null, "", [] and {} say nothing, as if the field were not there.
"""

import json
from collections.abc import Collection
from typing import Any

from minimind.data.records import kind_of

VERSION = 1  # of the rules below, for the token cache
ROLES = ("system", "user", "assistant", "tool")
LEARNT = "train"  # False in a message of ours that is not learnt; else it is not there
# The spellings, and what a true value says of the message.
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
# Fields about a row that say nothing to a model; docs/data.md has the list for readers.
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
    """ValueError for a field of a row that is neither among `used` nor known to mean nothing."""
    for name, value in row.items():
        if name not in used and name.lower() not in HARMLESS and not is_empty(value):
            raise ValueError(f"field {_lost(name)}")


def is_empty(value: Any) -> bool:
    """Whether a field says nothing; 0 and false do say something."""
    return value is None or value == "" or value == [] or value == {}


def messages_of(row: dict[str, Any], field: str) -> Messages:
    """The messages in a row's `field`; ValueError says which is malformed and how."""
    messages = listed(row, field)
    if not messages:
        raise ValueError(f'field "{field}" is empty')
    for number, message in enumerate(messages):
        _check_message(number, message)
    return messages


def listed(row: dict[str, Any], field: str) -> list[Any]:
    """The list in a row's `field`; ValueError where there is none."""
    if field not in row:
        raise ValueError(f'no field "{field}" (fields: {", ".join(list(row)[:4])[:80] or "none"})')
    if not isinstance(row[field], list):
        raise ValueError(f'field "{field}" is {kind_of(row[field])}, not a list of messages')
    return row[field]


def cleaned(messages: Messages, ignored: Collection[str] = ()) -> Messages:
    """The messages without `ignored` fields and with LEARNT for whatever says that one is not learnt. ValueError for a
    field that would be lost, and for flags that contradict each other or that nothing follows from."""
    return [_cleaned(number, message, ignored) for number, message in enumerate(messages)]


def with_row_fields(messages: Messages, row: dict[str, Any]) -> Messages:
    """The messages with the row's "system", "tools" and "loss_mask" in them. ValueError where a message says another
    thing than the row."""
    system, tools = row.get("system"), row.get("tools")
    if not is_empty(row.get("loss_mask")):
        messages = _masked(messages, row["loss_mask"])
    if is_empty(system) and is_empty(tools):
        return messages
    if system is not None and not isinstance(system, str):
        raise ValueError(f'field "system" is {kind_of(system)}, not a string')
    begins = bool(messages) and messages[0]["role"] == "system"
    first = dict(messages[0]) if begins else {"role": "system", "content": ""}
    said: list[tuple[str, str, Any]] = [("system", "content", system), ("tools", "tools", tools)]
    for field, name, value in said:
        if is_empty(value):
            continue
        if not is_empty(first.get(name)) and _plain(first[name]) != _plain(value):
            raise ValueError(f'field "{field}" is not what the system message says; keep one of them')
        first[name] = value
    return [first, *messages[begins:]]


def _lost(name: str) -> str:
    return f'"{name}" is not known and would be lost; --ignore-fields {name} leaves it out (docs/data.md)'


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
    if not _learnt(number, message):
        kept[LEARNT] = False
    return kept


def _learnt(number: int, message: dict[str, Any]) -> bool:
    said = {}
    for name, meaning in FLAGS.items():
        value = message.get(name)
        if is_empty(value):
            continue
        if not isinstance(value, (bool, int, float)) or value not in (0, 1):
            raise ValueError(f'message {number}: "{name}" is {json.dumps(value)[:20]}, not 0, 1, false or true')
        said[name] = bool(value) is meaning
    if len(set(said.values())) > 1:
        raise ValueError(f"message {number}: {' and '.join(said)} contradict each other")
    learnt = next(iter(said.values()), True)
    if said and learnt and message.get("role") != "assistant":
        raise ValueError(
            f'message {number}, of the {message.get("role")}: "{next(iter(said))}" asks to learn it, and only what the '
            "assistant says is learnt"
        )
    return learnt or message.get("role") != "assistant"


def _masked(messages: Messages, mask: Any) -> Messages:
    """The messages with those left out of the loss whose number in `mask` is 0; others' than the assistant's say
    nothing, as LLaMA-Factory has them."""
    if not isinstance(mask, list) or len(mask) != len(messages):
        raise ValueError(f'field "loss_mask" is no list of {len(messages)} numbers, one for each message')
    said = []
    for number, (message, value) in enumerate(zip(messages, mask, strict=True)):
        if message["role"] == "assistant":
            _learnt(number, message | {"loss_mask": value})
            message = {**message, LEARNT: False} if value is not None and not value else message
        said.append(message)
    return said


def _plain(value: Any) -> Any:
    """Tools as a value, also where they are a string of JSON."""
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
    said = (content, reasoning, message.get("tool_calls"))
    if role in ("user", "assistant") and not any(part and not _blank(part) for part in said):
        raise ValueError(f"message {number}, of the {role}, is empty")


def _blank(part: Any) -> bool:
    return isinstance(part, str) and part.isspace()
