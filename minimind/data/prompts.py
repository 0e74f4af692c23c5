"""Read prompts for reinforcement learning, in upstream MiniMind's rlaif format.

A row of a .jsonl file (plain, .gz or .zst) is {"conversations": [message, ...]}, with messages as in encoding.py. The
last one is the assistant's turn that the model is to write; its content is empty, a word for "none" (NO_REFERENCE), or
a reference answer for rewards that compare with one. A field "reference" of the row takes precedence; "system" and
"tools" belong to the system message. All other fields are passed to the rewards unchanged. formats.py reads the formats
of other programs.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from minimind.data.fields import HARMLESS, kind_of
from minimind.data.formats import AUTO, RowFormat
from minimind.data.paths import expand_paths
from minimind.data.reader import START, BadRows, bad_row_error, iter_rows, reason_of, reporter
from minimind.data.split import hash_texts
from minimind.tokenization.reasoning import ThinkingPrompts
from minimind.utils.display import say

NO_REFERENCE = ("", "none", "null", "无", "空")  # in any case, with any space around


@dataclass(frozen=True)
class Prompt:
    """messages: those before the turn to write; ids: their tokens and the header of that turn; metadata: the row's
    other fields; thinking: whether the prompt asks for reasoning, None if the model chooses; opening: the beginning of
    the reply that the prompt contains."""

    messages: list[dict[str, Any]]
    ids: list[int]
    reference: str | None = None
    metadata: dict[str, Any] = field(default_factory=dict)
    thinking: bool | None = None
    opening: str = ""


@dataclass(frozen=True)
class PromptSet:
    """Prompts in the order of the files. identity: a hash of tokens and references; left_out: prompts that were too
    long."""

    prompts: list[Prompt]
    identity: int
    left_out: int = 0

    def __len__(self) -> int:
        return len(self.prompts)

    def __getitem__(self, index: int) -> Prompt:
        return self.prompts[index]

    def split(self, share: float, most: int = 256, by_tail: bool = False) -> tuple[PromptSet, PromptSet | None]:
        """(training, held-out) prompts. `share` of them is held out, at most `most` but at least one text; None if no
        training prompt would remain. They are those with the lowest hashes, copies together; by_tail: the last ones,
        as in earlier versions."""
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
        """The numbers of the prompts with the lowest hashes: at most `count`, or all copies of one text."""
        hashes = hash_texts([json.dumps(prompt.messages, sort_keys=True) for prompt in self.prompts])
        _, group, sizes = np.unique(hashes, return_inverse=True, return_counts=True)
        fitting = max(1, int(np.searchsorted(sizes.cumsum(), count, side="right")))
        return np.flatnonzero(group < fitting).tolist()


def open_prompts(
    paths: Sequence[str | Path],
    encoder: ThinkingPrompts,
    longest: int,
    on_bad_row: str = "error",
    console: Console | None = None,
    form: RowFormat = AUTO,
) -> PromptSet:
    """The prompts of `paths`. Raises ValueError, naming file:line, on a bad row and on a prompt of more than `longest`
    tokens; on_bad_row "skip" counts such rows and leaves them out."""
    prompts: list[Prompt] = []
    digest = blake2b(encoder.fingerprint.encode(), digest_size=8)
    too_long, other_fields = 0, set[str]()
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
                too_long += 1
                continue
            prompts.append(prompt)
            other_fields.update(name for name in prompt.metadata if name.lower() not in HARMLESS)
            digest.update(repr((prompt.ids, prompt.reference)).encode())
        if bad.count and console is not None:
            say(console, f"{path}: {bad}")
    if not prompts:
        raise ValueError(f"--data {' '.join(map(str, paths))}: no usable prompt; add rows or raise --max-prompt")
    if other_fields and console is not None:
        say(console, f"further fields, for rewards of your own (Sample.metadata): {', '.join(sorted(other_fields))}")
    if too_long and console is not None:
        say(console, f"{too_long:,} prompts of more than --max-prompt {longest} tokens left out")
    return PromptSet(prompts, int.from_bytes(digest.digest(), "little"), too_long)


def _prompt(row: dict[str, Any], encoder: ThinkingPrompts, form: RowFormat) -> Prompt:
    messages, answer, more = form.prompt(row)
    reference = _reference(more.pop("reference", None)) or _reference(answer)
    ids = encoder.prompt(messages)
    return Prompt(messages, ids, reference, more, encoder.thinking(messages), encoder.opening(messages))


def _reference(value: Any) -> str | None:
    """The reference answer in a field, or None."""
    if value is not None and not isinstance(value, str):
        raise ValueError(f"the reference is {kind_of(value)}, not a string")
    return None if value is None or value.strip().casefold() in NO_REFERENCE else value
