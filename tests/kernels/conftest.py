"""Kernel tests run in Triton's interpreter on a CPU and natively on a GPU; without Triton they are skipped with a
reason."""

import pytest

from minimind.kernels import triton_support
from tests.kernels.contract import INTERPRETING

if INTERPRETING and triton_support.triton is not None:
    from tests.kernels import sanitizer
    from tests.kernels.interpreter import round_like_hardware

    round_like_hardware()
    sanitizer.install()


@pytest.fixture(autouse=True)
def _needs_triton():
    if triton_support.triton is None:
        pytest.skip("install minimind[gpu]: the kernels' tests need Triton")


@pytest.fixture(autouse=True)
def _sanitized(monkeypatch):
    """Check every launch in the interpreter for addresses out of bounds and for races between programs."""
    if INTERPRETING and triton_support.triton is not None:
        monkeypatch.setattr(triton_support, "_run", sanitizer.run)
