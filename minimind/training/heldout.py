"""Figures of data that is never trained on, and what a batch held."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import torch

from minimind.data import Batch, Corpus, PackedLoader
from minimind.modeling import Model
from minimind.objectives.next_token import next_token_nats
from minimind.tokenization import Tokenizer
from minimind.training.batches import to_device
from minimind.training.parallel import Parallel


def heldout_loss(
    model: Model, heldout: Corpus | None, seq_len: int, max_tokens: int | None, parallel: Parallel
) -> dict[str, Any]:
    """Held-out loss in nats per target and bits per UTF-8 byte of target text, over the first max_tokens (None: over
    all); every rank takes its share of the rows and all return the same. Nothing without held-out data."""
    if heldout is None:
        return {}
    model.eval()
    if max_tokens is not None:
        # whole documents: with a part of the packed rows instead, bytes and tokens would not belong together
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
    """heldout_loss of every set, under heldout_NAME_loss and so on."""
    found: dict[str, Any] = {}
    for name, view in sets.items():
        found |= rename(name, heldout_loss(model, view, seq_len, max_tokens, parallel))
    return found


def rename(name: str, figures: Mapping[str, Any]) -> dict[str, Any]:
    """The figures heldout_... as heldout_NAME_...; heldout_all stays, as it says of which part of the data they are."""
    return {
        key if key == "heldout_all" else key.replace("heldout", f"heldout_{name}", 1): value
        for key, value in figures.items()
    }


def loss_lines(values: Mapping[str, Any], unit: str, scope: str) -> list[str]:
    """A line for each held-out loss in a row of figures: the main one, then those of named sets."""
    lines = []
    for key, loss in values.items():
        found = re.fullmatch(r"heldout_(?:(\w+)_)?loss", key)
        if found is None:
            continue
        prefix, size = key.removesuffix("loss"), f" ({scope})"
        if f"{prefix}bpb" in values:
            tokens = f"{values[f'{prefix}tokens']:,} tokens"
            size = f", {values[f'{prefix}bpb']:.4f} bits/byte ({tokens}, {scope})"
        lines.append(f"held-out loss{f' of {found[1]}' if found[1] else ''} {loss:.4f} {unit}{size}")
    return lines


def describe(batch: Batch, corpus: Corpus, tokenizer: Tokenizer) -> list[dict[str, Any]]:
    """Which documents are in a batch, where they stand and how they begin, for a post-mortem."""
    found = []
    for i in sorted({int(i) for row in batch.documents for i in row}):
        path, number = corpus.locate(i)
        text = tokenizer.decode(corpus.document(i)[:48].tolist())
        found.append({"file": str(path), "document": number, "begins": text})
    return found
