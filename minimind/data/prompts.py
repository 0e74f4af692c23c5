"""Prompts to be answered by the model in training, in upstream MiniMind's rlaif format.

A row of a .jsonl file (plain, .gz or .zst) is {"conversations": [message, ...]}, the messages as in conversations.py.
The last one is the assistant's turn that the model is to write: upstream leaves its content empty, or writes that there
is none (NO_REFERENCE). What else stands there is taken for a reference answer, for rewards that compare with one;
"reference" beside "conversations" goes before it; "system" and "tools" are the system message's. All other fields of
the row go to the rewards as they are, and it is said which. forms.py has the forms of other programs.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from rich.console import Console

from minimind.data.fields import HARMLESS
from minimind.data.forms import AUTO, Form
from minimind.data.paths import expand_paths
from minimind.data.reader import iter_rows
from minimind.data.records import START, BadRows, bad_row_error, kind_of, reason_of, reporter
from minimind.data.split import hash_texts
from minimind.utils.progress import say

NO_REFERENCE = (
    "",
    "none",
    "null",
    "无",
    "空",
)  # what stands for no reference, whatever its case and the space around it


class PromptEncoder(Protocol):
    """What is needed of minimind.tokenization.reasoning.ThinkingPrompts."""

    @property
    def fingerprint(self) -> str: ...
    def prompt(self, messages: Sequence[Any]) -> list[int]: ...
    def thinking(self, messages: Sequence[Any]) -> bool | None: ...
    def opening(self, messages: Sequence[Any]) -> str: ...


@dataclass(frozen=True)
class Prompt:
    """messages: before the turn to write; ids: their tokens, with the header of that turn; metadata: the row's other
    fields; thinking: whether the prompt asks for reasoning or for none, None where it leaves that to the model;
    opening: what of the reply stands in the prompt."""

    messages: list[dict[str, Any]]
    ids: list[int]
    reference: str | None = None
    metadata: dict[str, Any] = field(default_factory=dict)
    thinking: bool | None = None
    opening: str = ""


@dataclass(frozen=True)
class PromptSet:
    """In the order of the files. identity: of their tokens and references; left_out: longer than the budget."""

    prompts: list[Prompt]
    identity: int
    left_out: int = 0

    def __len__(self) -> int:
        return len(self.prompts)

    def __getitem__(self, index: int) -> Prompt:
        return self.prompts[index]

    def split(self, share: float, most: int = 256, by_tail: bool = False) -> tuple[PromptSet, PromptSet | None]:
        """(training, held-out) prompts, None for none: `share` is held out, at most `most`, but at least one text:
        those with the lowest hashes, copies together. by_tail: the last ones instead, as earlier versions have it."""
        held = min(most, round(share * len(self)), len(self) - 1)
        if held < 1:
            return self, None
        chosen = range(len(self) - held, len(self)) if by_tail else self._lowest(held)
        kept = [prompt for i, prompt in enumerate(self.prompts) if i not in chosen]
        if not kept:
            return self, None
        return PromptSet(kept, self.identity, self.left_out), PromptSet(
            [self.prompts[i] for i in chosen], self.identity
        )

    def _lowest(self, count: int) -> list[int]:
        """The prompts with the lowest hashes, all of a text or none, `count` at most or those of one text."""
        hashes = hash_texts([json.dumps(prompt.messages, sort_keys=True) for prompt in self.prompts])
        _, group, sizes = np.unique(hashes, return_inverse=True, return_counts=True)
        fitting = max(1, int(np.searchsorted(sizes.cumsum(), count, side="right")))
        return np.flatnonzero(group < fitting).tolist()


def open_prompts(
    paths: Sequence[str | Path],
    encoder: PromptEncoder,
    longest: int,
    on_bad_row: str = "error",
    console: Console | None = None,
    form: Form = AUTO,
) -> PromptSet:
    """The prompts of `paths`. Raises ValueError, naming file:line, on a row that cannot be used, one whose prompt has
    more than `longest` tokens among them; with on_bad_row "skip" such rows are counted and left out."""
    found: list[Prompt] = []
    digest = blake2b(encoder.fingerprint.encode(), digest_size=8)
    long, given = 0, set[str]()
    for path in expand_paths(paths, console):
        if not path.name.endswith((".jsonl", ".jsonl.gz", ".jsonl.zst")):
            raise ValueError(f"{path}: prompts come in .jsonl files")
        bad = BadRows()
        report = reporter(path, on_bad_row, bad)
        for line, _, row in iter_rows(path, START, report):
            try:
                prompt = _prompt(row, encoder, form)
            except ValueError as error:
                report(line, reason_of(error))
                continue
            if len(prompt.ids) > longest:
                if on_bad_row == "error":
                    problem = f"the prompt has {len(prompt.ids)} tokens, more than --max-prompt {longest}"
                    raise bad_row_error(path, line, problem)
                long += 1
                continue
            found.append(prompt)
            given.update(name for name in prompt.metadata if name.lower() not in HARMLESS)
            digest.update(repr((prompt.ids, prompt.reference)).encode())
        if bad.count and console is not None:
            say(console, f"{path}: {bad}")
    if not found:
        raise ValueError(f"--data {' '.join(map(str, paths))}: no prompt that could be answered")
    if given and console is not None:
        say(console, f"beside the prompts, for rewards of your own (Sample.metadata): {', '.join(sorted(given))}")
    if long and console is not None:
        say(console, f"{long:,} prompts of more than --max-prompt {longest} tokens left out")
    return PromptSet(found, int.from_bytes(digest.digest(), "little"), long)


def _prompt(row: dict[str, Any], encoder: PromptEncoder, form: Form) -> Prompt:
    messages, said, more = form.prompt(row)
    reference = _reference(more.pop("reference", None)) or _reference(said)
    ids = encoder.prompt(messages)
    return Prompt(messages, ids, reference, more, encoder.thinking(messages), encoder.opening(messages))


def _reference(said: Any) -> str | None:
    """The answer that a field holds; None where it says that there is none."""
    if said is not None and not isinstance(said, str):
        raise ValueError(f"the reference is {kind_of(said)}, not a string")
    return None if said is None or said.strip().casefold() in NO_REFERENCE else said
