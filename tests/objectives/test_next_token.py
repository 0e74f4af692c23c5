"""The load of the experts that next_token_loss tells: by hand, and averaged by the weight of each part."""

import dataclasses

import pytest
import torch

from minimind import ModelConfig
from minimind.modeling import Model, ModelOutput
from minimind.objectives.next_token import TokenBatch, expert_load, next_token_loss

CONFIG = ModelConfig(
    32, 2, 2, 1, 16, 48, 50, num_experts=4, num_experts_per_tok=2, num_shared_experts=1, moe_intermediate_size=24
)


def output(counts: list[list[int]]) -> ModelOutput:
    return ModelOutput(torch.empty(0), None, torch.empty(0), torch.tensor(counts))


@pytest.mark.parametrize(
    "counts, most, least",
    [
        ([[5, 5, 5, 5]], 0.0, 1.0),
        ([[10, 0, 5, 5]], 1.0, 0.0),
        ([[10, 10, 0, 0], [5, 5, 5, 5]], 0.5, 0.0),  # the mean over layers; the worst layer
        ([[8, 4, 4, 4], [7, 5, 5, 3]], 0.5, 0.6),
    ],
)
def test_load_by_hand(counts, most, least):
    found = expert_load(output(counts))
    assert float(found["max_violation"]) == pytest.approx(most)
    assert float(found["min_load"]) == pytest.approx(least)


def batch(rows: slice, weights: bool) -> TokenBatch:
    """Rows of four, of ever fewer targets, as one rank of several has them."""
    ids = torch.randint(0, 50, (4, 17), generator=torch.Generator().manual_seed(0))
    targets = ids[:, 1:].clone()
    for row in range(4):
        targets[row, 16 - 4 * row :] = -100
    total = int(targets.ne(-100).sum())
    inputs, targets = ids[rows, :-1].contiguous(), targets[rows].contiguous()
    cu = torch.arange(0, inputs.numel() + 1, 16, dtype=torch.int32)
    made = TokenBatch(inputs, targets, cu, int(targets.ne(-100).sum()), total)
    if not weights:
        return made
    return dataclasses.replace(made, loss_weights=2.0 * targets.ne(-100), weight_sum=2.0 * total)


@pytest.mark.parametrize("weights", [False, True])
def test_parts_add_up_to_a_mean(weights):
    torch.manual_seed(0)
    model = Model(CONFIG)
    parts = [batch(rows, weights) for rows in (slice(0, 1), slice(1, 3), slice(3, 4))]
    told = [next_token_loss(model, part)[2] for part in parts]
    alone = [expert_load(model(p.input_ids, cu_seqlens=p.cu_seqlens, return_logits=False)) for p in parts]
    share = [p.num_targets / 40 for p in parts]
    assert sum(share) == 1
    for name in ("max_violation", "min_load"):
        assert not told[0][name].requires_grad
        mean = sum(s * float(figures[name]) for s, figures in zip(share, alone, strict=True))
        logged = sum(float(figures[name]) for figures in told) / parts[0].global_weight
        assert logged == pytest.approx(mean, rel=1e-5) and logged > 0


def test_a_dense_model_tells_nothing():
    dense = Model(dataclasses.replace(CONFIG, num_experts=0, num_shared_experts=0))
    assert len(next_token_loss(dense, batch(slice(0, 4), False))) == 2
