"""Reward models in training: batches of scored pairs, checkpoints with the value head, held-out scores and samples."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.distributed.checkpoint.state_dict import set_model_state_dict

from minimind.data import Corpus
from minimind.data.encoding import NONE, SIDE, class_of
from minimind.data.pair_loader import PairBatch, PairLoader
from minimind.lora_files import read_adapter
from minimind.modeling import Model
from minimind.objectives.preference import RewardBatch, reward_loss
from minimind.ops.attention import SharedPrefix
from minimind.tokenization import Tokenizer
from minimind.training.adapters import AdapterSetup, adapter_saver, set_parameters
from minimind.training.batches import move
from minimind.training.data_split import DataSplit
from minimind.training.evaluation import rename
from minimind.training.initial_model import InitialModel
from minimind.training.job import Job
from minimind.training.metrics import plot_figures
from minimind.training.parallel import Parallel, from_rank_0
from minimind.training.stages.chats import turns
from minimind.training.stages.pairs import PairArgs, heldout_loader, pair_means, unfold
from minimind.utils.display import say
from minimind.value_head import ValueModel, load_value_model, read_head, save_head, save_value_model

FIGURES = ("accuracy", "margin", "chosen_score", "rejected_score")  # of reward_loss, besides the loss
_SHOWN = 120  # characters of a prompt and of an answer in samples


class InitialValueModel(InitialModel):
    """The initial model with a value head of zeros."""

    def load(self) -> ValueModel:
        return ValueModel.from_model(super().load())


def checkpoint_functions(setup: AdapterSetup) -> dict[str, Any]:
    """save_model and load_model of Stage for a reward model: whole, or an adapter with the head."""
    if setup.config is None:
        return {"save_model": save_value_model, "load_model": load_value_weights_into}
    save_adapter = adapter_saver(setup.job)

    def save(model: Model, folder: Path) -> None:
        save_adapter(model, folder)
        save_head(model, folder)

    def load(model: Model, checkpoint: Path, parallel: Parallel) -> None:
        state = read_adapter(model, checkpoint) if parallel.main else {}
        if parallel.main:
            state["value_head.weight"] = read_head(checkpoint)
        set_parameters(model, state)

    return {"save_model": save, "load_model": load}


def load_value_weights_into(model: Model, checkpoint: Any, parallel: Parallel) -> None:
    """Copy a checkpoint's float32 weights, read on rank 0, into `model` in place. All ranks call it."""
    weights = load_value_model(checkpoint, model.config).state_dict() if parallel.main else {}
    set_model_state_dict(model, weights, options=from_rank_0())


def to_device(batch: PairBatch, device: torch.device, boundaries: int | None = None) -> RewardBatch:
    """The packed rows as tensors. boundaries: as in batches.to_device."""
    places = np.flatnonzero(batch.targets != -100)  # an answer is scored where its end token is predicted
    ends = [
        places[np.searchsorted(places, batch.cu_seqlens[sides + 1]) - 1] for sides in (batch.chosen, batch.rejected)
    ]
    shared = [batch.position_ids, *unfold(batch, boundaries)] if batch.share else []
    input_ids, targets, bounds, chosen, rejected, *more = move(batch, device, boundaries, [*ends, *shared])
    counts = batch.num_targets, batch.global_num_targets, batch.global_num_pairs
    prefix = (more[0], SharedPrefix(*more[1:])) if shared else ()
    return RewardBatch(input_ids, targets, bounds, chosen, rejected, *counts, *prefix)


def evaluate_scores(
    model: ValueModel, split: DataSplit, job: Job, args: PairArgs, centering: float, rows: int, final: bool
) -> dict[str, Any]:
    """How well the scores tell chosen from rejected answers, on every held-out set; the final figures of all pairs.
    centering: as in reward_loss; rows: of a batch over all ranks."""
    values: dict[str, Any] = {}
    for name, whole in split.heldout_sets.items():
        view = whole if final else whole.head(args.eval_tokens)
        figures = heldout_scores(model, heldout_loader(view, args, rows, job.parallel), centering, job.parallel)
        say(
            job.console,
            f"of {figures['heldout_pairs']:,} held-out pairs{f' of {name}' if name else ''} "
            f"{figures['heldout_accuracy']:.1%} have the chosen answer score higher; margin "
            f"{figures['heldout_margin']:.3f}",
        )
        values |= (rename(name, figures) if name else figures) | {"heldout_all": final}
    return values


@torch.no_grad()
def heldout_scores(model: ValueModel, loader: PairLoader, centering: float, parallel: Parallel) -> dict[str, Any]:
    """Means over the pairs of `loader`, as heldout_NAME: of the loss and of FIGURES. All ranks call it and return the
    same."""
    model.eval()
    return pair_means(
        lambda batch: reward_loss(model, to_device(batch, model.device), centering),
        loader,
        FIGURES,
        model.device,
        parallel,
    )


@torch.no_grad()
def show_scores(model: ValueModel, tokenizer: Tokenizer, corpus: Corpus, count: int) -> str:
    """`count` pairs spread over `corpus`, a line each: the end of the prompt, then the score and the beginning of each
    answer, the chosen one first."""
    model.eval()
    lines = []
    for i in range(0, corpus.num_documents, max(1, corpus.num_documents // count)):
        ids, codes = corpus.document(i).astype(np.int64), corpus.codes(i)
        second = int(np.flatnonzero(codes & SIDE)[0])
        sides = [_scored(model, ids[part], codes[part]) for part in (slice(second), slice(second, None))]
        prompt = turns(tokenizer, sides[0][1].tolist())
        prompt = prompt if len(prompt) <= _SHOWN else f"... {prompt[-_SHOWN:]}"
        texts = [(score, tokenizer.decode(answer.tolist())) for score, _, answer in sides]
        answers = [f"{score:+.2f} {t if len(t) <= _SHOWN else f'{t[:_SHOWN]} ...'}" for score, t in texts]
        lines.append(" | ".join((prompt, *answers)).replace("\n", "\\n"))
    return "\n".join(lines[:count])


def _scored(model: ValueModel, ids: np.ndarray, codes: np.ndarray) -> tuple[float, np.ndarray, np.ndarray]:
    """(score, prompt, last answer without its end token) of one conversation."""
    trained = class_of(codes) != NONE
    trained[0] = False  # the marker of the second side is no target
    end = int(np.flatnonzero(trained)[-1])
    start = int(np.flatnonzero(~trained[:end])[-1]) + 1
    read = torch.from_numpy(ids[:end])[None].to(model.device)
    return model(read).values[0, -1].item(), ids[:start], ids[start:end]


def draw_scores(run: Path) -> None:
    """Draw how the held-out figures changed over the run."""
    accuracy = {"heldout_accuracy": "chosen answer scores higher"}
    scores = {"heldout_chosen_score": "chosen", "heldout_rejected_score": "rejected", "heldout_margin": "margin"}
    plot_figures(run / "metrics.jsonl", run / "accuracy.png", run.name, "share of held-out pairs", accuracy)
    plot_figures(run / "metrics.jsonl", run / "scores.png", run.name, "score, held-out pairs", scores)
