"""Replies with reasoning: parse them, and encode conversations and prompts with or without it.

A reply is <think>reasoning</think> followed by the answer, which upstream's data puts into <answer>...</answer>. The
chat template's variable enable_thinking opens the reasoning in the prompt (true), adds an empty block (false), or
leaves the choice to the model (not set).
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from minimind.tokenization.chat_encoder import MARKERS, ChatEncoder, TemplatePiece
from minimind.tokenization.chat_template import Message
from minimind.tokenization.tokenizer import Tokenizer

_FORMAT_VERSION = 1
_REASONED = re.compile(r"<think>(.*?)</think>\s*(?:<answer>(.*?)</answer>|(.*))", re.DOTALL)


@dataclass(frozen=True)
class SplitReply:
    """The reasoning ("" for none) and the answer of a reply, without markers and surrounding space."""

    reasoning: str
    answer: str


def parse_reply(text: str) -> SplitReply | None:
    """The parts of a reply with reasoning, which must begin with <think>. None if a marker is missing, misplaced or
    repeated. Either part may be empty."""
    match = _REASONED.fullmatch(text.rstrip())
    if match is None:
        return None
    reasoning, wrapped, plain = match.groups()
    answer = plain if wrapped is None else wrapped
    if _has_marker(reasoning) or _has_marker(answer):
        return None
    return SplitReply(reasoning.strip(), answer.strip())


def parse_answer(text: str) -> SplitReply | None:
    """A reply without reasoning; None if it has a marker."""
    return None if _has_marker(text) else SplitReply("", text.strip())


def prompt_endings(tokenizer: Tokenizer) -> dict[str, str]:
    """The text after the assistant's header in the generation prompt: for "auto" (enable_thinking not set), "on" and
    "off". Only "auto" if the template does not use enable_thinking."""
    question = [{"role": "user", "content": "?"}]
    auto = tokenizer.apply_chat_template(question, add_generation_prompt=True)
    endings = {"auto": ""}
    for name, value in (("on", True), ("off", False)):
        text = tokenizer.apply_chat_template(question, add_generation_prompt=True, enable_thinking=value)
        if text.startswith(auto) and text != auto:
            endings[name] = text[len(auto) :]
    return endings


class ReasoningEncoder(ChatEncoder):
    """A ChatEncoder for conversations with reasoning. Removes the reasoning from a share of them, to train
    enable_thinking=false.

    direct: the share, chosen by a hash of the conversation. In these the empty reasoning block before the answer is
    part of the prompt and not trained on. The others are trained on as they are.

    Raises ValueError for a share outside 0 to 1, or above 0 if the template does not use enable_thinking. `pieces` also
    raises it for a reply with a missing, misplaced or repeated marker, and for reasoning without an answer.
    """

    def __init__(self, tokenizer: Tokenizer, direct: float) -> None:
        super().__init__(tokenizer)
        if not 0 <= direct <= 1:
            raise ValueError(f"--direct {direct:g}: must be a share from 0 to 1")
        self.direct = direct
        self._without = ChatEncoder(tokenizer, enable_thinking=False)
        self._block = prompt_endings(tokenizer).get("off", "")
        if direct and not self._block:
            raise ValueError(f"--direct {direct:g}: the chat template does not know enable_thinking; use --direct 0")

    @cached_property
    def fingerprint(self) -> str:
        parts = ["reasoning", _FORMAT_VERSION, super().fingerprint, self._without.fingerprint, self.direct]
        return hashlib.sha256(repr(parts).encode()).hexdigest()

    def pieces(self, messages: Sequence[Message]) -> list[TemplatePiece]:
        bare = [_without_reasoning(number, message) for number, message in enumerate(messages)]
        if not picks(messages, self.direct):
            return super().pieces(messages)
        out: list[TemplatePiece] = []
        for piece in self._without.pieces(bare):
            begins = piece.trained and not (out and out[-1].trained)
            if begins and piece.text.startswith(self._block):
                out.append(replace(piece, text=self._block, trained=False))
                piece = replace(piece, text=piece.text[len(self._block) :])
            out += [piece] if piece.text else []
        return out


class ThinkingPrompts:
    """Encodes prompts; a share of them, chosen by a hash of the conversation, ask for reasoning, the others for none.

    share: None leaves the choice to the model, with enable_thinking not set. Raises ValueError if there is a share and
    the template does not use enable_thinking.
    """

    def __init__(self, tokenizer: Tokenizer, share: float | None) -> None:
        self.share = share
        self._plain = ChatEncoder(tokenizer)
        self._endings = prompt_endings(tokenizer) if share is not None else {}
        if share is not None and not {"on", "off"} <= self._endings.keys():
            raise ValueError(f"--thinking {share:g}: the chat template does not know enable_thinking; remove the flag")
        self._asking = {value: ChatEncoder(tokenizer, enable_thinking=value) for value in (True, False)}

    @cached_property
    def fingerprint(self) -> str:
        if self.share is None:
            return self._plain.fingerprint
        parts = [self._asking[True].fingerprint, self._asking[False].fingerprint, self.share]
        return hashlib.sha256(repr(parts).encode()).hexdigest()

    def thinking(self, messages: Sequence[Message]) -> bool | None:
        """Whether this conversation's prompt asks for reasoning; None if the model chooses."""
        return None if self.share is None else picks(messages, self.share)

    def opening(self, messages: Sequence[Message]) -> str:
        """The beginning of the reply that the prompt already contains: "<think>" and a newline, or nothing."""
        return self._endings["on"] if self.thinking(messages) else ""

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        """Token ids of the prompt, up to the model's first token."""
        thinking = self.thinking(messages)
        encoder = self._plain if thinking is None else self._asking[thinking]
        return encoder.prompt(messages)


def picks(messages: Sequence[Message], share: float) -> bool:
    """Whether a conversation belongs to a `share` of all, by a hash. The hash is personalized, since data sorted by a
    plain hash would have the whole share at its beginning."""
    text = json.dumps(list(messages)).encode()
    digest = hashlib.blake2b(text, digest_size=8, person=b"reasoning").digest()
    return int.from_bytes(digest, "big") < share * 2**64


def _without_reasoning(number: int, message: Message) -> dict[str, Any]:
    """The message without its reasoning. Raises ValueError for a malformed reply of the assistant."""
    if message.get("role") != "assistant":
        return dict(message)
    reasoning, content = message.get("reasoning_content") or "", message.get("content") or ""
    text = f"<think>{reasoning}</think>{content}" if reasoning else content
    if not _has_marker(text):
        return dict(message)
    reply = parse_reply(text)
    if reply is None:
        raise ValueError(
            f"message {number}, of the assistant, is not <think>reasoning</think> and an answer with each marker once"
        )
    if not reply.answer and not message.get("tool_calls"):
        raise ValueError(f"message {number}, of the assistant, has no answer after its reasoning")
    return {k: v for k, v in message.items() if k != "reasoning_content"} | {"content": reply.answer}


def _has_marker(text: str) -> bool:
    return any(marker in text for marker in MARKERS)
