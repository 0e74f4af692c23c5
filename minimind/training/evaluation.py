"""Held-out figures: computing, reporting and comparing them, so that the best weights can be kept.

The trainer uses `Evaluation`; the functions below it compute the losses that stages report.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from minimind.data import Batch, Corpus, PackedLoader
from minimind.modeling import Model
from minimind.objectives.next_token import next_token_nats
from minimind.tokenization import Tokenizer
from minimind.training.batches import to_device
from minimind.training.checkpoint import save_best
from minimind.training.optim import WeightAverage
from minimind.training.parallel import Parallel


@dataclass
class BestFigure:
    """The best held-out figure so far, of those measured on the same documents. since: evaluations after it."""

    step: int = 0
    value: float = math.nan
    since: int = 0

    def update(self, step: int, values: Mapping[str, Any]) -> bool:
        """Whether the figures of `step` are the best so far: the lowest loss, or without a loss the highest reward."""
        value, sign = values.get("heldout_loss"), 1
        if value is None:
            value, sign = values["heldout_reward"], -1
        if math.isnan(self.value) or sign * value < sign * self.value:
            self.step, self.value, self.since = step, value, 0
            return True
        self.since += 1
        return False

    def summary(self) -> str:
        return (
            f"best held-out figure {self.value:.4f} at step {self.step}, {self.since} evaluations ago; opening the run "
            "takes its weights"
        )


@dataclass
class Evaluation:
    """Measures a stage's held-out figures during a run, of the averaged weights too, and remembers the best.

    keeps_best: whether the best weights are kept. patience: evaluations without a better figure after which training
    ends, or None. line: the newest figure, for the progress line.
    """

    evaluate: Callable[[bool], dict[str, Any]]
    loss_unit: str = "nats per token"
    keeps_best: bool = False
    patience: int | None = None
    average: WeightAverage | None = None
    best: BestFigure = field(default_factory=BestFigure)
    line: str = ""

    @property
    def exhausted(self) -> bool:
        """Whether --patience is used up."""
        return self.patience is not None and self.best.since >= self.patience

    def measure(self, final: bool, say: Callable[[str], None]) -> dict[str, Any]:
        """The held-out figures, reported by `say`; empty without held-out data. final: of all held-out data."""
        values = self.evaluate(final)
        if values and self.average is not None:
            values |= self._measure_average(self.average, final, say)
        if "heldout_reward" in values:
            self.line = f"held-out {values['heldout_reward']:.3f}  "
        if "heldout_loss" in values:
            self.line = f"held-out {values['heldout_loss']:.3f}  "
        for text in figure_lines(values, self.loss_unit, "all of it" if final else "same part each time"):
            say(text)
        return values

    def _measure_average(self, average: WeightAverage, final: bool, say: Callable[[str], None]) -> dict[str, Any]:
        """The held-out figures of the averaged weights, named like those of a set called ema."""
        say("of the averaged weights:")
        with average.in_place():
            values = self.evaluate(final)
        values = rename("ema", {name: value for name, value in values.items() if name.startswith("heldout_")})
        return {name: value for name, value in values.items() if name != "heldout_all"}

    def is_best(self, step: int, values: Mapping[str, Any]) -> bool:
        """Whether the figures of `step` are the best so far and their weights are to be kept. Raises ValueError where
        there is nothing to compare."""
        if not self.keeps_best:
            return False
        if not values:
            raise ValueError("--keep-best and --patience need held-out data; hold some out with --heldout")
        return self.best.update(step, values)

    def save_best(
        self,
        run: Path,
        model: Model,
        tokenizer: Tokenizer,
        save_model: Callable[[Model, Path], None],
        parallel: Parallel,
    ) -> None:
        """Keep the weights of the best step, which are the current ones. All ranks call it."""
        whole = parallel.whole(model)

        def write() -> None:
            assert whole is not None
            save_best(run, self.best.step, whole, tokenizer, save_model)

        parallel.share(write)


def warn_of_chance(
    evaluate: Callable[[bool], dict[str, Any]], vocab_size: int, weights: Path, say: Callable[[str], None]
) -> Callable[[bool], dict[str, Any]]:
    """Wrap `evaluate` to warn at its first call if the initial weights predict held-out tokens worse than chance. For a
    .pth file, which brings no tokenizer, nothing else would reveal that the tokenizer is wrong."""
    chance = math.log(vocab_size)
    first = True

    def checked(final: bool) -> dict[str, Any]:
        nonlocal first
        values = evaluate(final)
        if first and values.get("heldout_loss", 0.0) > chance:
            say(
                f"warning: {weights} predicts held-out tokens at {values['heldout_loss']:.2f} nats, worse than a guess "
                f"({chance:.2f}): is this the tokenizer that it was trained with?"
            )
        first = False
        return values

    return checked


def heldout_loss(
    model: Model, heldout: Corpus | None, seq_len: int, max_tokens: int | None, parallel: Parallel
) -> dict[str, Any]:
    """Held-out loss in nats per target and in bits per UTF-8 byte of target text, over the first max_tokens (None: all
    of them). Every rank takes its share of the rows and all return the same. Empty without held-out data."""
    if heldout is None:
        return {}
    model.eval()
    if max_tokens is not None:
        # whole documents: in a part of the packed rows, bytes and tokens would not belong together
        heldout = heldout.head(max_tokens)
    device, ranks = model.device, parallel.world_size
    rows = ranks * max(1, 4096 // seq_len)
    loader = PackedLoader(heldout, seq_len, rows, 0, False, parallel.rank, ranks)
    sums = torch.zeros(3, dtype=torch.float64, device=device)  # nats, targets, bytes
    for batch in loader.epoch_batches():
        nats = next_token_nats(model, to_device(batch, device))
        sums[0] += nats.double()
        sums[1:] += sums.new_tensor([batch.num_targets, batch.num_bytes])
    total, targets, text_bytes = parallel.sum(sums).tolist()
    return {
        "heldout_loss": total / targets,
        "heldout_bpb": total / math.log(2) / max(1, text_bytes),
        "heldout_tokens": int(targets),
        "heldout_all": max_tokens is None,
    }


def named_losses(
    model: Model, sets: Mapping[str, Corpus], seq_len: int, max_tokens: int | None, parallel: Parallel
) -> dict[str, Any]:
    """heldout_loss of every set, as heldout_NAME_loss and so on."""
    figures: dict[str, Any] = {}
    for name, corpus in sets.items():
        figures |= rename(name, heldout_loss(model, corpus, seq_len, max_tokens, parallel))
    return figures


def rename(name: str, figures: Mapping[str, Any]) -> dict[str, Any]:
    """The figures heldout_... as heldout_NAME_...; heldout_all keeps its name, as it applies to all of a row."""
    return {
        key if key == "heldout_all" else key.replace("heldout", f"heldout_{name}", 1): value
        for key, value in figures.items()
    }


def figure_lines(values: Mapping[str, Any], unit: str, scope: str) -> list[str]:
    """Lines that report held-out figures: the reward, or every loss; the first with the share of exact answers."""
    if "heldout_reward" in values:
        lines = [f"held-out reward {values['heldout_reward']:.4f} per prompt ({scope})"]
    else:
        lines = loss_lines(values, unit, scope)
    if lines and "heldout_exact" in values:
        lines[0] += f"; {values['heldout_exact']:.1%} of {values['heldout_questions']} answers exact"
    return lines


def loss_lines(values: Mapping[str, Any], unit: str, scope: str) -> list[str]:
    """A line for every held-out loss: the main one, then those of named sets."""
    lines = []
    for key, loss in values.items():
        match = re.fullmatch(r"heldout_(?:(\w+)_)?loss", key)
        if match is None:
            continue
        prefix, size = key.removesuffix("loss"), f" ({scope})"
        if f"{prefix}bpb" in values:
            tokens = f"{values[f'{prefix}tokens']:,} tokens"
            size = f", {values[f'{prefix}bpb']:.4f} bits/byte ({tokens}, {scope})"
        lines.append(f"held-out loss{f' of {match[1]}' if match[1] else ''} {loss:.4f} {unit}{size}")
    return lines


def describe_batch(batch: Batch, corpus: Corpus, tokenizer: Tokenizer) -> list[dict[str, Any]]:
    """The documents in a batch: their files, their numbers there and their first words."""
    documents = []
    for i in sorted({int(i) for row in batch.documents for i in row}):
        path, number = corpus.locate(i)
        text = tokenizer.decode(corpus.document(i)[:48].tolist())
        documents.append({"file": str(path), "document": number, "begins": text})
    return documents
