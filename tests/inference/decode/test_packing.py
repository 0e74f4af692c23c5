"""The layout of packed weights, number by number."""

from __future__ import annotations

import pytest
import torch

from minimind.inference.decode.step import pack_matrix, packed_shape


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(32, 8), (37, 10), (3, 16, 7), (1, 1)])
def test_the_packed_layout_and_its_zero_padding(shape, dtype):
    weight = torch.randn(shape)
    out = pack_matrix(weight, torch.full(packed_shape(weight.shape, dtype), float("nan"), dtype=dtype))
    per_step = 2 if dtype == torch.bfloat16 else 1
    if dtype == torch.float32:
        out = out.unsqueeze(-1)
    *_, blocks, steps, lanes, _ = out.shape
    for index in torch.cartesian_prod(*[torch.arange(n) for n in (blocks, steps, lanes, per_step)]):
        block, step, lane, part = index.tolist()
        n, k = block * 16 + lane, step * per_step + part
        found = out[..., block, step, lane, part]
        inside = n < shape[-2] and k < shape[-1]
        assert torch.equal(found, weight[..., n, k].to(dtype) if inside else torch.zeros_like(found))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(64, 8), (42, 6), (2, 34, 9)])
def test_gate_and_up_alternate_block_by_block(shape, dtype):
    weight = torch.randn(shape)
    out = pack_matrix(weight, torch.empty(packed_shape(weight.shape, dtype, True), dtype=dtype), True)
    gate, up = weight.chunk(2, dim=-2)
    for half, packed in zip((gate, up), out.unbind(len(shape) - 1), strict=True):
        assert torch.equal(packed, pack_matrix(half, torch.empty(packed_shape(half.shape, dtype), dtype=dtype)))
