"""Training in fp16 with a scaled loss: its curve, overflows, and a resumed run. On several ranks: ranks.py."""

import math
from functools import partial
from pathlib import Path

import pytest
import torch

from minimind import ModelConfig
from minimind.modeling import Model
from minimind.objectives.next_token import TokenBatch, next_token_loss
from minimind.training.checkpoint import list_checkpoints, load_trainer_state
from minimind.training.optim import LossScaler, build_optimizers
from minimind.training.run_folder import RunFolder
from minimind.training.trainer import NonFiniteLossError, Trainer
from tests.training.runs import reproducible, rows_of
from tests.training.test_trainer import Same, trainer_of

STEPS = 10
DENSE = ModelConfig(64, 2, 4, 2, 16, 128, 50, qk_norm=True)
MIXTURE = ModelConfig(32, 1, 2, 1, 16, 48, 50, num_experts=4, num_experts_per_tok=2, num_shared_experts=1,
                      moe_intermediate_size=24)  # fmt: skip


class Rows(Same):
    """Random rows of two documents; the first has more targets than the second."""

    def __init__(self) -> None:
        self.taken = 0

    def next_batch(self) -> TokenBatch:
        generator = torch.Generator().manual_seed(self.taken)
        self.taken += 1
        ids = torch.randint(0, 50, (1, 65), generator=generator).sort(dim=1).values  # something to learn
        targets = ids[:, 1:].clone()
        targets[:, 50:] = -100
        return TokenBatch(ids[:, :-1].contiguous(), targets, torch.tensor([0, 40, 64], dtype=torch.int32), 50, 50)

    def state(self) -> dict[str, int]:
        return {"taken": self.taken}

    def load_state(self, state: dict[str, int]) -> None:
        self.taken = state["taken"]


def trainer_in(dtype: torch.dtype, folder: Path, config: ModelConfig = DENSE, **flags) -> Trainer:
    """A trainer of two micro-batches a step, continued where `folder` has a checkpoint."""
    torch.manual_seed(0)
    model = Model(config)
    model.compute_dtype = dtype
    folder.mkdir(exist_ok=True)
    newest = list_checkpoints(folder)[-1:]
    run = RunFolder(folder, newest[0] if newest else None, None)
    run.metrics.touch()
    run.samples.touch()
    loss = partial(next_token_loss, model)
    optimizer = build_optimizers(model, "adamw", 1e-3, 0.1)  # rounding does not grow
    trainer = trainer_of(model, loss, STEPS, 2, optimizer, run=run, save_every=5, log_every=2, **flags)
    trainer.loader = Rows()
    if newest:
        trainer.resume(load_trainer_state(newest[0]))
    return trainer


@pytest.mark.parametrize("config", [DENSE, MIXTURE], ids=["dense", "experts"])
def test_the_curve_is_that_of_float32(config, tmp_path, monkeypatch):
    """fp16 rounds to 11 bits and bf16 to 8, so that fp16's curve is off by about an eighth of what bf16's is, and at
    most half of that is allowed. No step is skipped, as the scale is small."""
    monkeypatch.setattr(LossScaler, "FIRST", 2.0**8)
    figures = {}
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        trainer = trainer_in(dtype, tmp_path, config)
        for _ in range(STEPS):
            trainer._train_step()
        assert trainer.scaler.overflows == 0
        figures[dtype] = torch.stack(
            [row.figures for row in trainer.pending]
        )  # [steps, loss, auxiliary loss, norm, ...]
    truth = figures[torch.float32]
    assert truth[-1, 0] < truth[0, 0] - 0.1
    for column in (0, 2):
        bf16, fp16 = (
            (figures[dtype] - truth)[:, column].square().mean().sqrt() for dtype in (torch.bfloat16, torch.float16)
        )
        assert 0 < fp16 <= bf16 / 2, (column, fp16, bf16)


