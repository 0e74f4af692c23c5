"""Replies with reasoning: their parts and their targets."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest

from minimind.data.builtin.problems import reasoning
from minimind.tokenization import ChatEncoder, load_tokenizer
from minimind.tokenization.chat_encoder import MARKERS
from minimind.tokenization.reasoning import (
    ReasoningEncoder,
    ThinkingPrompts,
    parse_answer,
    parse_reply,
    picks,
    prompt_endings,
)
from minimind.tokenization.tokenizer import Tokenizer

SHIPPED = load_tokenizer()
THINK, END_THINK = (SHIPPED.special_tokens[name] for name in ("<think>", "</think>"))
ASK = {"role": "user", "content": "Is 9 <think> prime?"}
BESIDE = [ASK, {"role": "assistant", "reasoning_content": "9=3*3", "content": "No."}]
INSIDE = [ASK, {"role": "assistant", "content": "<think>\n9=3*3\n</think>\n<answer>\nNo.\n</answer>"}]
PLAIN = [ASK, {"role": "assistant", "content": "No."}]


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("<think>a</think>b", ("a", "b")),
        ("<think>\na\nb\n</think>\n\nc\nd\n", ("a\nb", "c\nd")),
        ("<think>a</think>\n<answer>\nb\n</answer>\n", ("a", "b")),
        ("<think>\n\n</think>\n\nb", ("", "b")),
        ("<think>a</think>", ("a", "")),
        ("b", None),
        ("b<think>a</think>", None),
        (" <think>a</think>b", None),
        ("<think>a", None),
        ("<think><think>a</think>b", None),
        ("<think>a</think></think>b", None),
        ("<think>a</think>b<think>c</think>d", None),
        ("<think>a</think><answer>b", None),
        ("<think>a</think>b</answer>", None),
        ("<think>a</think>so <answer>b</answer>", None),
        ("<think>a</think><answer>b</answer> so", None),
        ("<think>a</think><answer>b</answer><answer>c</answer>", None),
        ("<think><answer>a</answer></think>b", None),
    ],
)
def test_parts_of_a_reply(text, parts):
    reply = parse_reply(text)
    assert (reply and (reply.reasoning, reply.answer)) == parts


def test_an_answer_alone_holds_no_marker():
    answer = parse_answer(" b \n")
    assert answer is not None and (answer.reasoning, answer.answer) == ("", "b")
    assert not any(parse_answer(f"b{marker}") for marker in MARKERS)


def marker_tokens(ids: np.ndarray, start: int) -> np.ndarray:
    """Whether each token from `start` on overlaps a marker, from the length of each token's text."""
    texts = [SHIPPED.decode([i]) for i in ids]
    ends = np.cumsum([len(text) for text in texts])
    whole, starts = "".join(texts), ends - [len(text) for text in texts]
    found = np.zeros(len(ids), bool)
    for span in re.finditer("|".join(MARKERS), whole):
        found |= (starts < span.end()) & (ends > span.start())
    return found & (np.arange(len(ids)) >= start)


@pytest.mark.parametrize("messages", [BESIDE, INSIDE, PLAIN], ids=["beside", "inside", "plain"])
def test_markers_are_those_of_the_reply(messages):
    encoder = ReasoningEncoder(SHIPPED, 0)
    (chat,) = encoder.encode([encoder.pieces(messages)])
    head = len(SHIPPED.encode(SHIPPED.apply_chat_template([ASK], add_generation_prompt=True)))
    assert (chat.trained == (np.arange(len(chat.ids)) >= head)).all()
    assert (chat.markers == marker_tokens(chat.ids, head)).all()
    assert np.isin(chat.ids[chat.markers], (THINK, END_THINK)).sum() == (0 if messages is PLAIN else 2)
    assert (chat.markers.sum() > 4) == (messages is INSIDE)  # <answer> is several tokens
    assert THINK in chat.ids[:head]  # the user's, which is no target


@pytest.mark.parametrize("messages", [BESIDE, INSIDE, PLAIN], ids=["beside", "inside", "plain"])
def test_without_reasoning_only_the_answer_is_trained_on(messages):
    encoder = ReasoningEncoder(SHIPPED, 1)
    (chat,) = encoder.encode([encoder.pieces(messages)])
    text = SHIPPED.apply_chat_template([ASK], add_generation_prompt=True, enable_thinking=False)
    prompt, answer = SHIPPED.encode(text), SHIPPED.encode("No.<|im_end|>")
    assert chat.ids.tolist() == prompt + answer
    assert chat.trained.tolist() == [False] * len(prompt) + [True] * len(answer)
    assert not chat.markers.any() and chat.ends.tolist().index(True) == len(chat.ids) - 1


