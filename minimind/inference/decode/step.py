"""One step of the whole model as one native call, and the model's weights in the order that it reads.

    CPU    one parallel region for any batch, dense models and mixtures of experts; matrices are packed; prompts too
    CUDA   five kernels per layer for up to `cuda_rows` sequences of a dense model; matrices as the model stores them,
           or in rows of 8-bit integers (int8.py)

A packed matrix [N, K] consists of blocks of sixteen rows. In a block, the numbers that one instruction reads are
adjacent (csrc/cpu/matmul.h):

    float32   [N / 16, K, 16]          bfloat16   [N / 16, K / 2, 16, 2]

N and K are padded with zeros to multiples of 16 and 4. A gate_up [2 I, K] becomes [I / 16, 2, ...]: a block of the
gate, then the same block of the up projection. Dimensions before N, such as experts, stay. int8.py packs matrices of 8
bits. Packed matrices lie in huge pages: with pages of 4 KiB, an address is translated anew for every 64 lines read. In
pages of 2 MiB a step of minimind2-small in bfloat16 took 2.65 instead of 3.0 ms on one core (Zen 4, in a virtual
machine).
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from minimind.inference.decode.int8 import check_weights_dtype, int8_rows, pack_int8, packed_int8_shape, rounded_rows
from minimind.modeling import MLP, Block, Model, MoE, RMSNorm

CUDA_SHARED = 96 << 10  # bytes, as in csrc/cuda/matvec.cuh
PACKED_ROWS, PACKED_COLUMNS = 16, 4  # packed matrices are padded to multiples of these
Role = Literal["embedding", "matrix", "gate_up", "small"]  # small: norms and routers, which compute in float32
_HUGE_PAGE = 2 << 20
_ALIGNMENT = 64


def packs(device: torch.device) -> bool:
    """Whether the step on this device takes packed matrices, any model and any batch."""
    return device.type == "cpu"


@dataclass(frozen=True)
class DecodeWeights:
    """A model's weights in the order of the operator `decode_step` (csrc/register.cpp).

    tensors: on a CPU, matrices in bfloat16 or float32, and norms and routers in float32; on a GPU, matrices in any
        dtype that computes, and norms as they are. They share the model's memory if it has these dtypes.
    int8: the operands' matrices have 8 bits, except the embedding.
    """

    tensors: tuple[Tensor, ...]
    roles: tuple[Role, ...]
    heads: int
    qk_norm: bool
    experts: int
    experts_per_token: int
    shared_experts: int
    normalize_gates: bool
    eps: float
    int8: bool = False

    @staticmethod
    def from_model(
        model: Model, dtype: torch.dtype | None = None, weights_dtype: torch.dtype | None = None
    ) -> DecodeWeights:
        """dtype: of the matrices, float32 or bfloat16, on a GPU also float16; None: the model's. weights_dtype:
        torch.int8 for matrices of 8 bits; None: dtype. ValueError for another dtype on a CPU."""
        check_weights_dtype(weights_dtype, model.device)
        config, on_cpu = model.config, packs(model.device)
        dtype = dtype or model.dtype
        if on_cpu and dtype not in (torch.float32, torch.bfloat16):
            raise ValueError(f"decode_step takes float32 or bfloat16 weights, not {dtype}; pass dtype=torch.bfloat16")
        roles, weights = zip(*_weights(model), strict=True)
        small = torch.float32 if on_cpu else None
        dtypes = [small if role == "small" else dtype for role in roles]
        return DecodeWeights(
            tuple(weight.detach().to(own or weight.dtype) for weight, own in zip(weights, dtypes, strict=True)),
            roles,
            config.num_attention_heads,
            config.qk_norm,
            config.num_experts,
            config.num_experts_per_tok if config.num_experts else 0,
            config.num_shared_experts if config.num_experts else 0,
            config.norm_topk_prob,
            config.rms_norm_eps,
            weights_dtype == torch.int8,
        )

    @property
    def dtype(self) -> torch.dtype:
        return self.tensors[0].dtype

    @property
    def cuda_rows(self) -> int:
        """The most sequences of a step on a GPU; 0 if this model has no such step: mixtures of experts, and matrices
        whose rows do not begin at multiples of 16 bytes, or with 8 bits are not multiples of 4 numbers. The batch's
        activations must fit shared memory."""
        matrices = [t for t, role in zip(self.tensors, self.roles, strict=True) if role != "small"]
        columns = max(t.shape[-1] for t in matrices)
        unit, chunk = (4, 512) if self.int8 else (16 // self.dtype.itemsize, 512 // self.dtype.itemsize)
        if self.experts or any(t.shape[-1] % unit or t.data_ptr() % 16 for t in matrices):
            return 0
        padded = -(-columns // chunk) * chunk
        fits = (n for n in (8, 4, 2, 1) if 4 * ((n + 1) * padded + 4 * n) <= CUDA_SHARED)
        return next(fits, 0)

    @property
    def settings(self) -> tuple[int, bool, int, int, int, bool, float]:
        """The operator's arguments after the caches."""
        return (
            self.heads, self.qk_norm, self.experts, self.experts_per_token, self.shared_experts,
            self.normalize_gates, self.eps,
        )  # fmt: skip

    def operands(self, into: Sequence[Tensor] = ()) -> list[Tensor]:
        """The weights as the operator takes them on their device: on a CPU, all matrices except the embedding packed;
        on a GPU as they are, but 8-bit matrices as integers, each followed by its scales.

        into: an earlier result for this model, whose memory is reused for the packed and the 8-bit matrices.
        """
        if not packs(self.tensors[0].device):
            return self.operands_in_rows(into)
        matrices = [i for i, role in enumerate(self.roles) if role in ("matrix", "gate_up")]
        if into:
            room = [into[i] for i in matrices]
        else:
            dtype = torch.int8 if self.int8 else self.dtype
            shapes = [packed_shape(self.tensors[i].shape, dtype, self.roles[i] == "gate_up") for i in matrices]
            room = empty_in_huge_pages(shapes, torch.int32 if self.int8 else dtype, self.tensors[0].device)
        operands = list(self.tensors)
        for i, out in zip(matrices, room, strict=True):
            operands[i] = pack_matrix(self.tensors[i], out, self.roles[i] == "gate_up")
        return operands

    def operands_in_rows(self, into: Sequence[Tensor] = ()) -> list[Tensor]:
        """`operands` of a GPU, on any device."""
        if not self.int8:
            return list(self.tensors)
        operands: list[Tensor] = []
        for tensor, role in zip(self.tensors, self.roles, strict=True):
            matrix = role in ("matrix", "gate_up")
            operands += int8_rows(tensor, into[len(operands) : len(operands) + 2]) if matrix else [tensor]
        return operands

    def round_matrices(self) -> None:
        """Round all matrices but the embedding to 8 bits, in place: `tensors` must not be shared with another model."""
        for tensor, role in zip(self.tensors, self.roles, strict=True):
            if role in ("matrix", "gate_up"):
                tensor.copy_(rounded_rows(tensor))


