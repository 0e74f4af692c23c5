"""Questions of held-out conversations, asked of the model while it trains; beginnings of held-out texts, continued."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from minimind.data import Corpus
from minimind.data.loss_mask import NONE, TURN_END, class_of
from minimind.inference.generate import generate
from minimind.modeling import Model
from minimind.tokenization import Tokenizer

_TOGETHER = 64  # prompts generated from at once


@dataclass(frozen=True)
class HeldOutQuestion:
    """Token ids of a conversation up to an assistant turn, and of that turn without its end token."""

    prompt: list[int]
    answer: list[int]


def questions(corpus: Corpus, longest: int, count: int | None = None) -> list[HeldOutQuestion]:
    """Every assistant turn of `corpus` that ends within `longest` tokens, or the first `count` of them."""
    found: list[HeldOutQuestion] = []
    for i in range(corpus.num_documents):
        ids, codes = corpus.document(i), corpus.codes(i)
        trained = class_of(codes) > NONE
        last = (codes & TURN_END) > 0
        begins = trained.copy()
        begins[1:] &= ~trained[:-1] | last[:-1]
        for start, end in zip(np.flatnonzero(begins), np.flatnonzero(last), strict=True):
            if end < longest and (count is None or len(found) < count):
                found.append(HeldOutQuestion(ids[:start].tolist(), ids[start:end].tolist()))
        if count is not None and len(found) == count:
            break
    return found


def answer(model: Model, tokenizer: Tokenizer, asked: Sequence[HeldOutQuestion], longest: int) -> list[list[int]]:
    """What the model says to each: the likeliest tokens, `longest` at most."""
    given: list[list[int]] = []
    for first in range(0, len(asked), _TOGETHER):
        prompts = [question.prompt for question in asked[first : first + _TOGETHER]]
        given += generate(model, prompts, longest, temperature=0, stop_ids=(tokenizer.eos_token_id,))
    return given


def exact_match(model: Model, tokenizer: Tokenizer, asked: Sequence[HeldOutQuestion]) -> float:
    """Share of questions answered to the letter."""
    given = answer(model, tokenizer, asked, 1 + max(len(question.answer) for question in asked))
    return sum(a == question.answer for a, question in zip(given, asked, strict=True)) / len(asked)


def show(model: Model, tokenizer: Tokenizer, asked: Sequence[HeldOutQuestion], longest: int = 64) -> str:
    """A line for each question: the conversation, the model's answer, and in brackets the one in the data."""
    lines = []
    for question, given in zip(asked, answer(model, tokenizer, asked, longest), strict=True):
        line = f"{turns(tokenizer, question.prompt)} {tokenizer.decode(given)}"
        lines.append(f"{line}  [{tokenizer.decode(question.answer)}]".replace("\n", "\\n"))
    return "\n".join(lines)


def continue_texts(
    model: Model | None, tokenizer: Tokenizer, source: Corpus, count: int = 3, new_tokens: int = 64
) -> str:
    """Continuations of the first tokens of `count` documents, prompt and continuation divided by ' | '. Nothing where
    there is no model: on all ranks but the first."""
    if model is None:
        return ""
    indices = [i * source.num_documents // count for i in range(min(count, source.num_documents))]
    documents = [source.document(i) for i in indices]
    prompts = [[int(t) for t in d[: min(17, 1 + len(d) // 2)]] for d in documents]
    given = generate(model, prompts, new_tokens, stop_ids=(tokenizer.eos_token_id,))
    return "\n".join(
        f"{tokenizer.decode(prompt[1:])} | {tokenizer.decode(ids)}".replace("\n", "\\n")
        for prompt, ids in zip(prompts, given, strict=True)
    )


def turns(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    """The conversation with its control tokens as bars: 'user: Who are you? | assistant:'."""
    control = "|".join(map(re.escape, tokenizer.control_tokens))
    parts = [part.strip().replace("\n", ": ", 1) for part in re.split(control, tokenizer.decode(ids))]
    return " | ".join(part for part in parts if part) + ":"
