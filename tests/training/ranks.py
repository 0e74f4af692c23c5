"""Run by torchrun in test_parallel.py: two steps of the real loop on a tiny mixture of experts, on several ranks and
on one; every rank compares. The optimizer is plain SGD, so that a wrongly scaled gradient shows. Then come the cases
with 16-bit rounding."""

from __future__ import annotations

from pathlib import Path

import torch
from rich.console import Console
from torch.distributed.tensor import DTensor

from minimind import ModelConfig, load_tokenizer
from minimind.modeling import Model
from minimind.objectives.next_token import TokenBatch, next_token_loss
from minimind.training.arguments import StageArgs
from minimind.training.batches import TrainingPlan
from minimind.training.metrics import NoTracker
from minimind.training.optim import LossScaler, Optimizers, RateSchedule
from minimind.training.parallel import Parallel, leave
from minimind.training.run_folder import RunFolder
from minimind.training.trainer import Stage, Trainer

ROWS, LENGTH, VOCAB = 4, 16, 50


class Rows:
    """Random rows with ever fewer targets: ranks get different numbers of them."""

    def __init__(self, parallel: Parallel) -> None:
        self.parallel, self.generator = parallel, torch.Generator().manual_seed(1)

    def state(self) -> dict[str, int]:
        return {}

    def fetch(self) -> None:
        pass

    def next_batch(self) -> TokenBatch:
        ids = torch.randint(0, VOCAB, (ROWS, LENGTH + 1), generator=self.generator)
        inputs, targets = ids[:, :-1], ids[:, 1:].clone()
        for row in range(ROWS):
            targets[row, LENGTH - 4 * row :] = -100
        mine = slice(self.parallel.rank, None, self.parallel.world_size)
        inputs, targets = inputs[mine].contiguous(), targets[mine].contiguous()
        cu = torch.arange(0, inputs.numel() + 1, LENGTH, dtype=torch.int32)
        count = int(targets.ne(-100).sum())
        return TokenBatch(inputs, targets, cu, count, ROWS * LENGTH - 24)


def train(parallel: Parallel, level: str, experts: int) -> tuple[Model | None, torch.Tensor]:
    """Weights after two steps of two micro-batches, and the figures of both steps."""
    config = ModelConfig(
        32, 1, 2, 1, 16, 48, VOCAB, num_experts=experts, num_experts_per_tok=2, num_shared_experts=1,
        moe_intermediate_size=24, router_aux_loss_coef=5.0, router_aux_loss_level=level,
    )  # fmt: skip
    torch.manual_seed(0)
    model = Model(config)
    wrapped = parallel.wrap(model)
    if parallel.strategy == "fsdp":
        stacked = [p for p in model.parameters() if p.ndim == 3]
        assert len(stacked) == 2 and all(isinstance(p, DTensor) for p in stacked)
        assert all(p.to_local().numel() * parallel.world_size == p.numel() for p in stacked), "equal shards"
    stage = Stage(
        loss=lambda batch: next_token_loss(wrapped, batch),
        evaluate=lambda final: {},
        sample=lambda: "",
        describe=lambda batch: [],
        data_fingerprint="",
        peak_lr=0.5,
    )
    loader = Rows(parallel)
    trainer = Trainer(
        args=StageArgs(grad_clip=1e9),
        plan=TrainingPlan(loader, steps=2, micro_batches=2),
        stage=stage,
        model=model,
        tokenizer=load_tokenizer(),
        optimizer=Optimizers([torch.optim.SGD(model.parameters(), lr=0.5)]),
        loader=loader,
        schedule=RateSchedule("constant", 2, warmup=0),
        run=RunFolder(Path(), None, None),
        tracker=NoTracker(),
        console=Console(),
        parallel=parallel,
    )
    trainer._train_step()
    trainer._train_step()
    assert all(row.names == ("max_violation", "min_load") for row in trainer.pending)
    figures = parallel.sum(torch.stack([row.figures for row in trainer.pending]))
    most, least = figures[:, 3:].unbind(1)  # means over ranks and micro-batches, of their own tokens
    assert (most >= 0).all() and (most <= experts / 2 - 1).all() and (least >= 0).all() and (least <= 1).all()
    return parallel.whole(model), figures[:, :3]


