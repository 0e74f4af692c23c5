"""Weights in the order in which the CPU's decoding step reads them (csrc/cpu/matmul.h).

A matrix [N, K] becomes blocks of sixteen rows; in a block, what one instruction takes of the rows lies side by side:

    float32   [N / 16, K, 16]          bfloat16   [N / 16, K / 2, 16, 2]

N and K are padded with zeros to multiples of 16 and 4. A gate_up [2 I, K] becomes [I / 16, 2, ...]: a block of the
gate, then the same of the up projection. Dimensions before N, such as experts, stay.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK, K_MULTIPLE = 16, 4


def packed_shape(shape: torch.Size, dtype: torch.dtype, gate_up: bool = False) -> tuple[int, ...]:
    """Of a matrix [..., N, K] of `dtype`, float32 or bfloat16."""
    *outer, n, k = shape
    blocks = (-(-n // 2 // BLOCK), 2) if gate_up else (-(-n // BLOCK),)
    k = -(-k // K_MULTIPLE) * K_MULTIPLE
    return (*outer, *blocks, *((k // 2, BLOCK, 2) if dtype == torch.bfloat16 else (k, BLOCK)))


def pack(weight: Tensor, out: Tensor, gate_up: bool = False) -> Tensor:
    """weight [..., N, K] of any float dtype into out, of `packed_shape` and in the dtype wanted; returns it."""
    weight = weight.to(out.dtype)
    if gate_up:
        weight = weight.unflatten(-2, (2, -1))
    n, k = weight.shape[-2:]
    if n % BLOCK or k % K_MULTIPLE:
        weight = F.pad(weight, (0, -k % K_MULTIPLE, 0, -n % BLOCK))
    to = out
    if out.dtype == torch.bfloat16:  # a pair moves as one number: three times as fast
        weight, to = weight.contiguous().view(torch.int32), out.view(torch.int32).squeeze(-1)
    if gate_up:
        to = to.transpose(-4, -3)
    to.copy_(weight.unflatten(-2, (-1, BLOCK)).transpose(-2, -1))
    return out
