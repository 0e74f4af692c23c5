"""Replies with reasoning in front of the answer, and how a model learns to give it when asked, and only then.

A reply is <think>reasoning</think> and the answer, which upstream's data puts into <answer>...</answer>. The chat
template's switch, enable_thinking, opens the reasoning in the prompt (true), closes it there again at once (false), or
leaves the choice to the model (not given).
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from minimind.tokenization.chat_template import Message
from minimind.tokenization.conversation import MARKERS, ChatEncoder, TemplatePiece
from minimind.tokenization.tokenizer import Tokenizer

_FORMAT_VERSION = 1
_REASONED = re.compile(r"<think>(.*?)</think>\s*(?:<answer>(.*?)</answer>|(.*))", re.DOTALL)


@dataclass(frozen=True)
class SplitReply:
    """The reasoning and the answer of a reply, without markers and the space around them; reasoning "": none."""

    reasoning: str
    answer: str


def parse_reply(text: str) -> SplitReply | None:
    """The parts of a reply with reasoning, <think> being its very beginning; None where a marker is missing, out of
    place or there twice. Either part may be empty."""
    found = _REASONED.fullmatch(text.rstrip())
    if found is None:
        return None
    reasoning, wrapped, plain = found.groups()
    answer = plain if wrapped is None else wrapped
    if _has_marker(reasoning) or _has_marker(answer):
        return None
    return SplitReply(reasoning.strip(), answer.strip())


def parse_answer(text: str) -> SplitReply | None:
    """A reply without reasoning; None where it holds a marker."""
    return None if _has_marker(text) else SplitReply("", text.strip())


def prompt_endings(tokenizer: Tokenizer) -> dict[str, str]:
    """What the generation prompt has behind the assistant's header: "auto", where enable_thinking is not given, "on"
    and "off"; only "auto" where the template does not know the switch."""
    question = [{"role": "user", "content": "?"}]
    auto = tokenizer.apply_chat_template(question, add_generation_prompt=True)
    endings = {"auto": ""}
    for name, value in (("on", True), ("off", False)):
        text = tokenizer.apply_chat_template(question, add_generation_prompt=True, enable_thinking=value)
        if text.startswith(auto) and text != auto:
            endings[name] = text[len(auto) :]
    return endings


class ReasoningEncoder(ChatEncoder):
    """Conversations with reasoning, a share of them without it, for enable_thinking=false.

    direct: that share, picked by a hash of the conversation. Their reasoning is left out; the empty block in front of
    the answer is not learnt, as the prompt writes it, and its tokens are the prompt's. The others are learnt as they
    stand: where reasoning is called for, and where it is not, is the data's to say.

    Raises ValueError for a share outside 0 to 1, or above 0 where the template does not know the switch; `pieces` also
    for a reply with a marker that is missing, out of place or there twice, and for reasoning without an answer.
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
    """Prompts, a share of which ask for reasoning and the others for none, picked by a hash of the conversation.

    share: None leaves the choice to the model, as prompts do that do not name enable_thinking. Raises ValueError where
    there is a share and the template does not know the switch.
    """

    def __init__(self, tokenizer: Tokenizer, share: float | None) -> None:
        self.share = share
        self._plain = ChatEncoder(tokenizer)
        self._endings = prompt_endings(tokenizer) if share is not None else {}
        if share is not None and not {"on", "off"} <= self._endings.keys():
            raise ValueError(
                f"--thinking {share:g}: the chat template does not know enable_thinking; leave the flag out"
            )
        self._asking = {value: ChatEncoder(tokenizer, enable_thinking=value) for value in (True, False)}

    @cached_property
    def fingerprint(self) -> str:
        if self.share is None:
            return self._plain.fingerprint
        parts = [self._asking[True].fingerprint, self._asking[False].fingerprint, self.share]
        return hashlib.sha256(repr(parts).encode()).hexdigest()

    def thinking(self, messages: Sequence[Message]) -> bool | None:
        """Whether this conversation's prompt asks for reasoning; None: it does not say."""
        return None if self.share is None else picks(messages, self.share)

    def opening(self, messages: Sequence[Message]) -> str:
        """What of a reasoning reply its prompt has written already: "<think>" and a newline, or nothing."""
        return self._endings["on"] if self.thinking(messages) else ""

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        """Token ids up to where the model goes on."""
        thinking = self.thinking(messages)
        encoder = self._plain if thinking is None else self._asking[thinking]
        return encoder.prompt(messages)


def picks(messages: Sequence[Message], share: float) -> bool:
    """Whether a conversation is among a `share` of all. By a hash of its own: data sorted by a plain one would have the
    whole share at its beginning."""
    text = json.dumps(list(messages)).encode()
    digest = hashlib.blake2b(text, digest_size=8, person=b"reasoning").digest()
    return int.from_bytes(digest, "big") < share * 2**64


def _without_reasoning(number: int, message: Message) -> dict[str, Any]:
    """The message with its answer alone. Raises ValueError for a malformed reply of the assistant."""
    if message.get("role") != "assistant":
        return dict(message)
    beside, content = message.get("reasoning_content") or "", message.get("content") or ""
    text = f"<think>{beside}</think>{content}" if beside else content
    if not _has_marker(text):
        return dict(message)
    reply = parse_reply(text)
    if reply is None:
        raise ValueError(
            f"message {number}, of the assistant, is not <think>reasoning</think> and an answer, each marker once"
        )
    if not reply.answer and not message.get("tool_calls"):
        raise ValueError(f"message {number}, of the assistant, has no answer behind its reasoning")
    return {k: v for k, v in message.items() if k != "reasoning_content"} | {"content": reply.answer}


def _has_marker(text: str) -> bool:
    return any(marker in text for marker in MARKERS)
