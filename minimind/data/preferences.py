"""Pairs of answers, one preferred to the other, in upstream MiniMind's format.

A row of a .jsonl file (plain, .gz or .zst) is {"chosen": [message, ...], "rejected": [message, ...]}, the messages and
what else it may have as in conversations.py. Both sides end with the assistant, and the first message in which they
differ is the assistant's, so that they answer the same prompt. As upstream does, all turns of the assistant are
targets, those that both sides share among them: in a difference of sums (dpo) these cancel, in averages over tokens
(ipo, simpo, orpo) they count; "weight": 0 leaves one out.

In the token cache a pair is one document, the tokens of the chosen conversation and then those of the rejected one, so
that nothing can separate them; weights.SIDE marks where the second begins. Pairs longer than a row are cut before they
come there: from the beginning of the prompt, on both sides alike, so that what is preferred stays whole. One whose
answers alone are longer is as it was, and left out by the loader.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from minimind.data import loss_mask as weights
from minimind.data.build import PART_BYTES
from minimind.data.cache import open_cached
from minimind.data.conversations import ChatEncoder
from minimind.data.corpus import Corpus
from minimind.data.fields import Messages
from minimind.data.forms import AUTO, Form
from minimind.data.reader import iter_rows
from minimind.data.recipes import Encoded, Vocabulary
from minimind.data.records import BadRows, Document, Position, reason_of, reporter

SIDES = ("chosen", "rejected")


@dataclass(frozen=True)
class Pair(Document):
    """text: both rendered conversations, of which num_bytes are learnt; sides: the parts of each; prompt: the messages
    that both begin with."""

    sides: tuple[Sequence[Any], ...] = ()
    prompt: Sequence[Any] = ()


@dataclass(frozen=True)
class Preferences:
    """The recipe of pairs: both sides rendered by the chat template, targets in the assistant's turns alone.

    longest: tokens of a row, to which the prompts of longer pairs are cut, None for no cut; share: whether the row
    holds what both sides begin with once.
    """

    encoder: ChatEncoder
    longest: int | None = None
    share: bool = True
    form: Form = AUTO
    weighted = True

    @property
    def vocabulary(self) -> Vocabulary:
        return self.encoder

    def key(self) -> list[Any]:
        whole = ["preferences", 1, self.encoder.fingerprint, *self.form.key()]
        return whole if self.longest is None else [*whole, "cut", 1, self.longest, self.share]

    def read(self, path: Path, on_bad_row: str, start: Position, bad: BadRows | None) -> Iterator[Pair]:
        report = reporter(path, on_bad_row, bad)
        for line, end, row in iter_rows(path, start, report):
            try:
                chosen, rejected = self.form.pair(row)
                shared = _check_prompt(chosen, rejected)
                sides = tuple(self._pieces(*side) for side in zip(SIDES, (chosen, rejected), strict=True))
                texts = ["".join(piece.text for piece in pieces) for pieces in sides]
                text = "".join(texts)
                text.encode()
                if texts[0] == texts[1]:
                    raise ValueError("chosen and rejected are the same, so that neither can be preferred")
            except ValueError as error:
                report(line, reason_of(error))
                continue
            learnt = sum(len(piece.text.encode()) for side in sides for piece in side if piece.trained)
            yield Pair(text, learnt, line, end, sides, chosen[:shared])

    def encode(self, documents: list[Pair]) -> Encoded:
        rows = list(self.encoder.encode([side for document in documents for side in document.sides]))
        for i, document in enumerate(documents if self.longest is not None else []):
            rows[2 * i : 2 * i + 2] = self._shortened(document, *rows[2 * i : 2 * i + 2])
        codes = [weights.codes(row.trained, row.markers, row.ends) for row in rows]
        for first in codes:
            first[0] = weights.NONE  # nothing comes before it that could predict it
        for second in codes[1::2]:
            second[0] = weights.SIDE
        tokens = np.concatenate([row.ids for row in rows]).astype(np.uint16)
        lengths = np.array([len(row.ids) for row in rows]).reshape(-1, 2).sum(1)
        return Encoded(tokens, lengths, np.concatenate(codes))

    def _shortened(self, pair: Pair, chosen: Any, rejected: Any) -> tuple[Any, Any]:
        """Both sides, cut to `longest` where they are longer and can be."""
        sides = chosen, rejected
        alike = common_tokens(chosen.ids, rejected.ids, chosen.trained, rejected.trained)
        excess = row_tokens(len(chosen.ids), len(rejected.ids), alike if self.share else 0) - (self.longest or 0)
        if excess <= 0:
            return sides
        keep = self.encoder.shorten(pair.prompt, pair.sides[0], excess if self.share else -(-excess // 2))
        if keep is None:
            return sides
        gone = np.flatnonzero(~keep)
        if gone[-1] >= alike:  # a template that renders one prompt in two ways
            return sides
        return tuple(
            replace(side, **{name: np.delete(array, gone) for name, array in vars(side).items()}) for side in sides
        )

    def _pieces(self, name: str, messages: Messages) -> Sequence[Any]:
        try:
            return self.encoder.pieces(messages)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None


def open_preferences(
    paths: Sequence[str | Path],
    encoder: ChatEncoder,
    cache_dir: str | Path | None = None,
    on_bad_row: str = "error",
    console: Console | None = None,
    part_bytes: int = PART_BYTES,
    longest: int | None = None,
    share: bool = True,
    form: Form = AUTO,
) -> Corpus:
    """The pairs of `paths` as tokens with loss weights; the cache is that of `open_corpus`, its errors too. longest,
    share, form: as of Preferences.

    Raises ValueError, naming file:line, also on a missing side, a malformed message, a side that does not end with the
    assistant, sides that answer different prompts, and sides that are the same.
    """
    recipe = Preferences(encoder, longest, share, form)
    return open_cached(paths, recipe, (".jsonl",), cache_dir, on_bad_row, console, part_bytes)


def common_tokens(a: np.ndarray, b: np.ndarray, of_a: np.ndarray, of_b: np.ndarray) -> int:
    """How many first tokens of two sides a row may hold once: alike in id and in what they are to the loss, all but the
    last of these, which has a target of its own in each side, and but two of the shorter side."""
    least = min(len(a), len(b))
    differ = (a[:least] != b[:least]) | (of_a[:least] != of_b[:least])
    alike = int(differ.argmax()) if differ.any() else least
    return max(0, min(alike - 1, least - 2))


def row_tokens(chosen: Any, rejected: Any, shared: Any) -> Any:
    """Tokens that a pair takes of a row: the last one of a side predicts nothing."""
    return chosen + rejected - 2 - shared


def _check_prompt(chosen: Messages, rejected: Messages) -> int:
    """How many messages both sides begin with."""
    both = zip(chosen, rejected, strict=False)
    shared = min(len(chosen), len(rejected))
    number = next((i for i, (a, b) in enumerate(both) if a != b), shared)
    differing = [side[number]["role"] for side in (chosen, rejected) if number < len(side)]
    if any(role != "assistant" for role in differing):
        raise ValueError(
            f"chosen and rejected differ first in message {number}, of the {differing[0]}: both must answer one prompt"
        )
    return number
