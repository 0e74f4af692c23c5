"""The interpreter's rounding, on which all other tests here depend."""

import numpy as np
import pytest
import torch

from minimind.kernels.triton_support import jit, launch, tl
from tests.kernels.contract import DEVICE, INTERPRETING, rand


@pytest.mark.skipif(not INTERPRETING, reason="the interpreter's rounding matters only where it runs")
def test_rounding_to_bfloat16_is_pytorchs():
    from tests.kernels.interpreter import to_bfloat16

    values = torch.cat((rand(5000, scale=1e3), torch.tensor([0.0, -0.0, 1.00390625, 1.01171875, 3.4e38, 1e-40])))
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


@jit
def _copy_kernel(p_x, p_y, n, STEP: tl.constexpr, SIZE: tl.constexpr):
    """Each program copies SIZE numbers, which start STEP after those of the previous program."""
    o_x = tl.program_id(0) * STEP + tl.arange(0, SIZE)
    tl.store(p_y + o_x, tl.load(p_x + o_x, mask=o_x < n, other=0.0), mask=o_x < n)


@pytest.mark.skipif(not INTERPRETING, reason="on a GPU compute-sanitizer does this")
def test_the_sanitizer_sees_strange_addresses_and_races():
    x, y = rand(40), torch.zeros(40)
    launch(_copy_kernel, (5,), x, y, 40, STEP=8, SIZE=8, num_warps=4)
    assert torch.equal(x, y)
    launch(_copy_kernel, (1,), x, x, 40, STEP=0, SIZE=64, num_warps=4)  # in place, alone: no race
    for n in (41, 64):
        with pytest.raises(Exception, match=r"_copy_kernel, program .* an address outside all tensors"):
            launch(_copy_kernel, (5,), x, y, n, STEP=8, SIZE=16, num_warps=4)
    with pytest.raises(Exception, match="an address outside all tensors"):
        launch(_copy_kernel, (3,), x[::2][:8], y, 40, STEP=8, SIZE=8, num_warps=4)
    with pytest.raises(Exception, match="two programs store to one address"):
        launch(_copy_kernel, (5,), x, y, 40, STEP=7, SIZE=8, num_warps=4)
    with pytest.raises(Exception, match="a program loads what another one stores"):
        launch(_copy_kernel, (2,), x[4:], x, 16, STEP=8, SIZE=8, num_warps=4)
