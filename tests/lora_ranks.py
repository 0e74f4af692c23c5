"""Run by torchrun in test_lora.py: two steps of an adapter on two ranks, replicated and sharded, and on one; the
adapters must be equal, and the frozen weights what they were. Plain SGD, so that a gradient of another size shows."""

from __future__ import annotations

import torch
from torch.distributed.checkpoint.state_dict import get_model_state_dict

from minimind import ModelConfig
from minimind.lora import LoRAConfig, add_adapter
from minimind.lora_files import adapter_state
from minimind.modeling import Model
from minimind.objectives.next_token import TokenBatch, next_token_loss
from minimind.training.parallel import Parallel, leave, to_rank_0

ROWS, LENGTH, VOCAB = 4, 16, 50


def part(parallel: Parallel) -> TokenBatch:
    ids = torch.randint(0, VOCAB, (ROWS, LENGTH + 1), generator=torch.Generator().manual_seed(1))
    ids = ids[parallel.rank :: parallel.world_size]
    inputs, targets = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()
    cu = torch.arange(0, inputs.numel() + 1, LENGTH, dtype=torch.int32)
    return TokenBatch(inputs, targets, cu, targets.numel(), ROWS * LENGTH)


def train(parallel: Parallel) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """(adapter under peft's names, frozen weights), whole; on rank 0."""
    torch.manual_seed(0)
    model = Model(ModelConfig(32, 2, 2, 1, 16, 48, VOCAB, qk_norm=True))
    add_adapter(model, LoRAConfig(rank=4))
    trained = [p for p in model.parameters() if p.requires_grad]
    with torch.no_grad():
        for parameter in trained:
            parameter.add_(torch.randn_like(parameter) * 0.1)
    wrapped, batch = parallel.wrap(model), part(parallel)
    trained = [p for p in model.parameters() if p.requires_grad]  # sharded in place
    optimizer = torch.optim.SGD(trained, lr=0.5)
    for _ in range(2):
        loss, _ = next_token_loss(wrapped, batch)
        (loss / batch.global_num_targets * parallel.world_size).backward()
        optimizer.step()
        optimizer.zero_grad()
    state = (
        get_model_state_dict(model, options=to_rank_0())
        if parallel.strategy == "fsdp"
        else model.state_dict()
    )
    if not parallel.main:
        return {}, {}
    return adapter_state(model, state=state), {k: v for k, v in state.items() if ".adapters." not in k}


def main() -> None:
    world = Parallel.from_env("ddp", 1)
    world.join(torch.device("cpu"))
    alone, frozen = train(Parallel())
    torch.manual_seed(0)
    start = Model(ModelConfig(32, 2, 2, 1, 16, 48, VOCAB, qk_norm=True)).state_dict()
    for strategy in ("ddp", "fsdp"):
        together, base = train(Parallel(strategy, world.rank, 0, world.world_size))
        if world.main:
            assert together.keys() == alone.keys() and base.keys() == frozen.keys() == start.keys()
            for name, tensor in together.items():
                torch.testing.assert_close(
                    tensor, alone[name], rtol=1e-4, atol=1e-6, msg=f"{name}: {strategy}"
                )
            assert all(torch.equal(base[name], start[name]) for name in start), strategy
    leave()


if __name__ == "__main__":
    main()
