"""Prompts that are too long: what may go from their beginning so that what is left is still a conversation.

First go whole exchanges, a question with all that answers it; of the first one that stays, the beginning of the
question. System messages, headers and end tokens stay, and so does the last question's end.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np


class Exchange(NamedTuple):
    """Characters of a rendered prompt: where a user's message begins, header and all, and its content's first and
    last + 1."""

    begin: int
    first: int
    last: int


def exchanges(
    render: Callable[[list[dict[str, Any]]], str], messages: list[dict[str, Any]]
) -> tuple[str, list[Exchange]]:
    """(the rendered prompt, its exchanges); none where the template does not render it message by message."""
    text = render(messages)
    found: list[Exchange] = []
    for k, message in enumerate(messages):
        if message["role"] != "user":
            continue
        before, after = render(messages[:k]) if k else "", render(messages[: k + 1])
        content = (message.get("content") or "").strip()
        first = text.rfind(content, len(before), len(after))
        if not content or first < 0 or not (text.startswith(after) and after.startswith(before)):
            return text, []
        found.append(Exchange(len(before), first, first + len(content)))
    if len(found) > 1 and found[0].begin == 0:  # what a template says before the first message stays
        header = text[found[1].begin : found[1].first]
        if not text.endswith(header, 0, found[0].first):
            return text, []
        found[0] = found[0]._replace(begin=found[0].first - len(header))
    return text, found


def kept(spans: Sequence[Exchange], begins: np.ndarray, ends: np.ndarray, excess: int) -> np.ndarray | None:
    """bool [tokens]: all but `excess` tokens or a few more, of tokens that cover the characters begins..ends; None
    where not so many can go."""
    keep = np.ones(len(begins), bool)
    for i, (begin, first, last) in enumerate(spans):
        content = np.flatnonzero((begins >= first) & (ends <= last))
        count = excess
        while count < len(content) and begins[content[count]] < ends[content[count] - 1]:
            count += 1  # not within a character of several tokens
        if count < len(content):
            keep[content[:count]] = False
            return keep
        if i + 1 == len(spans):
            return None
        gone = (begins >= begin) & (ends <= spans[i + 1].begin)
        keep[gone] = False
        excess -= int(gone.sum())
        if excess <= 0:
            return keep
    return None