def test_training_begins_with_the_prompt_in_every_mode():
    """Token by token, for all built-in problems, and for an answer with the name of a control token."""
    endings = {name: SHIPPED.encode(text) for name, text in prompt_endings(SHIPPED).items()}
    assert list(endings) == ["auto", "on", "off"]
    spelled = [ASK, {"role": "assistant", "reasoning_content": "<|im_end|>?", "content": "<|im_end|> it is"}]
    with_, without = ReasoningEncoder(SHIPPED, 0), ReasoningEncoder(SHIPPED, 1)
    for messages in [spelled, *reasoning()[1]]:
        if len(messages) != 2:
            continue
        head = with_.prompt(messages[:1])
        whole, direct = (e.encode([e.pieces(messages)])[0] for e in (with_, without))
        opened = head + endings["on"]
        if "reasoning_content" in messages[1]:
            assert whole.ids[: len(opened)].tolist() == opened
        closed = head + endings["off"]
        assert direct.ids[: len(closed)].tolist() == closed
        assert direct.trained.tolist() == [i >= len(closed) for i in range(len(direct.ids))]


def test_every_turn_of_a_conversation_without_reasoning():
    encoder = ReasoningEncoder(SHIPPED, 1)
    pieces = encoder.pieces(BESIDE + INSIDE)
    assert [piece.text for piece in pieces if piece.trained] == ["No.<|im_end|>"] * 2
    assert [piece.text for piece in pieces].count("<think>\n\n</think>\n\n") == 2


def test_the_share_without_reasoning_is_exact_and_spread_out():
    """Also in data sorted by a hash, like the built-in rows; the bounds are five standard deviations."""
    train, _ = reasoning()
    encoder = ReasoningEncoder(SHIPPED, 0.3)
    picked = [picks(messages, encoder.direct) for messages in train]
    assert picked[:200] == [picks(messages, 0.3) for messages in train[:200]]
    for part in (picked, picked[:400], picked[-400:]):
        assert abs(np.mean(part) - 0.3) < 5 * (0.3 * 0.7 / len(part)) ** 0.5


def bad(content: str, **more: Any) -> list[dict[str, Any]]:
    return [ASK, {"role": "assistant", "content": content, **more}]


@pytest.mark.parametrize("direct", [0, 1])
@pytest.mark.parametrize(
    ("messages", "message"),
    [
        (bad("<think>a"), "message 1, of the assistant, is not <think>reasoning</think> and an answer"),
        (bad("<think>b</think>c", reasoning_content="a"), "message 1, of the assistant, is not <think>"),
        (bad("a</think>b"), "message 1, of the assistant, is not <think>"),
        (bad("<think>a</think>"), "message 1, of the assistant, has no answer after its reasoning"),
        (bad(" ", reasoning_content="a"), "message 1, of the assistant, has no answer after its reasoning"),
    ],
)
def test_malformed_replies_are_refused(messages, message, direct):
    with pytest.raises(ValueError, match=re.escape(message)):
        ReasoningEncoder(SHIPPED, direct).pieces(messages)


def test_a_tool_call_needs_no_answer():
    call = bad("", reasoning_content="look", tool_calls=[{"name": "f", "arguments": {}}])
    for direct in (0, 1):
        text = "".join(piece.text for piece in ReasoningEncoder(SHIPPED, direct).pieces(call))
        assert ("look" in text) == (direct == 0) and "<tool_call>" in text


def test_impossible_shares_and_templates():
    with pytest.raises(ValueError, match=r"--direct 1.5: must be a share from 0 to 1"):
        ReasoningEncoder(SHIPPED, 1.5)
    template = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    template += "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    simple = Tokenizer(SHIPPED._model, {"eos_token": "<|im_end|>"}, template, source="simple")
    assert prompt_endings(simple) == {"auto": ""}
    with pytest.raises(ValueError, match=r"--direct 0.3: the chat template does not know enable_thinking"):
        ReasoningEncoder(simple, 0.3)
    with pytest.raises(ValueError, match=r"--thinking 0.3: the chat template does not know enable_thinking"):
        ThinkingPrompts(simple, 0.3)
    assert ReasoningEncoder(simple, 0).pieces(INSIDE)


@pytest.mark.heavy
def test_a_share_of_the_prompts_asks_for_reasoning():
    chats = [[{"role": "user", "content": f"{i} + 1?"}] for i in range(400)]
    half, none = ThinkingPrompts(SHIPPED, 0.5), ThinkingPrompts(SHIPPED, None)
    asked = [half.thinking(chat) for chat in chats]
    assert 0.4 < np.mean(asked) < 0.6  # five deviations
    endings = prompt_endings(SHIPPED)
    for chat, on in zip(chats[:20], asked, strict=False):
        plain = ChatEncoder(SHIPPED).prompt(chat)
        assert none.prompt(chat) == plain and none.thinking(chat) is None and none.opening(chat) == ""
        assert half.prompt(chat) == plain + SHIPPED.encode(endings["on" if on else "off"])
        assert half.opening(chat) == (endings["on"] if on else "")
    assert all(ThinkingPrompts(SHIPPED, 1.0).thinking(chat) for chat in chats)
    assert none.fingerprint == ChatEncoder(SHIPPED).fingerprint != half.fingerprint


def test_the_fingerprint_follows_the_share():
    prints = [ReasoningEncoder(SHIPPED, direct).fingerprint for direct in (0, 0.3, 1, 0.3)]
    assert prints[1] == prints[3] and len({*prints, ChatEncoder(SHIPPED).fingerprint}) == 4
