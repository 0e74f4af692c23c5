"""Run by torchrun in test_parallel.py: on shards, Muon takes the same steps as on whole parameters, with two exchanges
per step, and either can load the other's state. Every rank compares. Argument: --replicas of the mesh."""

from __future__ import annotations

import copy
import sys
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from minimind import ModelConfig
from minimind.modeling import Model
from minimind.training.muon import Muon
from minimind.training.optim import Optimizers
from minimind.training.parallel import Parallel, leave

QKV, GATE_UP = (32, 16, 16), (24, 24)


def build(parallel: Parallel, experts: int, apart: bool) -> tuple[Model, Optimizers]:
    """apart: q, k, v, gate and up each a matrix, in blocks of 8, with scaled rows and cautious decay; else packed ones
    are one."""
    torch.manual_seed(0)
    model = Model(ModelConfig(32, 2, 2, 1, 16, 24, 50, num_experts=experts, num_experts_per_tok=1,
                              num_shared_experts=1, moe_intermediate_size=24))  # fmt: skip
    parallel.wrap(model)
    named = {n: p for n, p in model.named_parameters() if p.ndim > 1 and "layers." in n}
    parts = {"qkv_proj": QKV, "gate_up_proj": GATE_UP}
    rows = {p: r for n, p in named.items() for part, r in parts.items() if part in n and apart}
    row_beta, block = (0.9, 8) if apart else (None, 0)
    muon = Muon(named.values(), lr=0.1, rows=rows, row_beta=row_beta, cautious=apart, block=block)
    rest = [p for p in model.parameters() if all(p is not q for q in named.values())]
    return model, Optimizers([torch.optim.AdamW(rest), muon])


def take_steps(model: Model, optimizers: Optimizers, steps: range) -> None:
    for step in steps:
        torch.manual_seed(step)
        for parameter in model.parameters():
            parameter.grad = like(parameter, torch.randn(parameter.shape))
        optimizers.step()


def like(parameter: nn.Parameter, value: Tensor) -> Tensor:
    if not isinstance(parameter, DTensor):
        return value
    return distribute_tensor(value, parameter.device_mesh, parameter.placements)


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def assert_same(model: Model, expected: Model) -> None:
    for (name, a), b in zip(model.named_parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(whole(a.detach()), b.detach(), rtol=0, atol=0.01, msg=name)


def compare(world: Parallel, experts: int, apart: bool) -> None:
    alone, shards = build(Parallel(), experts, apart), build(world, experts, apart)
    with mock.patch.object(dist, "all_to_all_single", wraps=dist.all_to_all_single) as exchanges:
        take_steps(*shards, range(2))
    assert exchanges.call_count == 4
    take_steps(*alone, range(2))
    assert_same(shards[0], alone[0])
    # each continues with the other's state, and the shards with their own to the bit
    saved = copy.deepcopy([optimizers.state_dict(model) for model, optimizers in (shards, alone)])
    again, mine = build(world, experts, apart), build(world, experts, apart)
    for (model, optimizers), state in zip((mine, again), saved, strict=True):
        optimizers.load_state_dict(model, state)
        for target, source in zip(model.parameters(), shards[0].parameters(), strict=True):
            target.data.copy_(source.data)
    for model, optimizers in (alone, shards, mine, again):
        take_steps(model, optimizers, range(2, 4))
    for a, b in zip(mine[0].parameters(), shards[0].parameters(), strict=True):
        assert torch.equal(whole(a), whole(b))
    assert_same(shards[0], alone[0])
    assert_same(again[0], alone[0])


def main() -> None:
    world = Parallel.from_env("fsdp", int(sys.argv[1]))
    world.join(torch.device("cpu"))
    for experts, apart in ((4, False), (4, True), (3, True)):
        compare(world, experts, apart)
    leave()


if __name__ == "__main__":
    main()
