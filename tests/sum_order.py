"""Makes matrix products sum in another order, as on another processor.

With MINIMIND_TEST_SUM_ORDER=N in the environment (see conftest.py) the terms of every float32 and float64 product on
the CPU are shuffled by a permutation that depends on N and their number. A bound that holds only for one processor's
order fails for some N.
"""

from __future__ import annotations

import functools
import os
import warnings

import torch
from torch import Tensor

NAME = "MINIMIND_TEST_SUM_ORDER"
SHUFFLED = (torch.float32, torch.float64)


@functools.cache
def order(terms: int) -> Tensor:
    generator = torch.Generator().manual_seed(hash((int(os.environ[NAME]), terms)))
    return torch.randperm(terms, generator=generator)


def shuffled(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """a [..., M, K] and b [..., K, N] with their K terms in another order."""
    if a.dtype not in SHUFFLED or a.shape[-1] < 2 or a.shape[-1] != b.shape[-2]:
        return a, b  # shapes that do not fit are ATen's to refuse
    places = order(a.shape[-1])
    return a.index_select(a.ndim - 1, places), b.index_select(b.ndim - 2, places)


def mm(a: Tensor, b: Tensor) -> Tensor:
    return torch.ops.aten.mm.out(*shuffled(a, b), out=a.new_empty(a.shape[0], b.shape[1]))


def bmm(a: Tensor, b: Tensor) -> Tensor:
    return torch.ops.aten.bmm.out(*shuffled(a, b), out=a.new_empty(a.shape[0], a.shape[1], b.shape[2]))


def addmm(c: Tensor, a: Tensor, b: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    out = a.new_empty(a.shape[0], b.shape[1])
    return torch.ops.aten.addmm.out(c, *shuffled(a, b), beta=beta, alpha=alpha, out=out)


def install() -> torch.library.Library:
    """For as long as the result lives."""
    library = torch.library.Library("aten", "IMPL")
    with warnings.catch_warnings():  # that there was a kernel already
        warnings.simplefilter("ignore")
        for function in (mm, bmm, addmm):
            library.impl(function.__name__, function, "CPU")
    return library


_library = install() if NAME in os.environ else None