def compare_sums(world: Parallel) -> None:
    """With --reduce-dtype bf16 the steps are those of float32 to bf16's rounding, and no better."""
    for strategy in ("ddp", "fsdp"):
        figures = {}
        for dtype in ("fp32", "bf16"):
            parallel = Parallel(strategy, world.rank, 0, world.world_size, reduce_dtype=dtype)
            _, figures[dtype] = train(parallel, "batch", 4)
        torch.testing.assert_close(figures["bf16"], figures["fp32"], rtol=0.01, atol=0.01, msg=strategy)
        norms = figures["bf16"][:, 2], figures["fp32"][:, 2]
        assert (norms[0] / norms[1] - 1).abs().max() > 1e-6, strategy


def check_rounding(world: Parallel, dtype: torch.dtype) -> None:
    """In 16 bits, with gains and weights that 16 bits cannot hold exactly: if every rank has the same batch, loss and
    gradients equal those of one process bit for bit."""
    gradients = []
    for strategy in ("none", "ddp", "fsdp"):
        torch.manual_seed(0)
        model = Model(ModelConfig(32, 2, 2, 1, 16, 48, VOCAB, qk_norm=True))
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):
                torch.nn.init.uniform_(parameter, 0.9, 1.1)
        model.compute_dtype = dtype
        wrapped = Parallel(strategy, world.rank, 0, world.world_size).wrap(model)
        loss, _ = next_token_loss(wrapped, Rows(Parallel()).next_batch())
        loss.backward()
        found = {name: p.grad for name, p in model.named_parameters()} | {"loss": loss.detach()}
        gradients.append({k: g.full_tensor() if isinstance(g, DTensor) else g for k, g in found.items()})
    alone, *others = gradients
    for strategy, found in zip(("ddp", "fsdp"), others, strict=True):
        for name, gradient in found.items():
            assert torch.equal(gradient, alone[name]), f"{name}: {strategy}"


def check_overflow(world: Parallel) -> None:
    """A gradient that overflows, under FSDP in one rank's shard only, skips the step on all ranks."""
    for strategy in ("ddp", "fsdp"):
        torch.manual_seed(0)
        model = Model(ModelConfig(32, 1, 2, 1, 16, 48, VOCAB))
        model.compute_dtype = torch.float16
        wrapped = Parallel(strategy, world.rank, 0, world.world_size).wrap(model)
        scaler = LossScaler(
            Optimizers([torch.optim.SGD(model.parameters(), lr=0.5)]), torch.device("cpu"), torch.float16
        )
        weight = whole(model.head_weight).detach().clone()
        for overflows in (True, False):
            loss, _ = next_token_loss(wrapped, Rows(Parallel()).next_batch())
            scaler.scaled(loss / 40).backward()
            gradient = model.norm.weight.grad
            assert gradient is not None
            if overflows and isinstance(gradient, DTensor) and world.rank == 1:
                gradient.to_local()[0] = torch.inf
            elif overflows and not isinstance(gradient, DTensor):
                gradient[0] = torch.inf
            scaler.unscale()
            assert scaler.step() == (not overflows), strategy
            scaler.optimizer.zero_grad()
            assert torch.equal(whole(model.head_weight).detach(), weight) == overflows, strategy
        assert (scaler.scale, scaler.overflows) == (LossScaler.FIRST / 2, 1)


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def main() -> None:
    world = Parallel.from_env("ddp", 1)
    world.join(torch.device("cpu"))
    compare_sums(world)
    for dtype in (torch.bfloat16, torch.float16):
        check_rounding(world, dtype)
    check_overflow(world)
    for level, experts in (("batch", 4), ("sequence", 3)):  # 3 are cut along another dimension than 4
        alone, expected = train(Parallel(), level, experts)
        for strategy in ("ddp", "fsdp"):
            together, figures = train(Parallel(strategy, world.rank, 0, world.world_size), level, experts)
            torch.testing.assert_close(figures, expected, rtol=1e-5, atol=1e-5, msg=f"{strategy}, {level}")
            if world.main:
                for (name, a), b in zip(together.named_parameters(), alone.parameters(), strict=True):
                    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6, msg=f"{name}: {strategy}, {level}")
    leave()


if __name__ == "__main__":
    main()
