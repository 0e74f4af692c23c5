"""A whole decoding step of the whole model: one call, because every layer is too short for calls of its own.

CPU    one parallel region for any batch, dense models and mixtures of experts; matrices packed (packed_weights.py)
CUDA   five kernels a layer for up to `cuda_rows` sequences of a dense model; matrices as the model has them
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, cast

import torch
from torch import Tensor

from minimind.inference.decode import huge_pages
from minimind.inference.decode import ops as decode_ops
from minimind.inference.decode.checks import check, check_cache
from minimind.inference.decode.packed_weights import pack, packed_shape
from minimind.inference.decode.reference import (
    decode_attention_ref,
    experts_ref,
    linear_ref,
    mlp_ref,
    norm_ref,
    rope_append_kv_ref,
)
from minimind.modeling import MLP, Block, Model, MoE, RMSNorm

CUDA_SHARED = 96 << 10  # bytes, of csrc/cuda/matvec.cuh
Role = Literal["embedding", "matrix", "gate_up", "small"]  # small: norms and routers, which compute in float32


@dataclass(frozen=True)
class DecodeWeights:
    """A model's weights in the order of the operator `decode_step` (csrc/register.cpp).

    tensors: matrices bfloat16 or float32 and norms and routers float32 on a CPU; on a GPU matrices of any dtype that
    computes, and norms as they are. The model's own memory where it holds them so.
    """

    tensors: tuple[Tensor, ...]
    roles: tuple[Role, ...]
    layers: int
    heads: int
    groups: int
    head_dim: int
    qk_norm: bool
    experts: int
    experts_per_token: int
    shared_experts: int
    normalize_gates: bool
    eps: float

    @staticmethod
    def of(model: Model, dtype: torch.dtype | None = None) -> DecodeWeights:
        """dtype: of the matrices, float32 or bfloat16, on a GPU float16 too; None: as the model holds them."""
        cfg, on_cpu = model.config, model.device.type == "cpu"
        dtype = dtype or model.dtype
        if on_cpu and dtype not in (torch.float32, torch.bfloat16):
            raise ValueError(f"decode_step takes float32 or bfloat16 weights, not {dtype}; pass dtype=torch.bfloat16")
        roles, weights = zip(*_weights(model), strict=True)
        small = torch.float32 if on_cpu else None
        dtypes = [small if role == "small" else dtype for role in roles]
        return DecodeWeights(
            tuple(weight.detach().to(own or weight.dtype) for weight, own in zip(weights, dtypes, strict=True)),
            roles,
            cfg.num_hidden_layers,
            cfg.num_attention_heads,
            cfg.num_key_value_heads,
            cfg.head_dim,
            cfg.qk_norm,
            cfg.num_experts,
            cfg.num_experts_per_tok if cfg.num_experts else 0,
            cfg.num_shared_experts if cfg.num_experts else 0,
            cfg.norm_topk_prob,
            cfg.rms_norm_eps,
        )

    @property
    def dtype(self) -> torch.dtype:
        return self.tensors[0].dtype

    @property
    def vocab_size(self) -> int:
        return self.tensors[2].shape[0]

    @property
    def cuda_rows(self) -> int:
        """How many sequences a step on a GPU takes at most; 0: none of this model's. A mixture of experts has no such
        step; rows of all matrices must begin at multiples of 16 bytes, and a batch's activations fit shared memory."""
        matrices = [t for t, role in zip(self.tensors, self.roles, strict=True) if role != "small"]
        columns = max(t.shape[-1] for t in matrices)
        size, chunk = self.dtype.itemsize, 512 // self.dtype.itemsize
        if self.experts or any(t.shape[-1] * size % 16 or t.data_ptr() % 16 for t in matrices):
            return 0
        padded = -(-columns // chunk) * chunk
        fits = (n for n in (8, 4, 2, 1) if 4 * ((n + 1) * padded + 4 * n) <= CUDA_SHARED)
        return next(fits, 0)

    @cached_property
    def packed(self) -> list[Tensor]:
        """What the operator takes on a CPU: `tensors`, matrices but the embedding packed, as they were at first use."""
        return self.pack()

    @property
    def given(self) -> list[Tensor]:
        """What the operator takes on the device of these weights."""
        return self.packed if self.tensors[0].device.type == "cpu" else list(self.tensors)

    @property
    def shape(self) -> tuple[int, bool, int, int, int, bool, float]:
        """The operator's arguments behind the caches."""
        return (
            self.heads, self.qk_norm, self.experts, self.experts_per_token, self.shared_experts,
            self.normalize_gates, self.eps,
        )  # fmt: skip

    def pack(self, into: Sequence[Tensor] = ()) -> list[Tensor]:
        """`packed` of this moment; into: an earlier result for this model, whose memory is used again."""
        matrices = [i for i, role in enumerate(self.roles) if role in ("matrix", "gate_up")]
        if into:
            room = [into[i] for i in matrices]
        else:
            shapes = [packed_shape(self.tensors[i].shape, self.dtype, self.roles[i] == "gate_up") for i in matrices]
            room = huge_pages.empty(shapes, self.dtype, self.tensors[0].device)
        packed = list(self.tensors)
        for i, out in zip(matrices, room, strict=True):
            packed[i] = pack(self.tensors[i], out, self.roles[i] == "gate_up")
        return packed

    def layer(self, index: int) -> tuple[Tensor, ...]:
        per_layer = (len(self.tensors) - 3) // self.layers
        return self.tensors[3 + index * per_layer :][:per_layer]


def _weights(model: Model) -> Iterator[tuple[Role, Tensor]]:
    yield "embedding", model.embed_tokens.weight[: model.config.num_tokens]  # no other id is fed
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
    tokens: Tensor,
    positions: Tensor,
    slots: Tensor,
    block_table: Tensor,
    lengths: Tensor,
    cos: Tensor,
    sin: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> Tensor:
    """Logits of one new token of each sequence: float32 [B, V]; its keys and values are written into the caches.

    tokens int64 [B], from 0 to V - 1 in every slot; key_cache, value_cache [L, P, S, G, D]; k_scale, v_scale float32
    [L, G] for float8; the rest as in `decode_ops.rope_append_kv` and `decode_attention`. lengths[b] == 0: an empty
    slot, whose logits are zeros. No two rows may belong to one sequence; the new token is its last, and slots[b] the
    cache row of that. A row's logits are, to the last bit, the same in any batch.

    All is float32, but on a CPU with bfloat16 weights activations are rounded to bfloat16 before each product, and on a
    GPU queries to the dtype of 16-bit weights before attention over a cache of that dtype or float8. On a GPU more rows
    than `DecodeWeights.cuda_rows` are computed in plain PyTorch, or refused where native decoding is asked for: the
    engine takes the model's layers then.
    """
    _check(weights, tokens, positions, slots, block_table, lengths, cos, sin, key_cache, value_cache, k_scale, v_scale)
    inputs = (tokens, positions, slots, block_table, lengths, cos, sin)
    caches = (key_cache, value_cache)
    if not _is_native(weights, tokens):
        return decode_step_ref(weights, *inputs, *caches, k_scale, v_scale)
    return torch.ops.minimind.decode_step(*inputs, weights.given, *caches, *weights.shape, k_scale, v_scale)


def _is_native(weights: DecodeWeights, tokens: Tensor) -> bool:
    if not decode_ops.is_native(tokens.device):
        return False
    if tokens.device.type == "cpu" or len(tokens) <= weights.cuda_rows:
        return True
    if decode_ops.get_backend() == "native":
        limit = f"up to {weights.cuda_rows} rows" if weights.cuda_rows else "no row"
        raise ValueError(f"tokens: {len(tokens)} rows; a native step of this model on a GPU takes {limit}")
    return False


def decode_step_ref(
    weights: DecodeWeights,
    tokens: Tensor,
    positions: Tensor,
    slots: Tensor,
    block_table: Tensor,
    lengths: Tensor,
    cos: Tensor,
    sin: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> Tensor:
    """`decode_step` in plain PyTorch, on any device."""
    w = weights
    embedding, final_norm, head = w.tensors[:3]
    x = embedding[tokens].float()
    slots = torch.where(lengths > 0, slots, -1)
    for i in range(w.layers):
        input_norm, qkv, *rest = w.layer(i)
        q_norm, k_norm = rest[:2] if w.qk_norm else (None, None)
        o, post_norm, *mlp = rest[2:] if w.qk_norm else rest
        caches = (key_cache[i], value_cache[i])
        scales = (None if k_scale is None else k_scale[i], None if v_scale is None else v_scale[i])
        packed = linear_ref(norm_ref(x, input_norm, w.eps), qkv)
        q = rope_append_kv_ref(packed, cos, sin, positions, slots, *caches, w.heads, q_norm, k_norm, w.eps, *scales)
        attended = decode_attention_ref(q, *caches, block_table, lengths, w.head_dim**-0.5, *scales)
        x = x + linear_ref(attended.flatten(1), o)
        x = x + _feed_forward_ref(w, norm_ref(x, post_norm, w.eps), mlp)
    return linear_ref(norm_ref(x, final_norm, w.eps), head) * (lengths > 0)[:, None]


def _feed_forward_ref(w: DecodeWeights, x: Tensor, mlp: list[Tensor]) -> Tensor:
    out = torch.zeros_like(x)
    if w.experts:
        router, gate_up, down, *mlp = mlp
        out = experts_ref(x, router, gate_up, down, w.experts_per_token, w.normalize_gates)
    for gate_up, down in zip(mlp[::2], mlp[1::2], strict=True):
        out = out + mlp_ref(x, gate_up, down)
    return out


def _check(
    w: DecodeWeights,
    tokens: Tensor,
    positions: Tensor,
    slots: Tensor,
    block_table: Tensor,
    lengths: Tensor,
    cos: Tensor,
    sin: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
) -> None:
    check("tokens", tokens, (None,), (torch.int64,), tokens)
    batch = tokens.shape[0]
    if w.tensors[0].device != tokens.device:
        raise ValueError(f"tokens lies on {tokens.device}, the weights on {w.tensors[0].device}")
    check("positions", positions, (batch,), (torch.int32,), tokens)
    check("slots", slots, (batch,), (torch.int64,), tokens)
    check("block_table", block_table, (batch, None), (torch.int32,), tokens)
    check("lengths", lengths, (batch,), (torch.int32,), tokens)
    check("cos", cos, (None, w.head_dim // 2), (torch.float32,), tokens)
    check("sin", sin, tuple(cos.shape), (torch.float32,), tokens)
    shape = (w.layers, None, None, w.groups, w.head_dim)
    check("key_cache", key_cache, shape, (key_cache.dtype,), tokens)
    check("value_cache", value_cache, tuple(key_cache.shape), (key_cache.dtype,), tokens)
    for name, scale in (("k_scale", k_scale), ("v_scale", v_scale)):
        if scale is not None:
            check(name, scale, (w.layers, w.groups), (torch.float32,), tokens)
    first = [None if scale is None else scale[0] for scale in (k_scale, v_scale)]
    check_cache(key_cache[0], value_cache[0], first[0], first[1], tokens)