def _weights(model: Model) -> Iterator[tuple[Role, Tensor]]:
    yield "embedding", model.embed_tokens.weight[: model.config.num_tokens]  # no other id occurs
    yield "small", model.norm.weight
    yield "matrix", model.head_weight
    for layer in cast(Iterable[Block], model.layers):
        yield from _layer_weights(layer)


def _layer_weights(layer: Block) -> Iterator[tuple[Role, Tensor]]:
    attention, mlp = layer.self_attn, layer.mlp
    yield "small", layer.input_layernorm.weight
    yield "matrix", attention.qkv_proj.weight
    if attention.q_norm is not None:
        yield "small", attention.q_norm.weight
        yield "small", cast(RMSNorm, attention.k_norm).weight
    yield "matrix", attention.o_proj.weight
    yield "small", layer.post_attention_layernorm.weight
    if isinstance(mlp, MoE):
        yield "small", mlp.router.weight
        yield "gate_up", mlp.gate_up_proj
        yield "matrix", mlp.down_proj
    for dense in mlp.shared_experts if isinstance(mlp, MoE) else [mlp]:
        assert isinstance(dense, MLP)
        yield "gate_up", dense.gate_up_proj.weight
        yield "matrix", dense.down_proj.weight


def decode_step(
    weights: DecodeWeights,
    operands: list[Tensor],
    tokens: Tensor,
    positions: Tensor,
    slots: Tensor,
    page_table: Tensor,
    lengths: Tensor,
    cos: Tensor,
    sin: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> Tensor:
    """Logits of the next token of each sequence, float32 [B, V]; writes the new keys and values into the caches.

    operands: of `weights.operands()`. tokens: int64 [B], each in [0, V). key_cache, value_cache: [L, P, S, G, D].
    k_scale, v_scale: float32 [L, G] for a float8 cache. The other arguments are those of `rope_append_kv_ref` and
    `decode_attention_ref`. lengths[b] == 0 marks an empty row, whose logits are zeros. Rows must belong to different
    sequences; the new token is the last of its sequence, and slots[b] is its row of the cache. A row's logits are
    bit-identical in any batch. RuntimeError, which names the argument, for what the operator does not take.

    The arithmetic is float32, with two exceptions: on a CPU with bfloat16 or 8-bit weights, activations are rounded to
    bfloat16 or 8 bits before each product; on a GPU with a 16-bit dtype, queries are rounded to that dtype before
    attention over a cache of that dtype or float8.
    """
    return torch.ops.minimind.decode_step.default(
        tokens, positions, slots, page_table, lengths, cos, sin, operands, key_cache, value_cache,
        *weights.settings, k_scale, v_scale,
    )  # fmt: skip


def prefill_step(
    weights: DecodeWeights,
    operands: list[Tensor],
    rows: Sequence[Tensor],
    cos: Tensor,
    sin: Tensor,
    caches: Sequence[Tensor],
    scales: Sequence[Tensor | None],
) -> Tensor:
    """Logits after the `last` of N tokens of prompts, float32 [n, V]; writes all keys and values. On a CPU only.

    rows: a PromptRows. caches, scales: those of keys and of values. Each token is a row as in `decode_step`, which may
    follow other tokens of the call, and its bits are those that `decode_step` gives.
    """
    return torch.ops.minimind.prefill_step.default(*rows, cos, sin, operands, *caches, *weights.settings, *scales)


def packed_shape(shape: torch.Size, dtype: torch.dtype, gate_up: bool = False) -> tuple[int, ...]:
    """The shape of a packed matrix [..., N, K] of `dtype`: float32, bfloat16, or int8, which is packed in int32."""
    if dtype == torch.int8:
        return packed_int8_shape(shape, gate_up)
    *outer, n, k = shape
    blocks = (-(-n // 2 // PACKED_ROWS), 2) if gate_up else (-(-n // PACKED_ROWS),)
    k = -(-k // PACKED_COLUMNS) * PACKED_COLUMNS
    return (*outer, *blocks, *((k // 2, PACKED_ROWS, 2) if dtype == torch.bfloat16 else (k, PACKED_ROWS)))


def pack_matrix(weight: Tensor, out: Tensor, gate_up: bool = False) -> Tensor:
    """Pack weight [..., N, K], of any float dtype, into `out`, which has `packed_shape` and the target dtype: int32 for
    8 bits."""
    if out.dtype == torch.int32:
        return pack_int8(weight, out, gate_up)
    weight = weight.to(out.dtype)
    if gate_up:
        weight = weight.unflatten(-2, (2, -1))
    n, k = weight.shape[-2:]
    if n % PACKED_ROWS or k % PACKED_COLUMNS:
        weight = F.pad(weight, (0, -k % PACKED_COLUMNS, 0, -n % PACKED_ROWS))
    to = out
    if out.dtype == torch.bfloat16:  # moving pairs as one number is three times as fast
        weight, to = weight.contiguous().view(torch.int32), out.view(torch.int32).squeeze(-1)
    if gate_up:
        to = to.transpose(-4, -3)
    to.copy_(weight.unflatten(-2, (-1, PACKED_ROWS)).transpose(-2, -1))
    return out


def empty_in_huge_pages(shapes: Sequence[Sequence[int]], dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """Uninitialised tensors of these shapes. On a CPU with Linux they are adjacent and in huge pages, if the system
    grants them; elsewhere each is made by torch.empty."""
    sizes = [-(-math.prod(shape) * dtype.itemsize // _ALIGNMENT) * _ALIGNMENT for shape in shapes]
    if device.type != "cpu" or not hasattr(mmap, "MADV_HUGEPAGE") or not sum(sizes):
        return [torch.empty(tuple(shape), dtype=dtype, device=device) for shape in shapes]
    length = (-(-sum(sizes) // _HUGE_PAGE) + 1) * _HUGE_PAGE  # one page more, since the mapping may begin anywhere
    mapping = mmap.mmap(-1, length, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):  # a kernel without huge pages
        mapping.madvise(mmap.MADV_HUGEPAGE)
    memory = torch.frombuffer(mapping, dtype=torch.uint8)
    start = -memory.data_ptr() % _HUGE_PAGE
    parts = memory[start : start + sum(sizes)].split(sizes)
    return [
        part[: math.prod(shape) * dtype.itemsize].view(dtype).view(tuple(shape))
        for part, shape in zip(parts, shapes, strict=True)
    ]
