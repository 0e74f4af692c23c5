"""Kernel tests run in Triton's interpreter on a CPU and natively on a GPU; without Triton they are skipped, aloud."""

import pytest

from minimind.kernels.triton_support import triton
from tests.kernels.contract import INTERPRETING

if INTERPRETING and triton is not None:
    from tests.kernels.interpreter import round_like_hardware

    round_like_hardware()


@pytest.fixture(autouse=True)
def _needs_triton():
    if triton is None:
        pytest.skip("install minimind[gpu]: the kernels' tests need Triton")
