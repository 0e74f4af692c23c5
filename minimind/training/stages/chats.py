"""Conversations as training data, and the answers that a model in training gives to held-out questions.

First the flags, the reading and the figures of a chat stage; then exact answers, samples, and replies with reasoning.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np

from minimind.data import Corpus, open_conversations
from minimind.data.encoding import MARKER, NONE, TURN_END, class_of
from minimind.data.formats import FormatName
from minimind.data.packing import row_rule
from minimind.inference.generate import generate
from minimind.modeling import Model
from minimind.tokenization import ChatEncoder, Tokenizer
from minimind.tokenization.reasoning import SplitReply, parse_answer, parse_reply, prompt_endings
from minimind.training.arguments import StageArgs
from minimind.training.batches import TrainingPlan, longest_row
from minimind.training.data_split import DataSplit, NamedFiles, all_losses, form_of, open_split
from minimind.training.job import Job


@dataclass(frozen=True)
class ChatArgs(StageArgs):
    """Flags of a stage that learns from conversations."""

    data: tuple[str, ...] = ()
    """Files, folders or globs of .jsonl, plain, .gz or .zst, with {"conversations": [{"role": ..., "content": ...},
    ...]} rows."""
    format: FormatName = "auto"
    """Form of the rows of --data: auto (ours and upstream's), messages (OpenAI's and trl's), sharegpt or alpaca (as
    LLaMA-Factory has them; docs/data.md)."""
    heldout_data: tuple[str, ...] = ()
    """Files of conversations to evaluate on instead of --heldout. NAME=FILE adds a further held-out set with figures of
    its own."""
    seq_len: int | None = None
    """Tokens in a row; longer conversations lose their last turns. None: 512, or as many up to 4096 as leave at most
    one conversation in a hundred longer, where the tokens of a step and a GPU's memory allow."""
    eval_questions: int | None = None
    """Held-out questions that are answered during training and compared exactly with the expected answers; at
    the end all are. None: 64 of built-in conversations, 0 of others."""

    @property
    def questions(self) -> int:
        return self.eval_questions if self.eval_questions is not None else 0 if self.data else 64

    @property
    def legacy(self) -> dict[str, Any]:
        return super().legacy | {"seq_len": 512}


def open_chats(
    job: Job, data: Sequence[str], heldout_data: Sequence[str], encoder: ChatEncoder, builtin: tuple[Path, ...]
) -> DataSplit:
    """The conversations of `data`, or of the `builtin` files where that is empty; settles --seq-len by their
    lengths."""
    files = NamedFiles.from_flags(data, heldout_data, builtin)
    split = open_split(job, files, partial(read_chats, job, encoder))
    job.settle("seq_len", row_rule(split.train, 512, longest_row(job), "conversations"))
    return split


def read_chats(job: Job, encoder: ChatEncoder, paths: Sequence[str]) -> Corpus:
    where = job.args.cache_dir, job.args.on_bad_row, job.console
    return open_conversations(paths, encoder, *where, row_format=form_of(job))


def describe_chats(split: DataSplit, plan: TrainingPlan) -> list[str]:
    """Lines about the data, printed at start."""
    loader, held = plan.loader, f"; held out {split.heldout.num_documents:,}" if split.heldout else ""
    first = f"data: {split.train.num_documents:,} conversations, {loader.tokens_per_epoch:,} tokens a pass{held}"
    cuts = str(loader.cuts)
    return [first, *([f"longer than --seq-len {loader.seq_len}: {cuts}"] if cuts else []), *split.lines(plan)]


def chat_figures(model: Model, split: DataSplit, job: Job, args: ChatArgs, final: bool) -> dict[str, Any]:
    """Loss over the assistant's tokens of the held-out data and of every named set, and the share of held-out questions
    answered exactly."""
    figures = all_losses(model, split, job, final)
    if split.heldout is not None and args.questions:
        figures |= exact_figures(model, chat_questions(split.heldout, args, final), job, "heldout")
    return figures


def chat_questions(corpus: Corpus, args: ChatArgs, final: bool) -> list[HeldOutQuestion]:
    """The questions of `corpus` to answer in an evaluation: the first few, or all of them in the final one."""
    return read_questions(corpus, args.row, None if final else args.questions)


def chat_sample(model: Model | None, source: Corpus, job: Job, args: ChatArgs) -> str:
    """Answers to five questions spread over `source`. Empty without a model, as on ranks other than 0."""
    if model is None:
        return ""
    questions = read_questions(source.head(args.eval_tokens), args.row)
    return show_answers(model, job.tokenizer, questions[:: max(1, len(questions) // 5)][:5])


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
