"""How a model reasons: whether its replies keep to the format, and whether its answers are right."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from minimind.data import Corpus
from minimind.data.loss_mask import MARKER, class_of
from minimind.modeling import Model
from minimind.tokenization import Tokenizer
from minimind.tokenization.reasoning import SplitReply, parse_answer, parse_reply, prompt_endings
from minimind.training.stages.answers import HeldOutQuestion, answer, exact_match, questions

MODES = {"auto": "left to the model", "on": "enable_thinking=true", "off": "enable_thinking=false"}


@dataclass(frozen=True)
class ReasoningQuestions:
    """Held-out questions that the data answers with reasoning, and others that it answers without."""

    reasoned: list[HeldOutQuestion]
    plain: list[HeldOutQuestion]

    @staticmethod
    def of(corpus: Corpus, tokenizer: Tokenizer, longest: int) -> ReasoningQuestions:
        """The assistant's turns that end within `longest` tokens. Those whose prompt closes the reasoning, in corpora
        of ReasoningEncoder, are left out: their reasoning is not in the corpus."""
        endings = prompt_endings(tokenizer)
        closed = tokenizer.encode(endings["off"]) if "off" in endings else None
        asked = ReasoningQuestions([], [])
        for question in questions(corpus, longest):
            if parse_reply(tokenizer.decode(question.answer)) is not None:
                asked.reasoned.append(question)
            elif closed is None or question.prompt[-len(closed) :] != closed:
                asked.plain.append(question)
        return asked

    def first(self, count: int | None) -> ReasoningQuestions:
        return ReasoningQuestions(self.reasoned[:count], self.plain[:count])


def has_reasoning(corpus: Corpus) -> bool:
    """Whether any token in it belongs to a marker."""
    return any((class_of(corpus.codes(i)) == MARKER).any() for i in range(corpus.num_documents))


def reply_of(text: str, ended: bool, mode: str) -> SplitReply | None:
    """The parts of what a model wrote behind the prompt of `mode`; None where it does not keep to the format.

    The format: in the modes auto and on exactly one <think>...</think>, not empty, at the very beginning (on: <think>
    is in the prompt); in the mode off none; then an answer that is not empty, in one <answer>...</answer> or in none;
    then the end token.
    """
    reply = parse_answer(text) if mode == "off" else parse_reply("<think>" * (mode == "on") + text)
    if reply is None or not ended or not reply.answer or (mode != "off" and not reply.reasoning):
        return None
    return reply


def reasoning_figures(model: Model, tokenizer: Tokenizer, asked: ReasoningQuestions) -> dict[str, Any]:
    """Of the questions answered with reasoning, for each mode that the template knows: MODE_format, the share of
    greedy replies that keep to the format, and MODE_exact, that of right answers among all, reasoning aside;
    plain_exact: the share of the others answered to the letter. The numbers of both kinds."""
    figures: dict[str, Any] = {}
    if asked.reasoned:
        for mode, ending in prompt_endings(tokenizer).items():
            kept, right = _replies(model, tokenizer, asked.reasoned, mode, ending)
            figures |= {f"{mode}_format": kept, f"{mode}_exact": right}
        figures["reasoning_questions"] = len(asked.reasoned)
    if asked.plain:
        figures["plain_exact"] = exact_match(model, tokenizer, asked.plain)
        figures["plain_questions"] = len(asked.plain)
    return figures


def _replies(
    model: Model, tokenizer: Tokenizer, asked: Sequence[HeldOutQuestion], mode: str, ending: str
) -> tuple[float, float]:
    """Shares (in the format, with the right answer)."""
    behind = tokenizer.encode(ending)
    prompts = [HeldOutQuestion(question.prompt + behind, question.answer) for question in asked]
    longest = 2 * max(len(question.answer) for question in asked)
    kept = right = 0
    for question, ids in zip(asked, answer(model, tokenizer, prompts, longest), strict=True):
        # a reply that its end token ended is shorter than one that was cut off
        reply = reply_of(tokenizer.decode(ids), len(ids) < longest, mode)
        expected = parse_reply(tokenizer.decode(question.answer))
        assert expected is not None
        kept += reply is not None
        right += reply is not None and reply.answer == expected.answer
    return kept / len(asked), right / len(asked)
