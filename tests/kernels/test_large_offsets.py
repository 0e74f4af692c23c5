"""Offsets beyond 2^31 elements, where 32-bit arithmetic wraps around.

The tensors are sparse files larger than memory, of which a kernel touches a few pages: only one of the last programs
runs. The sanitizer checks its addresses, and its results are compared.
"""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from minimind.kernels import moe_routing, rms_norm, rope_sections, swiglu, triton_support
from minimind.kernels.linear_cross_entropy import _cross_entropy_kernel
from minimind.kernels.rms_norm import rms_norm_ref
from minimind.kernels.swiglu import swiglu_ref
from tests.kernels import sanitizer
from tests.kernels.contract import INTERPRETING, rand

pytestmark = pytest.mark.skipif(not INTERPRETING, reason="one program alone runs in the interpreter only")
Launch = Callable[..., None]


@pytest.fixture
def sparse(tmp_path) -> Callable[..., Tensor]:
    """Make bfloat16 zeros, which take no memory until they are written."""
    made = iter(range(100))

    def zeros(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        size = int(np.prod(shape))
        return torch.from_file(str(tmp_path / f"{next(made)}"), True, size, dtype=dtype).view(shape)

    return zeros


@pytest.fixture
def launch_one(monkeypatch) -> Launch:
    """Make a function that launches program `index` of a kernel alone."""
    from triton.runtime.interpreter import GridExecutor, InterpreterBuilder, TensorHandle

    chosen = [0]
    original = InterpreterBuilder.create_get_program_id

    def program_id(self, axis):
        handle = original(self, axis)
        return TensorHandle(handle.data + np.int32(chosen[0] if axis == 0 else 0), handle.dtype)

    def launch(kernel, index: int, *args, **constants) -> None:
        chosen[0] = index
        sanitizer.run(kernel, (1,), args, constants, 4, 2)

    monkeypatch.setattr(InterpreterBuilder, "create_get_program_id", program_id)
    # CPU tensors need no copy on the host, which would materialise the sparse files
    monkeypatch.setattr(GridExecutor, "_init_args_hst", lambda self, args, kwargs: (args, kwargs))
    monkeypatch.setattr(GridExecutor, "_restore_args_dev", lambda self, *_: None)
    return launch


ROWS, WIDTH, BLOCK = 2**25 + 16, 64, 16  # rows x width is beyond 2^31
LAST = ROWS // BLOCK - 1


def filled(tensor: Tensor, seed: int) -> Tensor:
    """The last block's rows."""
    tensor[-BLOCK:] = rand(BLOCK, *tensor.shape[1:], seed=seed).to(tensor.dtype)
    return tensor[-BLOCK:]


def test_rms_norm(sparse, launch_one):
    x, y, rstd, dy, dx = (sparse(ROWS, WIDTH), sparse(ROWS, WIDTH), sparse(ROWS, dtype=torch.float32),
                          sparse(ROWS, WIDTH), sparse(ROWS, WIDTH))  # fmt: skip
    weight, tile = torch.ones(WIDTH), dict(D=WIDTH, SPLIT=False, BLOCK_R=BLOCK, BLOCK_D=WIDTH)
    part, dy_part = filled(x, 1).clone().requires_grad_(), filled(dy, 2)
    launch_one(
        rms_norm._rms_norm_forward_kernel, LAST, x, None, weight, y, None, rstd, ROWS, 1, WIDTH, 0, 0, 0, 1e-5, **tile
    )
    expected = rms_norm_ref(part, weight, 1e-5)
    torch.testing.assert_close(y[-BLOCK:], expected)
    partial = sparse(LAST + 1, WIDTH, dtype=torch.float32)
    launch_one(
        rms_norm._rms_norm_backward_kernel, LAST, dy, x, weight, rstd, None, dx, partial, ROWS, 1, WIDTH, 0, **tile
    )
    expected.backward(dy_part)
    torch.testing.assert_close(dx[-BLOCK:], part.grad)


def test_swiglu(sparse, launch_one):
    gate_up, y, dy, dgate_up = (sparse(ROWS, n) for n in (2 * WIDTH, WIDTH, WIDTH, 2 * WIDTH))
    tile = dict(SIZE=WIDTH, BLOCK_R=BLOCK, BLOCK_I=WIDTH)
    part, dy_part = filled(gate_up, 1).clone().requires_grad_(), filled(dy, 2)
    launch_one(swiglu._swiglu_forward_kernel, LAST, gate_up, y, ROWS, 2 * WIDTH, **tile)
    launch_one(swiglu._swiglu_backward_kernel, LAST, dy, gate_up, dgate_up, ROWS, 2 * WIDTH, **tile)
    expected = swiglu_ref(part)
    expected.backward(dy_part)
    torch.testing.assert_close(y[-BLOCK:], expected)
    torch.testing.assert_close(dgate_up[-BLOCK:], part.grad)


@pytest.mark.parametrize("section", [0, 1, 2])
def test_rope(section, sparse, launch_one):
    """One query, one key and one value head; the last block of each."""
    qkv, dqkv, outputs = (sparse(ROWS, 3 * WIDTH), sparse(ROWS, 3 * WIDTH), [sparse(ROWS, WIDTH) for _ in range(3)])
    table, ids = rand(1, WIDTH // 2), torch.zeros(1, dtype=torch.int64)
    none, tile = [None] * 2, dict(H=1, G=1, HALF=WIDTH // 2, BLOCK_R=BLOCK, BLOCK_H=WIDTH // 2)
    part = filled(qkv, 1).unflatten(1, (3, WIDTH))[:, section].float()
    blocks = LAST + 1
    index = (section + 1) * blocks - 1
    launch_one(
        rope_sections.rope_forward_kernel, index, qkv, table, table, ids, *none, *outputs, none[0],
        ROWS, 1, 1, blocks, blocks, 3 * WIDTH, 0.0, **tile,
    )  # fmt: skip
    first, second = part.chunk(2, dim=1)
    turned = torch.cat((first * table - second * table, second * table + first * table), dim=1)
    torch.testing.assert_close(outputs[section][-BLOCK:], (part if section == 2 else turned).bfloat16())
    launch_one(
        rope_sections.rope_backward_kernel, index, *outputs, None, table, table, ids, *none, None, dqkv, None,
        ROWS, 1, 1, blocks, blocks, blocks, 0, **tile,
    )  # fmt: skip
    back = dqkv[-BLOCK:].unflatten(1, (3, WIDTH))[:, section].float()
    scale = 1 if section == 2 else 2 * table.square().repeat(1, 2)  # rotated forth and back, with cos = sin = table
    torch.testing.assert_close(back, part * scale, rtol=2e-2, atol=2e-2)


def test_route(sparse, launch_one):
    logits, scores = sparse(ROWS, WIDTH), sparse(ROWS, WIDTH, dtype=torch.float32)
    gates, ids = sparse(ROWS, 1, dtype=torch.float32), sparse(ROWS, 1, dtype=torch.int32)
    blocks = LAST + 1
    histogram = sparse(WIDTH, blocks, dtype=torch.int32)
    part = filled(logits, 1).float()
    launch_one(
        moe_routing._route_choose_kernel, LAST, logits, None, None, gates, ids, scores, histogram, None, None,
        ROWS, blocks, 1, WIDTH, E=WIDTH, K=1, NORMALIZE=False, BLOCK_T=BLOCK, BLOCK_E=WIDTH, BLOCK_K=1,
    )  # fmt: skip
    torch.testing.assert_close(scores[-BLOCK:], part.softmax(dim=1))
    assert torch.equal(ids[-BLOCK:, 0].long(), part.argmax(dim=1))
    assert histogram[:, -1].sum() == BLOCK


def test_rows_of_logits(sparse, launch_one):
    """Our chunks are small, but other callers may use larger ones."""
    rows = ROWS // BLOCK * WIDTH // 64
    logits = sparse(rows, 1024)
    targets, scale, losses = (sparse(rows, dtype=d) for d in (torch.int64, torch.float32, torch.float32))
    logits[-1], scale[-1] = rand(1024).bfloat16(), 1.0
    expected = torch.nn.functional.cross_entropy(logits[-1:].float(), targets[-1:])
    launch_one(
        _cross_entropy_kernel, rows - 1, logits, targets, scale, losses, V=1024, BLOCK_V=1024, GRADIENT=True,
    )  # fmt: skip
    torch.testing.assert_close(losses[-1], expected)
    assert logits[-1].float().sum().abs() < 0.01  # a gradient now
    assert triton_support.interpreting()
