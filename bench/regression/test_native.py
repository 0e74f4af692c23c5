"""The native operators on a CPU in float32, compared with PyTorch's own on the same shapes.

bfloat16 is left out: its speed relative to float32 depends on the processor's instructions more than on our code.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bench.regression.ratios import Against, times
from minimind import ModelConfig
from minimind.inference.decode.step import DecodeWeights, decode_step
from minimind.modeling import Model
from minimind.ops import native
from minimind.ops.document_attention import document_attention
from minimind.rope import rope_cos_sin

MISSING = native.why_not(torch.device("cpu"))
# "avx512", "avx2" or "generic", whose gains over PyTorch differ. In float32, avx512_bf16 and amx compute as avx512.
KERNELS = native.build_info().cpu_kernels_in_use.partition("_")[0].replace("amx", "avx512")
pytestmark = pytest.mark.skipif(MISSING is not None, reason=f"nothing native to time: {MISSING}")

BATCH, CONTEXT, PAGE = 8, 256, 16
HEADS, GROUPS, HEAD_DIM = 8, 2, 64


def pages() -> tuple[Tensor, Tensor]:
    """(block table int32 [B, pages], lengths int32 [B]): the pages of a sequence lie scattered, and all are full."""
    generator = torch.Generator().manual_seed(0)
    count = CONTEXT // PAGE
    table = torch.randperm(BATCH * count, generator=generator).view(BATCH, count).int()
    return table, torch.full((BATCH,), CONTEXT, dtype=torch.int32)


@torch.inference_mode()
def test_decode_step(against: Against) -> None:
    """One token for each of 8 sequences with 256 tokens, the nano preset."""
    config = ModelConfig.preset("nano")
    torch.manual_seed(0)
    weights = DecodeWeights.from_model(Model(config))
    operands = weights.operands()
    table, lengths = pages()
    shape = (config.num_hidden_layers, table.numel(), PAGE, config.num_key_value_heads, config.head_dim)
    caches = torch.randn(shape), torch.randn(shape)
    slots = table[:, -1].long() * PAGE + PAGE - 1
    tokens = torch.arange(BATCH) + 100
    rotation = rope_cos_sin(config, torch.arange(CONTEXT))
    inputs = (tokens, lengths - 1, slots, table, lengths, *rotation, *caches)
    matrices = [t for t, role in zip(weights.tensors, weights.roles, strict=True) if role in ("matrix", "gate_up")]
    rows = {width: torch.randn(BATCH, width) for width in {m.shape[1] for m in matrices}}
    against(
        "F.linear with every matrix of the model, nothing else",
        times(5, lambda: decode_step(weights, operands, *inputs)),
        times(5, lambda: [F.linear(rows[m.shape[1]], m) for m in matrices]),
        KERNELS,
    )


@torch.inference_mode()
def test_decode_attention(against: Against) -> None:
    table, lengths = pages()
    key, value = torch.randn(2, table.numel(), PAGE, GROUPS, HEAD_DIM)
    q, scale = torch.randn(BATCH, HEADS, HEAD_DIM), HEAD_DIM**-0.5
    dense_key, dense_value = (cache.view(BATCH, CONTEXT, GROUPS, HEAD_DIM).transpose(1, 2) for cache in (key, value))
    against(
        "scaled_dot_product_attention on a dense cache",
        times(50, lambda: torch.ops.minimind.decode_attention(q, key, value, table, lengths, scale, None, None)),
        times(50, lambda: F.scaled_dot_product_attention(q[:, :, None], dense_key, dense_value, enable_gqa=True)),
        KERNELS,
    )


@torch.inference_mode()
def test_rope_append_kv(against: Against) -> None:
    """For 64 new tokens."""
    tokens, half = 64, HEAD_DIM // 2
    qkv = torch.randn(tokens, (HEADS + 2 * GROUPS) * HEAD_DIM)
    cos, sin = torch.randn(2, CONTEXT, half)
    positions, slots = torch.arange(tokens, dtype=torch.int32), torch.randperm(BATCH * CONTEXT)[:tokens]
    key, value = torch.zeros(2, BATCH * CONTEXT // PAGE, PAGE, GROUPS, HEAD_DIM)

    def plain() -> Tensor:
        q, k, v = qkv.view(tokens, -1, HEAD_DIM).split((HEADS, GROUPS, GROUPS), dim=1)
        c, s = cos[positions.long()][:, None], sin[positions.long()][:, None]
        q, k = (
            torch.cat((x[..., :half] * c - x[..., half:] * s, x[..., half:] * c + x[..., :half] * s), -1)
            for x in (q, k)
        )
        key.view(-1, GROUPS, HEAD_DIM)[slots] = k
        value.view(-1, GROUPS, HEAD_DIM)[slots] = v
        return q

    def ours() -> Tensor:
        inputs = (qkv, cos, sin, positions, slots, key, value, HEADS)
        return torch.ops.minimind.rope_append_kv(*inputs, None, None, 1e-6, None, None)

    assert torch.allclose(ours(), plain(), atol=1e-4)
    against("the same with PyTorch's operators", times(100, ours), times(100, plain), KERNELS)


@torch.inference_mode()
def test_sample(against: Against) -> None:
    """8 sequences, top-k 50 and top-p 0.9 of 6400 tokens."""
    vocab, one = 6400, torch.ones(BATCH)
    logits = 4 * torch.randn(BATCH, vocab)
    filters = (torch.full((BATCH,), 50, dtype=torch.int32), 0.9 * one, 0 * one)
    history, seeds = torch.zeros(BATCH, vocab, dtype=torch.int32), torch.arange(BATCH)
    inputs = (logits, one, *filters, one, 0 * one, history, seeds, torch.zeros(BATCH, dtype=torch.int64))

    def plain() -> Tensor:
        top, ids = logits.log_softmax(-1).topk(50)
        p = top.softmax(-1)
        p = p.masked_fill(p.cumsum(-1) - p >= 0.9, 0)
        return ids.gather(1, torch.multinomial(p, 1))

    against(
        "log_softmax, topk, multinomial",
        times(20, lambda: torch.ops.minimind.sample(*inputs)),
        times(20, plain),
        KERNELS,
    )


def test_document_attention(against: Against) -> None:
    """Forward and backward of 1024 tokens in documents of 16 to 256."""
    lengths = [256, 16, 128, 64, 200, 56, 96, 208]
    ends = torch.tensor([0, *lengths]).cumsum(0)
    shapes = ((HEADS, HEAD_DIM), (GROUPS, HEAD_DIM), (GROUPS, HEAD_DIM))
    q, k, v = (torch.randn(sum(lengths), *shape, requires_grad=True) for shape in shapes)
    gradient = torch.randn(q.shape)

    def plain() -> Tensor:
        parts = zip(*(t.transpose(0, 1).split(lengths, dim=1) for t in (q, k, v)), strict=True)
        return torch.cat(
            [F.scaled_dot_product_attention(a, b, c, is_causal=True, enable_gqa=True) for a, b, c in parts], dim=1
        ).transpose(0, 1)

    def ours() -> Tensor:
        return document_attention(q, k, v, ends)

    assert torch.allclose(ours(), plain(), atol=1e-4)
    against(
        "scaled_dot_product_attention, one document at a time",
        lambda: torch.autograd.grad(ours(), (q, k, v), gradient),
        lambda: torch.autograd.grad(plain(), (q, k, v), gradient),
        KERNELS,
    )
