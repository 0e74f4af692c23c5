"""The estimate of a step's memory against what autograd saves, and against the peak on a GPU."""

import pytest
import torch

from minimind import ModelConfig, ops
from minimind.modeling import Model
from minimind.training.batches import activation_bytes, attention_scratch_bytes, tokens_that_fit
from tests.kernels.contract import DEVICE
from tests.kernels.test_model import SHAPES


def saved_bytes(model: Model, tokens: int) -> int:
    """Bytes of the distinct tensors, without parameters, that one forward of the kernels keeps."""
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def keep(x: torch.Tensor) -> torch.Tensor:
        kept.setdefault(x.untyped_storage().data_ptr(), x)  # held, so that no later tensor reuses its memory
        return x

    ids = torch.zeros(1, tokens, dtype=torch.int64, device=DEVICE)
    bounds = torch.tensor([0, tokens], dtype=torch.int32, device=DEVICE)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        out = model(ids, cu_seqlens=bounds, attention_mask=torch.ones_like(ids), return_logits=False)
    total = sum(x.untyped_storage().nbytes() for place, x in kept.items() if place not in parameters)
    del out
    return total


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_activation_bytes(shape, recompute):
    config = ModelConfig(**SHAPES[shape])
    torch.manual_seed(0)
    model = Model(config).to(DEVICE)
    model.compute_dtype, model.recompute = torch.bfloat16, recompute
    with ops.using("kernels"):
        counted = (saved_bytes(model, 96) - saved_bytes(model, 32)) / 64
    expected = activation_bytes(config, recompute)
    if recompute:  # a recomputed block keeps its activations only in the backward
        expected = config.num_hidden_layers * 4 * config.hidden_size + 12
    elif DEVICE.type == "cpu":  # the CPU's attention computes the log-sum-exp again
        expected -= 4 * config.num_attention_heads * config.num_hidden_layers
    assert counted <= expected * 1.02
    assert counted >= expected * 0.9


def test_scratch_of_attention():
    """The tensors that flash_api.cpp's mha_varlen_bwd allocates, head by head."""
    grouped = ModelConfig(64, 1, 8, 2, 80, 96, 50)
    tokens, boundaries = 1000, 7
    sums = torch.empty(tokens + 128 * boundaries, 8, 96, device="meta")  # 80 rounded up
    softmax = torch.empty(8, tokens + 128 * boundaries, device="meta")
    expanded = torch.empty(2, tokens, 8, 80, dtype=torch.bfloat16, device="meta")
    expected = sum(x.nbytes for x in (sums, softmax, expanded))
    assert attention_scratch_bytes(grouped, tokens, boundaries) == expected
    alone = ModelConfig(64, 1, 8, 8, 80, 96, 50)
    assert attention_scratch_bytes(alone, tokens, boundaries) == expected - expanded.nbytes


def test_cards():
    """The figures in docs/scaling.md for a 3090 and 4090 (24 GiB) and a 4 GiB card."""

    def fits(preset: str, gib: float, recompute: bool = False) -> int:
        config = ModelConfig.preset(preset)
        with torch.device("meta"):
            parameters = Model(config).num_parameters()
        return tokens_that_fit(config, parameters, int(gib * 2**30), recompute)

    assert fits("minimind2-small", 4) >= 8192
    assert fits("minimind2-small", 24) >= 131072
    assert 32768 <= fits("minimind2", 24) < 65536 <= fits("minimind2", 24, recompute=True)
    assert fits("minimind2", 1) == 0


@pytest.mark.skipif(DEVICE.type != "cuda", reason="needs a GPU: the peak of its memory")
def test_8k_tokens_fit_in_4_gib():
    """A whole step of minimind2-small at 8,192 tokens, including weights, gradients and AdamW."""
    from minimind.objectives.next_token import TokenBatch, next_token_loss
    from minimind.training.optim import build_optimizers

    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    model = Model(ModelConfig.preset("minimind2-small")).to(DEVICE)
    model.compute_dtype = torch.bfloat16
    optimizer = build_optimizers(model, "adamw", 1e-3, 0.1)
    ids = torch.randint(6400, (16, 512), device=DEVICE)
    bounds = torch.arange(0, 8193, 512, dtype=torch.int32, device=DEVICE)
    for _ in range(2):
        loss, _ = next_token_loss(model, TokenBatch(ids, ids, bounds, 8192, 8192))
        (loss / 8192).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert torch.cuda.max_memory_allocated() - before < (4 << 30) - (1 << 29)
