"""Preference pairs to a reward model: on the device, in held-out figures, in samples; and the model as a run has it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.distributed.checkpoint.state_dict import set_model_state_dict

from minimind.data import Corpus
from minimind.data.loss_mask import NONE, SIDE, class_of
from minimind.data.pair_loader import PairBatch, PairLoader
from minimind.lora_files import read_adapter
from minimind.modeling import Model
from minimind.objectives.preference import RewardBatch, reward_loss
from minimind.ops.attention import SharedPrefix
from minimind.tokenization import Tokenizer
from minimind.training.adapters import Adapting, put, saver
from minimind.training.batches import move
from minimind.training.origin import InitialModel
from minimind.training.parallel import Parallel, from_rank_0
from minimind.training.stages.answers import turns
from minimind.training.stages.pairs import unfold
from minimind.value_head import ValueModel, load_value_model, read_head, save_head, save_value_model

# What reward_loss tells besides the loss.
FIGURES = ("accuracy", "margin", "chosen_score", "rejected_score")
_SHOWN = 120  # characters of a prompt and of an answer in samples


class InitialValueModel(InitialModel):
    """What a run begins with, the model with a value head of zeros."""

    def model(self) -> ValueModel:
        return ValueModel.from_model(super().model())


def files(adapting: Adapting) -> dict[str, Any]:
    """Of Objective: how checkpoints of a reward model are written and read, whole or an adapter with the head."""
    if adapting.config is None:
        return {"save_model": save_value_model, "load_model": load_value_weights_into}
    save_adapter = saver(adapting.job)

    def save(model: Model, folder: Path) -> None:
        save_adapter(model, folder)
        save_head(model, folder)

    def load(model: Model, checkpoint: Path, parallel: Parallel) -> None:
        state = read_adapter(model, checkpoint) if parallel.main else {}
        if parallel.main:
            state["value_head.weight"] = read_head(checkpoint)
        put(model, state)

    return {"save_model": save, "load_model": load}


def load_value_weights_into(model: Model, checkpoint: Any, parallel: Parallel) -> None:
    """Copy a checkpoint's float32 weights, read on rank 0, into `model` in place. All ranks call it."""
    weights = load_value_model(checkpoint, model.config).state_dict() if parallel.main else {}
    set_model_state_dict(model, weights, options=from_rank_0())


def to_device(batch: PairBatch, device: torch.device, boundaries: int | None = None) -> RewardBatch:
    """The packed rows as tensors. boundaries: as in batches.to_device."""
    places = np.flatnonzero(batch.targets != -100)  # the last of an answer is where its end token is to be predicted
    ends = [
        places[np.searchsorted(places, batch.cu_seqlens[sides + 1]) - 1] for sides in (batch.chosen, batch.rejected)
    ]
    once = [batch.position_ids, *unfold(batch, boundaries)] if batch.share else []
    input_ids, targets, bounds, chosen, rejected, *more = move(batch, device, boundaries, [*ends, *once])
    counts = batch.num_targets, batch.global_num_targets, batch.global_num_pairs
    shared = (more[0], SharedPrefix(*more[1:])) if once else ()
    return RewardBatch(input_ids, targets, bounds, chosen, rejected, *counts, *shared)


@torch.no_grad()
def heldout_scores(model: ValueModel, loader: PairLoader, centering: float, parallel: Parallel) -> dict[str, Any]:
    """heldout_loss, the loss's mean over the pairs of `loader`, and the means of FIGURES, as heldout_NAME; every rank
    takes its share of the rows and all return the same."""
    model.eval()
    device = model.device
    sums = torch.zeros(1 + len(FIGURES), dtype=torch.float64, device=device)
    for host in loader.epoch_batches():
        loss, _, figures = reward_loss(model, to_device(host, device), centering)
        sums += torch.stack((loss, *(figures[name] for name in FIGURES))).double()
    means = (parallel.sum(sums) / loader.num_pairs).tolist()
    named = zip(("loss", *FIGURES), means, strict=True)
    return {f"heldout_{name}": value for name, value in named} | {"heldout_pairs": loader.num_pairs}


@torch.no_grad()
def show_scores(model: ValueModel, tokenizer: Tokenizer, corpus: Corpus, count: int) -> str:
    """Pairs from all over `corpus`: the end of the prompt, and the beginning of each answer behind its score, the
    chosen one first."""
    model.eval()
    lines = []
    for i in range(0, corpus.num_documents, max(1, corpus.num_documents // count)):
        ids, codes = corpus.document(i).astype(np.int64), corpus.codes(i)
        second = int(np.flatnonzero(codes & SIDE)[0])
        sides = [_scored(model, ids[part], codes[part]) for part in (slice(second), slice(second, None))]
        prompt = turns(tokenizer, sides[0][1].tolist())
        prompt = prompt if len(prompt) <= _SHOWN else f"... {prompt[-_SHOWN:]}"
        texts = [(score, tokenizer.decode(answer.tolist())) for score, _, answer in sides]
        said = [f"{score:+.2f} {t if len(t) <= _SHOWN else f'{t[:_SHOWN]} ...'}" for score, t in texts]
        lines.append(" | ".join((prompt, *said)).replace("\n", "\\n"))
    return "\n".join(lines[:count])


def _scored(model: ValueModel, ids: np.ndarray, codes: np.ndarray) -> tuple[float, np.ndarray, np.ndarray]:
    """(score, prompt, last answer) of one conversation, the token that ends it left out."""
    trained = class_of(codes) != NONE
    trained[0] = False  # the mark of the second side is no target
    end = int(np.flatnonzero(trained)[-1])
    start = int(np.flatnonzero(~trained[:end])[-1]) + 1
    read = torch.from_numpy(ids[:end])[None].to(model.device)
    return model(read).values[0, -1].item(), ids[:start], ids[start:end]
