"""What stages that learn from conversations share: their flags, data, held-out figures and samples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

from minimind.data import Corpus, open_conversations
from minimind.data.formats import FormatName
from minimind.data.packing import row_rule
from minimind.modeling import Model
from minimind.tokenization import ChatEncoder
from minimind.training.arguments import StageArgs
from minimind.training.job import Job, TrainingPlan
from minimind.training.parts import DataSplit, NamedFiles, all_losses, form_of, open_parts
from minimind.training.stages.answers import exact_match, questions, show


@dataclass(frozen=True)
class ChatArgs(StageArgs):
    """Flags of a stage that learns from conversations."""

    data: tuple[str, ...] = ()
    """Files, folders or globs of .jsonl, plain, .gz or .zst, with {"conversations": [{"role": ..., "content": ...},
    ...]} rows."""
    format: FormatName = "auto"
    """The form of --data's rows: auto, ours and upstream's; messages, OpenAI's and trl's; sharegpt and alpaca, as
    LLaMA-Factory has them (docs/data.md)."""
    heldout_data: tuple[str, ...] = ()
    """Conversations to measure on, instead of --heldout; NAME=FILE is measured beside it, with figures of its own."""
    seq_len: int | None = None
    """Tokens in a row; longer conversations lose their last turns. None: 512, or as many up to 4096 as leave at most
    one conversation in a hundred longer, where the tokens of a step and a GPU's memory allow."""
    eval_questions: int | None = None
    """Held-out questions answered on the way and compared with the answers of the data to the letter; at the end all
    are. None: 64 of the built-in conversations, 0 of others."""

    @property
    def questions(self) -> int:
        return self.eval_questions if self.eval_questions is not None else 0 if self.data else 64

    @property
    def legacy(self) -> dict[str, Any]:
        return super().legacy | {"seq_len": 512}


def open_chats(
    job: Job, data: Sequence[str], heldout_data: Sequence[str], encoder: ChatEncoder, builtin: tuple[Path, ...]
) -> DataSplit:
    """The conversations of --data, else the `builtin` files, which are not asked for beside it; settles --seq-len by
    them."""
    parts = open_parts(job, NamedFiles.of(data, heldout_data, builtin), partial(read_chats, job, encoder))
    job.settle("seq_len", row_rule(parts.train, 512, job.longest_row(), "conversations"))
    return parts


def read_chats(job: Job, encoder: ChatEncoder, paths: Sequence[str]) -> Corpus:
    where = job.args.cache_dir, job.args.on_bad_row, job.console
    return open_conversations(paths, encoder, *where, form=form_of(job))


def describe_chats(parts: DataSplit, plan: TrainingPlan) -> list[str]:
    loader, held = plan.loader, f"; held out {parts.heldout.num_documents:,}" if parts.heldout else ""
    first = f"data: {parts.train.num_documents:,} conversations, {loader.tokens_per_epoch:,} tokens a pass{held}"
    cuts = str(loader.cuts)
    return [first, *([f"longer than --seq-len {loader.seq_len}: {cuts}"] if cuts else []), *parts.lines(plan)]


def chat_figures(model: Model, parts: DataSplit, job: Job, args: ChatArgs, final: bool) -> dict[str, Any]:
    """Loss over the assistant's tokens of the held-out data and of every named set, and the share of held-out questions
    answered to the letter."""
    figures = all_losses(model, parts, job, final)
    if parts.heldout is not None and args.questions:
        figures |= answered(model, parts.heldout, job, args, final, "heldout")
    return figures


def answered(model: Model, heldout: Corpus, job: Job, args: ChatArgs, final: bool, name: str) -> dict[str, Any]:
    """NAME_exact, the share of the questions answered to the letter, and NAME_questions, their number; on all ranks."""
    asked = questions(heldout, args.row, None if final else args.questions)
    whole = job.parallel.whole(model)
    share = job.parallel.share(lambda: exact_match(cast(Model, whole), job.tokenizer, asked))
    return {f"{name}_exact": share, f"{name}_questions": len(asked)}


def chat_sample(model: Model | None, source: Corpus, job: Job, args: ChatArgs, count: int = 5) -> str:
    """Answers to questions from all over `source`; nothing where there is no model: on all ranks but the first."""
    if model is None:
        return ""
    asked = questions(source.head(args.eval_tokens), args.row)
    return show(model, job.tokenizer, asked[:: max(1, len(asked) // count)][:count])
