"""Held-out questions that the model answers during training: exact answers, and reasoning in the right format."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np

from minimind.data import Corpus
from minimind.data.encoding import MARKER, NONE, TURN_END, class_of
from minimind.inference.generate import generate
from minimind.modeling import Model
from minimind.tokenization import Tokenizer
from minimind.tokenization.reasoning import SplitReply, parse_answer, parse_reply, prompt_endings
from minimind.training.job import Job

_BATCH = 64  # prompts generated from at once
MODES = {"auto": "left to the model", "on": "enable_thinking=true", "off": "enable_thinking=false"}


@dataclass(frozen=True)
class HeldOutQuestion:
    """Token ids of a conversation up to an assistant turn, and of that turn without its end token."""

    prompt: list[int]
    answer: list[int]


def read_questions(corpus: Corpus, longest: int, count: int | None = None) -> list[HeldOutQuestion]:
    """Every assistant turn of `corpus` that ends within `longest` tokens, or the first `count` of them."""
    questions: list[HeldOutQuestion] = []
    for i in range(corpus.num_documents):
        ids, codes = corpus.document(i), corpus.codes(i)
        trained = class_of(codes) > NONE
        last = (codes & TURN_END) > 0
        begins = trained.copy()
        begins[1:] &= ~trained[:-1] | last[:-1]
        for start, end in zip(np.flatnonzero(begins), np.flatnonzero(last), strict=True):
            if end < longest and (count is None or len(questions) < count):
                questions.append(HeldOutQuestion(ids[:start].tolist(), ids[start:end].tolist()))
        if count is not None and len(questions) == count:
            break
    return questions


def answer(model: Model, tokenizer: Tokenizer, questions: Sequence[HeldOutQuestion], longest: int) -> list[list[int]]:
    """The model's greedy answers, token ids, at most `longest` each."""
    answers: list[list[int]] = []
    for first in range(0, len(questions), _BATCH):
        prompts = [question.prompt for question in questions[first : first + _BATCH]]
        answers += generate(model, prompts, longest, temperature=0, stop_ids=(tokenizer.eos_token_id,))
    return answers


def exact_match(model: Model, tokenizer: Tokenizer, questions: Sequence[HeldOutQuestion]) -> float:
    """Share of the questions whose answer equals the expected one exactly."""
    longest = 1 + max(len(question.answer) for question in questions)
    answers = answer(model, tokenizer, questions, longest)
    return sum(ids == question.answer for ids, question in zip(answers, questions, strict=True)) / len(questions)


def exact_figures(model: Model, questions: Sequence[HeldOutQuestion], job: Job, name: str) -> dict[str, Any]:
    """NAME_exact, the share of exact answers, and NAME_questions, their number. All ranks call
    it."""
    whole = job.parallel.whole(model)
    share = job.parallel.share(lambda: exact_match(cast(Model, whole), job.tokenizer, questions))
    return {f"{name}_exact": share, f"{name}_questions": len(questions)}


def show_answers(model: Model, tokenizer: Tokenizer, questions: Sequence[HeldOutQuestion], longest: int = 64) -> str:
    """A line per question: the conversation, the model's answer, and in brackets the expected one."""
    lines = []
    for question, ids in zip(questions, answer(model, tokenizer, questions, longest), strict=True):
        line = f"{turns(tokenizer, question.prompt)} {tokenizer.decode(ids)}"
        lines.append(f"{line}  [{tokenizer.decode(question.answer)}]".replace("\n", "\\n"))
    return "\n".join(lines)


