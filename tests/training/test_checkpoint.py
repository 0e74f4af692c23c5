"""Checkpoints are complete or do not exist."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError

from minimind import ModelConfig, load_model, load_tokenizer, weights
from minimind.lora import LoRAConfig, add_adapter
from minimind.lora_files import save_adapter
from minimind.modeling import Model
from minimind.training import checkpoint
from minimind.training.checkpoint import list_checkpoints, load_trainer_state, load_weights_into, save_checkpoint
from minimind.training.parallel import Parallel
from minimind.value_head import ValueModel, save_value_model

CONFIG = ModelConfig(32, 1, 2, 1, 16, 48, 50)


def save(run, step, keep=2):
    state = {"step": step, "optimizer": {}, "loader": {}}
    return save_checkpoint(run, step, Model(CONFIG), load_tokenizer(), state, keep)


def test_keeps_the_newest(tmp_path):
    for step in (1, 2, 3):
        save(tmp_path, step)
    assert [c.name for c in list_checkpoints(tmp_path)] == ["step-00000002", "step-00000003"]
    assert len(list((tmp_path / "checkpoints").iterdir())) == 2
    assert load_trainer_state(list_checkpoints(tmp_path)[-1])["step"] == 3


@pytest.mark.parametrize("failing", ["save_file", "sync", "torch.save"])
def test_full_disk_leaves_the_older_checkpoint_and_nothing_else(tmp_path, monkeypatch, failing):
    save(tmp_path, 1)

    def full(*args, **kwargs):
        raise {
            "save_file": SafetensorError("I/O error: No space left on device"),
            "sync": OSError(28, "No space left on device"),
            "torch.save": RuntimeError("PytorchStreamWriter failed writing file"),
        }[failing]

    owner = {"save_file": weights, "sync": checkpoint, "torch.save": torch}[failing]
    name = failing.removeprefix("torch.")
    monkeypatch.setattr(owner, name, full)
    with pytest.raises(ValueError, match=r"step-00000002: cannot write the checkpoint .* free some space"):
        save(tmp_path, 2)
    monkeypatch.undo()
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step-00000001"]
    assert load_model(tmp_path).config == CONFIG


def adapter(folder: Path) -> None:
    model = Model(CONFIG)
    add_adapter(model, LoRAConfig(rank=2))
    save_adapter(model, folder)


@pytest.mark.parametrize(
    "write",
    [lambda folder: save(folder, 1), lambda folder: save_value_model(ValueModel(CONFIG), folder), adapter],
    ids=["checkpoint", "value model", "adapter"],
)
def test_files_follow_the_umask(tmp_path, write: Callable[[Path], None]):
    """On a shared machine another user serves the model; safetensors alone would keep it to its owner."""
    before = os.umask(0o027)
    try:
        write(tmp_path)
    finally:
        os.umask(before)
    files = [file for file in tmp_path.rglob("*") if file.is_file()]
    assert any(file.suffix == ".safetensors" for file in files)
    assert {file.stat().st_mode & 0o777 for file in files} == {0o640}


def test_unreadable_trainer_state_is_named(tmp_path):
    folder = save(tmp_path, 1)
    others = []
    for value in ([1], {"step": 1}):
        torch.save(value, tmp_path / "other.pt")
        others.append((tmp_path / "other.pt").read_bytes())
    for content in (b"", b"not a checkpoint", (folder / "trainer.pt").read_bytes()[:300], *others):
        (folder / "trainer.pt").write_bytes(content)
        with pytest.raises(ValueError, match=r"trainer\.pt: unreadable .* delete that folder"):
            load_trainer_state(folder)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_checkpoint_without_its_weights_says_the_way_out(tmp_path, name):
    folder = save(tmp_path, 1)
    (folder / name).unlink()
    with pytest.raises(ValueError, match=r"step-00000001: neither .*; delete that folder to resume"):
        load_weights_into(Model(CONFIG), folder, Parallel())