def test_small_gradients_survive():
    """Without scaling, fp16 loses gradients this small; with a scaled loss it loses only its rounding, as above."""
    torch.manual_seed(0)
    model, batch = Model(DENSE), Rows().next_batch()

    def gradients(dtype: torch.dtype, scale: bool) -> list[torch.Tensor]:
        model.compute_dtype = dtype
        trainer = trainer_of(model, partial(next_token_loss, model))
        trainer.scaler.enabled &= scale
        trainer.scaler._scaler._enabled &= scale
        loss, _ = next_token_loss(model, batch)
        trainer.scaler.scaled(loss * 1e-6).backward()
        trainer.scaler.unscale()
        found = [p.grad for p in model.parameters()]
        model.zero_grad()
        return found

    truth = gradients(torch.float32, False)
    lost, bf16, fp16 = (
        torch.nn.utils.get_total_norm([a - b for a, b in zip(gradients(*form), truth, strict=True)])
        / torch.nn.utils.get_total_norm(truth)
        for form in ((torch.float16, False), (torch.bfloat16, False), (torch.float16, True))
    )
    assert lost > 0.5 and 0 < fp16 <= bf16 / 2


def test_an_overflow_skips_the_step_and_is_counted(tmp_path, monkeypatch):
    monkeypatch.setattr(LossScaler, "FIRST", 2.0**26)
    monkeypatch.setattr(LossScaler, "GROWTH", 3)
    said: list[str] = []
    trainer = trainer_in(torch.float16, tmp_path, ema=0.9)
    before = trainer.model.head_weight.detach().clone()
    trainer._train_step()
    assert torch.equal(trainer.model.head_weight, before) and trainer.average.updates == 0
    assert all(p.grad is None for p in trainer.model.parameters())
    trainer = trainer_in(torch.float16, tmp_path)
    monkeypatch.setattr(type(trainer.console), "print", lambda self, *text, **_: said.append(str(text[0])))
    trainer.console.quiet = False
    assert trainer.fit()
    rows = rows_of(tmp_path, "train")
    skipped = [not math.isfinite(row["grad_norm"]) for row in rows]
    assert skipped[0] and not all(skipped)
    scale, overflows, streak = 2.0**26, 0, 0
    for row, overflow in zip(rows, skipped, strict=True):
        overflows, streak = overflows + overflow, 0 if overflow else streak + 1
        assert (row["loss_scale"], row["overflows"]) == (scale, overflows), row["step"]
        scale *= 0.5 if overflow else 2 if streak and streak % 3 == 0 else 1
    line = f"fp16: {overflows} of {STEPS} steps were skipped, as a gradient overflowed; the loss scale is {scale:g}"
    assert sum(line in text for text in said) == 1


def test_a_resumed_run_keeps_the_scale(tmp_path, monkeypatch):
    """To the bit, with a scale that has fallen and is about to rise."""
    monkeypatch.setattr(LossScaler, "FIRST", 2.0**26)
    monkeypatch.setattr(LossScaler, "GROWTH", 3)
    assert trainer_in(torch.float16, tmp_path / "whole").fit()
    cut = trainer_in(torch.float16, tmp_path / "cut")
    original = cut._after_step

    def stop() -> None:
        original()
        cut.interrupted = "SIGINT" if cut.step == 7 else None

    cut._after_step = stop
    assert not cut.fit()
    state = load_trainer_state(list_checkpoints(tmp_path / "cut")[-1])["scaler"]
    assert state["scale"] < 2.0**26 and state["_growth_tracker"] == 2 and state["overflows"] > 0
    assert trainer_in(torch.float16, tmp_path / "cut").fit()
    assert reproducible(tmp_path / "cut") == reproducible(tmp_path / "whole")


def test_a_loss_that_fp16_cannot_hold_ends_the_run(tmp_path):
    trainer = trainer_in(torch.float16, tmp_path)
    with torch.no_grad():
        trainer.model.embed_tokens.weight.mul_(1e7)
    with pytest.raises(NonFiniteLossError, match="or take --precision fp32: fp16 ends at 65,504"):
        trainer.fit()


def test_a_gradient_that_overflows_without_a_scale_ends_the_run(tmp_path, monkeypatch):
    monkeypatch.setattr(LossScaler, "FIRST", 1.0)
    trainer = trainer_in(torch.float16, tmp_path)
    trainer.model.norm.weight.register_hook(lambda gradient: gradient * torch.inf)
    with pytest.raises(NonFiniteLossError, match="gradient norm"):
        trainer.fit()


def test_other_precisions_scale_nothing(tmp_path):
    trainer = trainer_in(torch.bfloat16, tmp_path)
    trainer._train_step()
    assert trainer.pending[0].scaling == {} and trainer.scaler.state_dict() == {}
    assert trainer.scaler.scale == 1.0