def continue_texts(
    model: Model | None, tokenizer: Tokenizer, source: Corpus, count: int = 3, new_tokens: int = 64
) -> str:
    """Continuations of the first tokens of `count` documents, as 'beginning | continuation'. Empty without a model, as
    on ranks other than 0."""
    if model is None:
        return ""
    indices = [i * source.num_documents // count for i in range(min(count, source.num_documents))]
    documents = [source.document(i) for i in indices]
    prompts = [[int(t) for t in d[: min(17, 1 + len(d) // 2)]] for d in documents]
    continuations = generate(model, prompts, new_tokens, stop_ids=(tokenizer.eos_token_id,))
    return "\n".join(
        f"{tokenizer.decode(prompt[1:])} | {tokenizer.decode(ids)}".replace("\n", "\\n")
        for prompt, ids in zip(prompts, continuations, strict=True)
    )


def turns(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    """The conversation with bars for control tokens: 'user: Who are you? | assistant:'."""
    control = "|".join(map(re.escape, tokenizer.control_tokens))
    parts = [part.strip().replace("\n", ": ", 1) for part in re.split(control, tokenizer.decode(ids))]
    return " | ".join(part for part in parts if part) + ":"


@dataclass(frozen=True)
class ReasoningQuestions:
    """Held-out questions, divided into those whose expected answers have reasoning and those without."""

    reasoned: list[HeldOutQuestion]
    plain: list[HeldOutQuestion]

    @staticmethod
    def from_corpus(corpus: Corpus, tokenizer: Tokenizer, longest: int) -> ReasoningQuestions:
        """The assistant turns that end within `longest` tokens. Turns whose prompt closes the reasoning are left out:
        ReasoningEncoder has removed it from the corpus."""
        endings = prompt_endings(tokenizer)
        closed = tokenizer.encode(endings["off"]) if "off" in endings else None
        questions = ReasoningQuestions([], [])
        for question in read_questions(corpus, longest):
            if parse_reply(tokenizer.decode(question.answer)) is not None:
                questions.reasoned.append(question)
            elif closed is None or question.prompt[-len(closed) :] != closed:
                questions.plain.append(question)
        return questions

    def first(self, count: int | None) -> ReasoningQuestions:
        return ReasoningQuestions(self.reasoned[:count], self.plain[:count])


def has_reasoning(corpus: Corpus) -> bool:
    """Whether any token of the corpus belongs to a reasoning marker."""
    return any((class_of(corpus.codes(i)) == MARKER).any() for i in range(corpus.num_documents))


def reply_of(text: str, ended: bool, mode: str) -> SplitReply | None:
    """The parts of a model's reply to a prompt in `mode`, or None where it does not keep to the format.

    In the modes auto and on the format is exactly one non-empty <think>...</think> at the very beginning (in mode on
    the prompt has the <think>), in mode off none; then a non-empty answer, in one <answer>...</answer> or without; then
    the end token.
    """
    reply = parse_answer(text) if mode == "off" else parse_reply("<think>" * (mode == "on") + text)
    if reply is None or not ended or not reply.answer or (mode != "off" and not reply.reasoning):
        return None
    return reply


def reasoning_figures(model: Model, tokenizer: Tokenizer, questions: ReasoningQuestions) -> dict[str, Any]:
    """Shares of greedy replies. For each mode of the template, over questions with reasoning: MODE_format, replies in
    the format, and MODE_exact, right answers, whatever the reasoning. plain_exact: other questions answered to the
    letter. reasoning_questions, plain_questions: their numbers."""
    figures: dict[str, Any] = {}
    if questions.reasoned:
        for mode, ending in prompt_endings(tokenizer).items():
            formatted, right = _reply_shares(model, tokenizer, questions.reasoned, mode, ending)
            figures |= {f"{mode}_format": formatted, f"{mode}_exact": right}
        figures["reasoning_questions"] = len(questions.reasoned)
    if questions.plain:
        figures["plain_exact"] = exact_match(model, tokenizer, questions.plain)
        figures["plain_questions"] = len(questions.plain)
    return figures


def _reply_shares(
    model: Model, tokenizer: Tokenizer, questions: Sequence[HeldOutQuestion], mode: str, ending: str
) -> tuple[float, float]:
    """Shares of replies (in the format, with the right answer)."""
    suffix = tokenizer.encode(ending)
    prompts = [HeldOutQuestion(question.prompt + suffix, question.answer) for question in questions]
    longest = 2 * max(len(question.answer) for question in questions)
    formatted = right = 0
    for question, ids in zip(questions, answer(model, tokenizer, prompts, longest), strict=True):
        # a reply shorter than the limit was ended by its end token
        reply = reply_of(tokenizer.decode(ids), len(ids) < longest, mode)
        expected = parse_reply(tokenizer.decode(question.answer))
        assert expected is not None
        formatted += reply is not None
        right += reply is not None and reply.answer == expected.answer
    return formatted / len(questions), right / len(questions)
