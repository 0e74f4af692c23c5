"""Run by torchrun in test_lora.py: two steps of an adapter on two ranks, replicated and sharded, and on one rank.
Losses and adapters must be equal, and frozen weights unchanged. The optimizer is plain SGD, so a scaled gradient would
show. With DoRA in bfloat16 only the first loss must equal that of one process: row lengths are computed in float32."""

from __future__ import annotations

import torch

from minimind import ModelConfig
from minimind.lora import LoRAConfig, add_adapter
from minimind.lora_files import adapter_state
from minimind.modeling import Model
from minimind.objectives.next_token import TokenBatch, next_token_loss
from minimind.training.parallel import Parallel, leave

ROWS, LENGTH, VOCAB = 4, 16, 50


def part(parallel: Parallel) -> TokenBatch:
    ids = torch.randint(0, VOCAB, (ROWS, LENGTH + 1), generator=torch.Generator().manual_seed(1))
    ids = ids[parallel.rank :: parallel.world_size]
    inputs, targets = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()
    cu = torch.arange(0, inputs.numel() + 1, LENGTH, dtype=torch.int32)
    return TokenBatch(inputs, targets, cu, targets.numel(), ROWS * LENGTH)


DENSE = ModelConfig(32, 2, 2, 1, 16, 48, VOCAB, qk_norm=True)
MOE = ModelConfig(
    32, 2, 2, 1, 16, 48, VOCAB, num_experts=4, num_experts_per_tok=2, num_shared_experts=1,
    moe_intermediate_size=24, router_aux_loss_coef=0.5, router_aux_loss_level="batch",
)  # fmt: skip
CASES = {"dense": (DENSE, False), "dense, DoRA": (DENSE, True), "moe": (MOE, False)}
Trained = tuple[list[float], dict[str, torch.Tensor], dict[str, torch.Tensor]]


def train(parallel: Parallel, config: ModelConfig, dora: bool, dtype: torch.dtype | None = None) -> Trained:
    """(losses, adapter under peft's names, frozen weights), unsharded; the last two on rank 0 only."""
    torch.manual_seed(0)
    model = Model(config)
    model.compute_dtype = dtype
    add_adapter(model, LoRAConfig(rank=4, dora=dora))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    wrapped, batch = parallel.wrap(model), part(parallel)
    trained = [p for p in model.parameters() if p.requires_grad]  # sharded in place
    optimizer = torch.optim.SGD(trained, lr=0.5)
    losses = []
    for _ in range(2):
        loss, aux, *_ = next_token_loss(wrapped, batch)
        whole = loss / batch.global_num_targets + aux * (batch.num_targets / batch.global_num_targets)
        (whole * parallel.world_size).backward()
        losses.append(float(parallel.sum(whole.detach().clone())))
        optimizer.step()
        optimizer.zero_grad()
    found = parallel.whole(model)
    if found is None:
        return losses, {}, {}
    frozen = {k: v for k, v in found.state_dict().items() if ".adapters." not in k}
    return losses, adapter_state(found), frozen


def compare(world: Parallel, case: str) -> None:
    config, dora = CASES[case]
    expected, alone, frozen = train(Parallel(), config, dora)
    torch.manual_seed(0)
    start = Model(config).state_dict()
    for strategy in ("ddp", "fsdp"):
        told = f"{case}, {strategy}"
        losses, together, base = train(Parallel(strategy, world.rank, 0, world.world_size), config, dora)
        torch.testing.assert_close(losses, expected, rtol=1e-5, atol=1e-6, msg=told)
        if world.main:
            assert together.keys() == alone.keys() and base.keys() == frozen.keys() == start.keys()
            for name, tensor in together.items():
                torch.testing.assert_close(tensor, alone[name], rtol=1e-4, atol=1e-6, msg=f"{name}: {told}")
            assert all(torch.equal(base[name], start[name]) for name in start), told


def check_lengths(world: Parallel) -> None:
    """Losses of bfloat16 products over the same rows agree to float32's rounding, despite another order of sums."""
    (first, _), *_ = train(Parallel(), DENSE, True, torch.bfloat16)
    (sharded, _), *_ = train(Parallel("fsdp", world.rank, 0, world.world_size), DENSE, True, torch.bfloat16)
    assert abs(sharded - first) < 1e-5 * first, (sharded, first)


def main() -> None:
    world = Parallel.from_env("ddp", 1)
    world.join(torch.device("cpu"))
    for case in CASES:
        compare(world, case)
    check_lengths(world)
    leave()


if __name__ == "__main__":
    main()
