"""Runs the model over the paged cache: chunks of prompts, and one token for every row of the decode batch.

    prompts   the model's own layers under PagedLayout (prefill.py)
    decoding  native: one call of the extension for the whole model (decode/step.py), on a CPU always, on a GPU for as
              many rows as it takes
              otherwise: the model's projections around rope_append_kv and decode_attention
    drawing   `sample`, and DecodeBatch.take, which makes the rows ready for the next step

`step` is all three for the rows of the batch: on a GPU, with native operators, one CUDA graph.

Operators are called without the argument checks of decode_ops: shapes and dtypes are the engine's own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from minimind.inference.batch import DecodeBatch
from minimind.inference.cache import LayerCache, PagedCache
from minimind.inference.decode import ops as decode_ops
from minimind.inference.decode.graphs import DecodeGraphs
from minimind.inference.decode.ops import BACKENDS, Backend
from minimind.inference.decode.reference import decode_attention_ref, rope_append_kv_ref
from minimind.inference.decode.sampling_reference import penalised, sample_ref
from minimind.inference.decode.step import DecodeWeights
from minimind.inference.prefill import ChunkAttention, PagedLayout, pack
from minimind.inference.replica import Replica
from minimind.inference.scheduler import Chunk
from minimind.modeling import Attention, Block, Rotation
from minimind.ops import native, varlen
from minimind.rope import rope_cos_sin

T = TypeVar("T")
_SAMPLING = (
    "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "presence_penalty", "history", "seed", "offset"
)  # fmt: skip


_REFERENCE: tuple[Callable, Callable, Callable] = (rope_append_kv_ref, decode_attention_ref, sample_ref)


def _native_ops() -> tuple[Callable, Callable, Callable]:
    ops = torch.ops.minimind
    return ops.rope_append_kv.default, ops.decode_attention.default, ops.sample.default


def why_not_native(device: torch.device, dtype: torch.dtype) -> str | None:
    """What keeps the native operators from computing in `dtype` on `device`: one line, or None. They read and write
    a cache of any dtype."""
    if device.type == "cpu" and dtype not in (torch.float32, torch.bfloat16):
        return f"on a CPU the native operators compute in float32 and bfloat16, not {str(dtype).removeprefix('torch.')}"
    return native.why_not(device)


class Runner:
    """replica: the model; cache, batch: what it reads and writes; backend: see Engine; late: as of the batch."""

    def __init__(
        self,
        replica: Replica,
        cache: PagedCache,
        batch: DecodeBatch,
        max_context: int,
        backend: Backend,
        late: bool = False,
    ) -> None:
        self._replica, self._cache, self._batch = replica, cache, batch
        self._device = cache.k.device
        self._model, self._dtype = replica.model, replica.dtype
        self._layer_caches = [cache.layer(i) for i in range(len(cache.k))]
        missing = why_not_native(self._device, self._dtype)
        if backend == "native" and missing is not None:
            raise ValueError(f"backend='native' cannot be met: {missing}; use backend='auto' or 'reference'")
        if backend not in BACKENDS:
            raise ValueError(f"unknown backend {backend!r}; choose one of {', '.join(BACKENDS)}")
        config = self._model.config
        heads = (config.num_attention_heads, config.num_key_value_heads, config.head_dim)
        varlen.detect_grouped_heads(self._device, varlen.Heads(*heads, self._dtype))
        asked = backend if backend != "auto" else decode_ops.get_backend()
        self._native, self._reason = asked != "reference" and missing is None, missing
        self._rope, self._attention, self._sample = _native_ops() if self._native else _REFERENCE
        counters = torch.zeros(batch.max_batch * heads[0], dtype=torch.int32, device=self._device)
        self._arrivals = (counters,) if self._native else ()  # of decode_attention, which leaves them at zero
        positions = torch.arange(max_context, device=self._device)
        self._cos, self._sin = rope_cos_sin(self._model.config, positions)  # [max_context, D / 2]
        self._weights: DecodeWeights | None = None
        self._packed: list[Tensor] = []  # the weights as the operator decode_step takes them
        self._step_rows = 0  # that decode_step takes at most
        self._graphed = late and (self._native or self._device.type == "cpu")
        self._graphs: dict[str, DecodeGraphs[Any]] = {}
        self.weights_changed(moved=True)

    def describe(self) -> str:
        if self._native:
            return f"decoding: native ({native.build_info().summary(self._device)})"
        return f"decoding: reference (plain PyTorch){'' if self._reason is None else f': {self._reason}'}"

    @property
    def packed_bytes(self) -> int:
        """Of the weights' copy that decoding reads on a CPU; 0 on a GPU."""
        own = self._replica.model.parameters()
        shared = {p.data_ptr() for p in own}
        return sum(t.nbytes for t in self._packed if t.data_ptr() not in shared)

    def weights_changed(self, moved: bool) -> None:
        """After Replica.refresh, which returned `moved`. A float8 cache takes the new weights' scales, and with that
        loses what it holds."""
        self._cache.take_scales(self._model)
        if self._native:
            self._weights = DecodeWeights.of(self._model, self._dtype)
            on_cpu = self._device.type == "cpu"
            self._packed = self._weights.pack(self._packed) if on_cpu else self._weights.given
            self._step_rows = self._batch.max_batch if on_cpu else self._weights.cuda_rows
        if moved:
            self._graphs.clear()

    def prefill(self, chunks: Sequence[Chunk]) -> Tensor:
        """Compute the chunks; float32 [n, V], logits of the next token of those that are their samples' last."""
        model = self._model
        prompts = pack(chunks, self._cache.page_size, self._device)
        rotation = Rotation(self._cos, self._sin, prompts.position.unsqueeze(0))
        attention = ChunkAttention(prompts)
        x = model.embed_tokens(prompts.token).to(self._dtype).unsqueeze(0)  # [1, N, C]
        delta = None
        for layer, cache in self._layers():
            layout = cast(Any, PagedLayout(prompts, attention, cache))
            x, delta, _ = layer(x, delta, rotation, layout, None)
        assert delta is not None
        return self._logits(x[0].index_select(0, prompts.last), delta[0].index_select(0, prompts.last))

    def step(self) -> None:
        """Decode one token for every row of the batch and draw the next: `batch.take` has them then."""
        self._run("step", self._step)

    def decode(self) -> Tensor:
        """One token for every row of the batch; logits of the next, float32 [B, V], valid until the next call. For
        batches in which the host has a say before the draw."""
        return self._run("decode", self._decode)[: len(self._batch)]

    def sample(self, logits: Tensor, first: int = 0) -> tuple[Tensor, Tensor]:
        """logits float32 [n, V] of the batch's rows from `first` on -> their next tokens int64 [n], log-probabilities
        float32 [n]."""
        b = self._batch.views(logits.shape[0], first)
        return self._sample(logits, *[b[name] for name in _SAMPLING])

    def likeliest(self, logits: Tensor, rows: list[int], count: int, first: int = 0) -> tuple[Tensor, Tensor]:
        """Log-probabilities and ids of the likeliest tokens of some rows of `logits`, [len(rows), count]: of the
        penalised, scaled and untruncated distribution, as `sample` reports that of its token."""
        index = torch.tensor(rows, device=logits.device)
        views = self._batch.views(logits.shape[0], first)
        b = {name: views[name][index] for name in _SAMPLING}
        logits = penalised(logits[index], b["repetition_penalty"], b["presence_penalty"], b["history"])
        temperature = torch.where(b["temperature"] > 0, b["temperature"], 1.0)
        log_probs = (logits / temperature[:, None]).log_softmax(-1)
        return log_probs.topk(min(count, log_probs.shape[-1]), dim=-1)

    def _run(self, name: str, function: Callable[[int], T]) -> T:
        """function(rows of the batch), as a graph where there are graphs: then perhaps of more rows."""
        rows = len(self._batch)
        if not self._graphed:
            return function(rows)
        if name not in self._graphs:
            with self._batch.blank():
                self._graphs[name] = DecodeGraphs(function, self._batch.max_batch, self._device)
        return self._graphs[name](rows)

    def _step(self, rows: int) -> None:
        self._batch.take(0, *self.sample(self._decode(rows)))

    def _decode(self, rows: int) -> Tensor:
        if self._weights is not None and rows <= self._step_rows:
            return self._decode_whole(self._weights, rows)
        return self._decode_layers(rows)

    def _decode_whole(self, w: DecodeWeights, rows: int) -> Tensor:
        b = self._batch.views(rows)
        return torch.ops.minimind.decode_step.default(
            b["token"], b["position"], b["slot"], b["table"], b["length"], self._cos, self._sin, self._packed,
            self._cache.k, self._cache.v, *w.shape, self._cache.k_scale, self._cache.v_scale,
        )  # fmt: skip

    def _decode_layers(self, rows: int) -> Tensor:
        model, b = self._model, self._batch.views(rows)
        x = model.embed_tokens(b["token"]).to(self._dtype)  # [B, C]
        delta = None
        for layer, cache in self._layers():
            normed, x = layer.input_layernorm(x, delta)
            normed, x = layer.post_attention_layernorm(x, self._attend(layer.self_attn, normed, cache, b))
            delta = layer.mlp(normed[None])[0][0] if model.config.num_experts else layer.mlp(normed)
        assert delta is not None
        return self._logits(x, delta)

    def _layers(self) -> Iterator[tuple[Block, LayerCache]]:
        return zip(cast(Iterable[Block], self._model.layers), self._layer_caches, strict=True)

    def _attend(self, attn: Attention, x: Tensor, cache: LayerCache, b: dict[str, Tensor]) -> Tensor:
        """x [B, C] -> [B, C]; the tokens' keys and values go into the layer's cache."""
        norms = (
            None if attn.q_norm is None else attn.q_norm.weight,
            None if attn.k_norm is None else attn.k_norm.weight,
        )
        positions = (self._cos, self._sin, b["position"], b["slot"])
        caches, scales = (cache.k, cache.v), (cache.k_scale, cache.v_scale)
        q = self._rope(attn.qkv_proj(x), *positions, *caches, attn.heads, *norms, attn.eps, *scales)
        out = self._attention(q, *caches, b["table"], b["length"], q.shape[-1] ** -0.5, *scales, *self._arrivals)
        return attn.o_proj(out.flatten(1))

    def _logits(self, x: Tensor, delta: Tensor) -> Tensor:
        x, _ = self._model.norm(x, delta)
        return F.linear(x, self._model.head_weight.to(x.dtype)).float()
