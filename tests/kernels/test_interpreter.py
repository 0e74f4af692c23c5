"""The interpreter's rounding, which every other test here rests on."""

import numpy as np
import pytest
import torch

from minimind.kernels.triton_support import jit, launch, tl
from tests.kernels.contract import DEVICE, INTERPRETING, rand


@pytest.mark.skipif(not INTERPRETING, reason="the interpreter's rounding matters only where it runs")
def test_rounding_to_bfloat16_is_pytorchs():
    from tests.kernels.interpreter import to_bfloat16

    values = torch.cat(
        (rand(5000, scale=1e3), torch.tensor([0.0, -0.0, 1.00390625, 1.01171875, 3.4e38, 1e-40]))
    )
    values = torch.cat((values, torch.tensor([float("inf"), -float("inf"), float("nan")])))
    rounded = torch.from_numpy(to_bfloat16(values.numpy()).view(np.int16)).view(torch.bfloat16)
    torch.testing.assert_close(rounded, values.bfloat16(), rtol=0, atol=0, equal_nan=True)


@jit
def _dot_kernel(p_a, p_b, p_out, SIZE: tl.constexpr):
    o_rows, o_cols = tl.arange(0, SIZE)[:, None], tl.arange(0, SIZE)[None, :]
    b_a = tl.load(p_a + o_rows * SIZE + o_cols)
    b_b = tl.load(p_b + o_rows * SIZE + o_cols)
    tl.store(p_out + o_rows * SIZE + o_cols, tl.dot(b_a, b_b))


def test_bfloat16_matrices_multiply_as_numbers():
    a, b = rand(16, 16).bfloat16(), rand(16, 16, seed=1).bfloat16()
    out = torch.full((16, 16), float("nan"), dtype=torch.bfloat16, device=DEVICE)
    launch(_dot_kernel, (1,), a, b, out, SIZE=16, num_warps=4)
    torch.testing.assert_close(out, (a.float() @ b.float()).bfloat16(), rtol=1e-2, atol=1e-2)
