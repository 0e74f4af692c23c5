"""Checkpoints are whole or not there."""

import pytest
import torch
from safetensors import SafetensorError

from minimind import ModelConfig, load_model, load_tokenizer, weights
from minimind.modeling import Model
from minimind.training import checkpoint
from minimind.training.checkpoint import list_checkpoints, load_trainer_state, save_checkpoint

CONFIG = ModelConfig(32, 1, 2, 1, 16, 48, 50)


def save(run, step, keep=2):
    return save_checkpoint(run, step, Model(CONFIG), load_tokenizer(), {"step": step}, keep)


def test_keeps_the_newest(tmp_path):
    for step in (1, 2, 3):
        save(tmp_path, step)
    assert [c.name for c in list_checkpoints(tmp_path)] == ["step-00000002", "step-00000003"]
    assert len(list((tmp_path / "checkpoints").iterdir())) == 2
    assert load_trainer_state(list_checkpoints(tmp_path)[-1]) == {"step": 3}


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


def test_unreadable_trainer_state_is_named(tmp_path):
    folder = save(tmp_path, 1)
    for content in (b"", b"not a checkpoint", (folder / "trainer.pt").read_bytes()[:300]):
        (folder / "trainer.pt").write_bytes(content)
        with pytest.raises(ValueError, match=r"trainer\.pt: unreadable .* delete that folder"):
            load_trainer_state(folder)
