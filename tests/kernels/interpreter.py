"""Patches Triton's interpreter to round like hardware.

The interpreter truncates float32 to bfloat16, while every card rounds to nearest even, and it multiplies bfloat16
matrices as if their bits were integers. Without the patches tests would measure errors that no card makes.
"""

import numpy as np
import triton.language as tl
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

_cast, _dot = InterpreterBuilder.cast_impl, InterpreterBuilder.create_dot


def to_bfloat16(data: np.ndarray) -> np.ndarray:
    """float32 -> the bits of the nearest bfloat16, ties to even, uint16; NaN stays NaN."""
    bits = np.ascontiguousarray(data, dtype=np.float32).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(data), np.uint32(0x7FC0), rounded).astype(np.uint16)


def to_float32(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def _cast_impl(self, src, dst_type):
    source, target = src.dtype.scalar, dst_type.scalar
    if target == tl.bfloat16 and source == tl.float32:
        return TensorHandle(to_bfloat16(src.data), target)
    if source == tl.bfloat16 and target == tl.float32:
        return TensorHandle(to_float32(np.ascontiguousarray(src.data)), target)
    return _cast(self, src, dst_type)


def _create_dot(self, a, b, d, input_precision, max_num_imprecise_acc):
    a, b = (_cast_impl(self, t, tl.float32) if t.dtype.scalar == tl.bfloat16 else t for t in (a, b))
    return _dot(self, a, b, d, input_precision, max_num_imprecise_acc)


def round_like_hardware() -> None:
    InterpreterBuilder.cast_impl = _cast_impl
    InterpreterBuilder.create_dot = _create_dot
