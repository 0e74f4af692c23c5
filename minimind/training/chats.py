"""What stages that learn from conversations share: their flags, data, held-out figures and samples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

from rich.console import Console

from minimind.data import Corpus, PackedLoader, open_conversations
from minimind.modeling import Model
from minimind.tokenization import ChatEncoder
from minimind.training.answers import exact_match, questions, show
from minimind.training.arguments import StageArgs
from minimind.training.heldout import heldout_loss
from minimind.training.job import Job


@dataclass(frozen=True)
class ChatArgs(StageArgs):
    """Flags of a stage that learns from conversations."""

    data: tuple[str, ...] = ()
    """Files, folders or globs of .jsonl, plain, .gz or .zst, with {"conversations": [{"role": ..., "content": ...},
    ...]} rows."""
    heldout_data: tuple[str, ...] = ()
    """Conversations to measure on, instead of --heldout."""
    seq_len: int = 512
    """Tokens in a row; longer conversations lose their last turns."""
    eval_questions: int | None = None
    """Held-out questions answered on the way and compared with the answers of the data to the letter; at the end all
    are. None: 64 of the built-in conversations, 0 of others."""

    @property
    def questions(self) -> int:
        return self.eval_questions if self.eval_questions is not None else 0 if self.data else 64


def open_chats(
    args: ChatArgs, encoder: ChatEncoder, console: Console, builtin: tuple[Path, Path]
) -> tuple[Corpus, Corpus | None]:
    """(training, held-out) conversations: of --data, else the `builtin` files."""
    data, heldout = list(args.data), list(args.heldout_data)
    if not data:
        data, heldout = [str(builtin[0])], heldout or [str(builtin[1])]
    read = partial(read_chats, args, encoder, console)
    if heldout:
        return read(data), read(heldout)
    return read(data).split(args.heldout) if args.heldout != 0 else (read(data), None)


def read_chats(args: ChatArgs, encoder: ChatEncoder, console: Console, paths: Sequence[str]) -> Corpus:
    return open_conversations(paths, encoder, args.cache_dir, args.on_bad_row, console)


def describe_chats(train: Corpus, heldout: Corpus | None, loader: PackedLoader) -> list[str]:
    held = f"; held out {heldout.num_documents:,}" if heldout else ""
    first = f"data: {train.num_documents:,} conversations, {loader.tokens_per_epoch:,} tokens a pass{held}"
    cuts = str(loader.cuts)
    return [first, f"longer than --seq-len {loader.seq_len}: {cuts}"] if cuts else [first]


def chat_figures(
    model: Model, heldout: Corpus | None, job: Job, args: ChatArgs, final: bool
) -> dict[str, Any]:
    """Loss over the assistant's held-out tokens, and the share of held-out questions answered to the letter."""
    if heldout is None:
        return {}
    figures = heldout_loss(model, heldout, args.seq_len, None if final else args.eval_tokens, job.parallel)
    if args.questions:
        figures |= answered(model, heldout, job, args, final, "heldout")
    return figures


def answered(
    model: Model, heldout: Corpus, job: Job, args: ChatArgs, final: bool, name: str
) -> dict[str, Any]:
    """NAME_exact, the share of the questions answered to the letter, and NAME_questions, their number; on all ranks."""
    asked = questions(heldout, args.seq_len, None if final else args.questions)
    whole = job.parallel.whole(model)
    share = job.parallel.share(lambda: exact_match(cast(Model, whole), job.tokenizer, asked))
    return {f"{name}_exact": share, f"{name}_questions": len(asked)}


def chat_sample(model: Model | None, source: Corpus, job: Job, args: ChatArgs, count: int = 5) -> str:
    """Answers to questions from all over `source`; nothing where there is no model: on all ranks but the first."""
    if model is None:
        return ""
    asked = questions(source.head(args.eval_tokens), args.seq_len)
    return show(model, job.tokenizer, asked[:: max(1, len(asked) // count)][:count])
