"""bench/kernel_check.py and bench/native_check.py, which run under compute-sanitizer, find wrong results."""

from __future__ import annotations

import pytest
import torch

from bench import kernel_check, native_check
from minimind.ops import native


def test_the_kernels_are_compared_with_plain_pytorch(monkeypatch, capsys):
    args = kernel_check.Args(ops=("rope",), device="cpu")
    assert kernel_check.main(args) == 0 and "rope, D 80, 8/2 heads" in capsys.readouterr().out
    monkeypatch.setattr(kernel_check, "worst_ratio", lambda *_: 2.01)
    assert kernel_check.main(args) == 1 and "2 is allowed" in capsys.readouterr().out
    with pytest.raises(ValueError, match="--ops rop: unknown"):
        kernel_check.main(kernel_check.Args(ops=("rop",), device="cpu"))


@pytest.mark.skipif(native.why_not(torch.device("cpu")) is not None, reason="the native operators are not built")
def test_the_native_operators_are_compared_with_the_reference(monkeypatch):
    monkeypatch.setattr(native_check, "ATTENTION", native_check.ATTENTION[:1])
    assert native_check.main(native_check.Args("cpu")) == 0
    monkeypatch.setattr(native_check, "append", lambda dtype, cache, dim, device, seen=[]: _other(dtype, dim, seen))
    assert native_check.main(native_check.Args("cpu")) == 1


def _other(dtype: torch.dtype, dim: int, seen: list) -> tuple:
    """Arguments of rope_append_kv that differ at every call."""
    seen.append(None)
    shape = [torch.zeros(2, 16, 2, dim) for _ in range(2)]
    angles = torch.full((10, dim // 2), float(len(seen)))
    places = torch.tensor([0, 9, 3], dtype=torch.int32), torch.tensor([5, -1, 16])
    qkv = torch.ones(3, 12 * dim)
    return (qkv, angles.cos(), angles.sin(), *places, *shape, 8, None, None, 1e-6, None, None)
