"""The tries of bench/recipe.py: what is changed, by which flags of train/pretrain.py, and where the idea is from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from bench.common.record import Row

BASE = ""  # the name of the reference recipe
# its flags on a CPU; all others have their defaults
REFERENCE = {"batch_tokens": 4096, "muon_iterations": 5, "muon_block": 0, "depth_warmup": 0.0}


@dataclass(frozen=True)
class Try:
    """flags: of train/pretrain.py; about: what they change, and the source."""

    flags: dict[str, Any]
    about: str


def shallow(share: float, **changes: float) -> dict[str, Any]:
    """Flags of a run in steps of 2,048 tokens, of which `share` train a quarter of the layers, with `changes`."""
    return {"batch_tokens": 2048, "muon_iterations": 3, "depth_warmup": share, "depth_layers": 0.25} | changes


@dataclass(frozen=True)
class RecipeRow(Row):
    """One run. attempt: the name of its try, empty for the reference recipe; flags: its flags as JSON. lr: the peak
    rate; seconds, busy_seconds: wall time and processor time of the training steps alone (other work on the machine
    does not lengthen the latter); heldout_loss: nats per token at the end."""

    torch: str
    attempt: str
    flags: str
    corpus: str
    shape: str
    tokens: int
    seed: int
    lr: float
    steps: int
    seconds: float
    busy_seconds: float | None
    heldout_tokens: int
    heldout_loss: float
    heldout_bpb: float


TRIES: dict[str, Try] = {
    "decay-0": Try({"weight_decay": 0.0}, "no weight decay: bounds what cautious decay (2510.12402) could change"),
    "decay-0.3": Try({"weight_decay": 0.3}, "three times the weight decay"),
    "momentum-0.9": Try({"muon_momentum": 0.9}, "Muon's momentum 0.9 instead of 0.95"),
    "to-zero": Try({"final_lr": 0.0}, "the cosine ends at zero instead of a tenth"),
    "linear": Try({"schedule": "wsd", "cooldown": 0.98, "final_lr": 0.0}, "the rate falls linearly to zero after the "
                  "warm-up (2502.15938)"),
    "wsd-0.5": Try({"schedule": "wsd", "cooldown": 0.5, "final_lr": 0.0}, "flat, then linearly to zero in the last "
                   "half of the steps"),
    "steps-2048": Try({"batch_tokens": 2048}, "steps of 2,048 tokens instead of 4,096"),
    "steps-1024": Try({"batch_tokens": 1024}, "steps of 1,024 tokens"),
    "micro-2048": Try({"micro_tokens": 2048}, "two micro-batches of 2,048 tokens in a step: changes its time alone"),
    "short-rows": Try({"seq_len": 256}, "rows of 256 tokens: bounds what short rows at first could gain"),
    "embedding-2": Try({"embedding_lr": 2.0}, "twice the rate for the embedding"),
    "zero-outputs": Try({"output_init": 0.0}, "projections into the residual stream begin at zero (modded-nanogpt)"),
    "normuon": Try({"muon_row_beta": 0.95}, "rows of Muon's updates scaled alike (NorMuon, 2510.05491)"),
    "cautious-decay": Try({"cautious_decay": True, "weight_decay": 0.3}, "three times the decay, only where the update "
                          "agrees (2510.12402)"),
    "iterations-3": Try({"muon_iterations": 3}, "three iterations of Newton-Schulz instead of five"),
    "iterations-2": Try({"muon_iterations": 2}, "two iterations of Newton-Schulz"),
    "momentum-warmup": Try({"momentum_warmup": 0.3}, "Muon's momentum rises from 0.85 over 30% of the steps"),
    "batch-warmup-0.25": Try({"batch_warmup": 0.25}, "a quarter of the tokens in steps of 1,024 and 2,048 tokens"),
    "batch-warmup-0.5": Try({"batch_warmup": 0.5}, "half of the tokens in steps of 1,024 and 2,048 tokens"),
    "steps-2048-iterations-3": Try({"batch_tokens": 2048, "muon_iterations": 3}, "steps-2048 and iterations-3 "
                                   "together"),
    "steps-1024-iterations-3": Try({"batch_tokens": 1024, "muon_iterations": 3}, "steps-1024 and iterations-3 "
                                   "together"),
    "depth-warmup-0.5": Try(shallow(0.5), "in steps-2048-iterations-3 half of the steps train a quarter of the layers "
                            "(1511.05641)"),
    "depth-warmup-0.2": Try(shallow(0.2), "the same in a fifth of the steps"),
    "depth-warmup-0.75": Try(shallow(0.75), "the same in three quarters of the steps"),
    "block-128": Try({"batch_tokens": 2048, "muon_iterations": 3, "muon_block": 128}, "in steps-2048-iterations-3 Muon "
                     "takes blocks of 128 rows or columns instead of whole matrices (2510.16981)"),
    "block-128-depth-0.75": Try(shallow(0.75, muon_block=128), "block-128 and depth-warmup-0.75 together"),
    "block-128-depth-0.875": Try(shallow(0.875, muon_block=128), "the same with seven eighths of the steps"),
    "block-256": Try({"batch_tokens": 2048, "muon_iterations": 3, "muon_block": 256}, "block-128 with larger blocks"),
    "block-256-depth-0.75": Try(shallow(0.75, muon_block=256), "block-256 and depth-warmup-0.75 together"),
    "block-256-depth-0.875": Try(shallow(0.875, muon_block=256), "the same with seven eighths of the steps"),
    "eighth-0.875": Try(shallow(0.875, muon_block=256, depth_layers=0.125), "the same with an eighth of the layers at "
                        "first, at least one, and the peak rate of at most four layers"),
    "eighth-0.9375": Try(shallow(0.9375, muon_block=256, depth_layers=0.125), "the same with fifteen sixteenths of the "
                         "steps"),
    "steps-1024-eighth-0.9375": Try(shallow(0.9375, muon_block=256, depth_layers=0.125, batch_tokens=1024),
                                    "eighth-0.9375 in steps of 1,024 tokens"),
    "steps-1024-block-128": Try({"batch_tokens": 1024, "muon_iterations": 3, "muon_block": 128}, "block-128 in steps "
                                "of 1,024 tokens"),
    "short-run-0.5": Try(shallow(0.5, muon_block=128, batch_tokens=1024), "steps-1024-block-128 and depth-warmup-0.5 "
                         "together"),
    "short-run-0.75": Try(shallow(0.75, muon_block=128, batch_tokens=1024), "the same with three quarters of the "
                          "steps"),
    "short-run-0.875": Try(shallow(0.875, muon_block=128, batch_tokens=1024), "the same with seven eighths of the "
                           "steps"),
    "zero-outputs-2048": Try({"output_init": 0.0, "batch_tokens": 2048}, "zero-outputs and steps-2048 together"),
    "zero-outputs-batch-warmup": Try({"output_init": 0.0, "batch_warmup": 0.5}, "zero-outputs and batch-warmup-0.5 "
                                     "together"),
    "wsd-sqrt": Try({"schedule": "wsd-sqrt", "cooldown": 0.5, "final_lr": 0.0}, "as wsd-0.5, falling by 1 - sqrt "
                    "(2405.18392)"),
    "betas-0.99": Try({"betas": (0.9, 0.99)}, "AdamW's second moment over a hundred steps"),
}  # fmt: skip
