"""Atomic checkpoints: a folder is either complete or does not exist.

checkpoints/step-00000250/
    config.json  model.safetensors    the model for load_model: float32, upstream's names
    tokenizer.json ...                the tokenizer it was trained with
    trainer.pt                        optimizer, RNG, data position; loads with weights_only=True
    average/                          with --ema: the averaged weights and the tokenizer, as another model
checkpoints/best-00000200/            with --keep-best: the same without trainer.pt; opening the run opens it
"""

from __future__ import annotations

import os
import pickle
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch.distributed.checkpoint.state_dict import set_model_state_dict

from minimind.modeling import Model
from minimind.tokenization import Tokenizer
from minimind.training.parallel import Parallel, from_rank_0
from minimind.utils.files import sync
from minimind.weights import load_model, save_weights

_PREFIX, _BEST = "step-", "best-"
_WAY_OUT = "delete that folder to resume from the previous one"


def save_checkpoint(
    run: Path,
    step: int,
    model: Model,
    tokenizer: Tokenizer,
    trainer: dict[str, Any],
    keep: int,
    save_model: Callable[[Model, Path], None] = save_weights,
    branch: int = 0,
) -> Path:
    """Write a checkpoint of `step` under run/checkpoints, then delete all but the newest `keep` and that of step
    `branch`.

    trainer: the trainer's state, plain Python values and tensors. save_model(model, folder) makes the folder. Raises
    ValueError when the disk is full; earlier checkpoints stay.
    """

    def fill(folder: Path) -> None:
        save_model(model, folder)
        tokenizer.save(folder)
        torch.save(trainer, folder / "trainer.pt")

    final = _write(run, f"{_PREFIX}{step:08d}", fill)
    _drop(folder for folder in list_checkpoints(run)[:-keep] if step_of(folder) != branch)
    return final


def save_best(
    run: Path, step: int, model: Model, tokenizer: Tokenizer, save_model: Callable[[Model, Path], None] = save_weights
) -> Path:
    """Write the weights of `step` as the run's best and delete the previous ones. Raises as save_checkpoint does."""

    def fill(folder: Path) -> None:
        save_model(model, folder)
        tokenizer.save(folder)

    final = _write(run, best_folder(run, step).name, fill)
    _drop([folder for folder in run.glob(f"checkpoints/{_BEST}*") if folder != final])
    return final


def _write(run: Path, name: str, fill: Callable[[Path], None]) -> Path:
    root = run / "checkpoints"
    root.mkdir(parents=True, exist_ok=True)
    final = root / name
    if final.exists():
        return final
    partial = root / f".partial-{name}-{os.getpid()}"
    try:
        fill(partial)
        for file in [*partial.rglob("*"), partial]:
            sync(file)
        os.replace(partial, final)
        sync(root)
    except (OSError, RuntimeError, SafetensorError) as error:  # a full disk may surface as any of these
        shutil.rmtree(partial, ignore_errors=True)
        raise ValueError(
            f"{final}: cannot write the checkpoint ({error}); free some space, then run the same command again"
        ) from error
    return final


def _drop(folders: Iterable[Path]) -> None:
    for old in folders:
        gone = old.with_name(f".partial-{old.name}")  # a half-deleted folder must not have a complete one's name
        os.replace(old, gone)
        shutil.rmtree(gone)


def list_checkpoints(run: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    return sorted(run.glob(f"checkpoints/{_PREFIX}*"))


def best_folder(run: Path, step: int) -> Path:
    """The folder in which `save_best` keeps the weights of `step`."""
    return run / "checkpoints" / f"{_BEST}{step:08d}"


def step_of(checkpoint: Path) -> int:
    """The step after which a checkpoint was written."""
    return int(checkpoint.name.removeprefix(_PREFIX))


def remove_partial(run: Path) -> None:
    """Delete the unfinished checkpoints of a killed process."""
    for folder in run.glob("checkpoints/.partial-*"):
        shutil.rmtree(folder, ignore_errors=True)


def load_trainer_state(checkpoint: Path) -> dict[str, Any]:
    """The contents of trainer.pt. Raises ValueError if it is missing or damaged."""
    try:
        state = torch.load(checkpoint / "trainer.pt", map_location="cpu", weights_only=True)
        if not isinstance(state, dict) or not {"step", "optimizer", "loader"} <= state.keys():
            raise RuntimeError("it is not a trainer's state")
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise ValueError(f"{checkpoint / 'trainer.pt'}: unreadable ({reason}); {_WAY_OUT}") from error
    return state


def share_trainer_state(checkpoint: Path, parallel: Parallel) -> dict[str, Any]:
    """The trainer's state for all ranks, read on rank 0; the optimizer's part, which is large, stays on rank 0."""
    optimizer: dict[str, Any] = {}

    def read() -> dict[str, Any]:
        state = load_trainer_state(checkpoint)
        optimizer.update(state.pop("optimizer"))
        return state

    return parallel.share(read) | {"optimizer": optimizer}


def load_weights_into(model: Model, checkpoint: Path, parallel: Parallel) -> None:
    """Copy a checkpoint's float32 weights, read on rank 0, into `model` in place. All ranks call it."""
    try:
        weights = load_model(checkpoint, config=model.config).state_dict() if parallel.main else {}
    except ValueError as error:
        raise ValueError(f"{error}; {_WAY_OUT}") from error
    set_model_state_dict(model, weights, options=from_rank_0())
