"""Runs the model over the paged cache: chunks of prompts, and one token for every row of the decode batch.

    prompts    native: one call for all chunks on an x86 processor (decode/step.py); otherwise the model's own layers
               under PagedLayout (prefill.py)
    decoding   native: one call for the whole model (decode/step.py), on a CPU always, on a GPU for as many rows as it
               takes; otherwise the model's projections around rope_append_kv and decode_attention
    sampling   the operator `sample`, and DecodeBatch.append, which prepares the rows for the next step

`step` does the last two for the whole batch: on a GPU, with native operators, as one CUDA graph. There is one graph for
batch 1, 2, 4, ..., replayed with the batch padded to the next size; rows beyond the batch have slot -1 and length 0, so
they write nothing and attend to nothing. On a CPU, where tests run them, a graph is the call itself.
"""

from __future__ import annotations

import functools
import sys
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Generic, Literal, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from minimind.config import ModelConfig
from minimind.inference.batch import DecodeBatch
from minimind.inference.decode.kv_cache import LayerCache, PagedCache
from minimind.inference.decode.reference import decode_attention_ref, penalised, rope_append_kv_ref, sample_ref
from minimind.inference.decode.step import DecodeWeights, decode_step, packs, prefill_step
from minimind.inference.prefill import ChunkAttention, PagedLayout, pack_chunks, pack_rows
from minimind.inference.requests import TopLogProbs
from minimind.inference.scheduler import Chunk
from minimind.lora import LoRALinear
from minimind.modeling import Attention, Block, Linear, Model, Rotation
from minimind.ops import native, varlen
from minimind.rope import rope_cos_sin

Backend = Literal["auto", "reference", "native"]
BACKENDS = ("auto", "reference", "native")
T = TypeVar("T")
_SAMPLING = (
    "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "presence_penalty", "history", "seed", "offset"
)  # fmt: skip
_REFERENCE: tuple[Callable, Callable, Callable] = (rope_append_kv_ref, decode_attention_ref, sample_ref)


def _native_ops() -> tuple[Callable, Callable, Callable]:
    ops = torch.ops.minimind
    return ops.rope_append_kv.default, ops.decode_attention.default, ops.sample.default


def why_not_native(device: torch.device, dtype: torch.dtype) -> str | None:
    """The reason, in one line, why the native operators cannot compute in `dtype` on `device`; None if they can. The
    dtype of the cache does not matter."""
    if device.type == "cpu" and dtype not in (torch.float32, torch.bfloat16):
        return f"on a CPU the native operators compute in float32 and bfloat16, not {str(dtype).removeprefix('torch.')}"
    return native.why_not(device)


def native_prompt_rows(device: torch.device) -> int:
    """The most tokens of prompts that the native step computes in one call; the model's own layers compute more."""
    on_x86 = device.type == "cpu" and native.build_info().cpu_kernels_in_use.startswith(("avx", "amx"))
    return sys.maxsize if on_x86 else 0  # PyTorch's products may be faster than NEON's: not measured


class Replica:
    """The model as the engine runs it: in eval mode, in the engine's dtype, sharing weights with `source` if possible.

    A parameter that already has `dtype` is shared, so its changes take effect at once. Norm weights and the router,
    which compute in float32, are always shared. Other matrices are copied, and so is a projection with active low-rank
    adapters, as the sum of both; `refresh` updates the copies in place.

    model: of the same shape as `source`. copied_bytes: size of the copies. config: None for the source's, or one with
    another tokenizer.
    """

    def __init__(self, source: Model, dtype: torch.dtype, config: ModelConfig | None = None) -> None:
        self.dtype = dtype
        self._get_source: Callable[[], Model | None] = lambda: source
        with torch.device("meta"):
            self.model = Model(config or source.config)
        self.model.compute_dtype = dtype
        self.model.eval().requires_grad_(False)
        self._copies: dict[str, Tensor] = {}
        self._owns_matrices = False
        self.refresh()

    def own_matrices(self) -> None:
        """Copy all matrices but the embedding and the routers, even those that could be shared, and give a model with
        tied embeddings a head of its own: then they can be rounded in place after each `refresh`."""
        self._owns_matrices = True
        if self.model.lm_head is None:
            with torch.device("meta"):
                self.model.lm_head = Linear(self.model.config.hidden_size, self.model.config.vocab_size)
        self.refresh()

    @property
    def _source(self) -> Model:
        source = self._get_source()
        if source is None:
            raise RuntimeError("the model that owns these weights no longer exists")
        return source

    def release_source(self) -> None:
        """Keep only a weak reference to the source. Its weights stay alive."""
        self._get_source = weakref.ref(self._source)

    @property
    def copied_bytes(self) -> int:
        return sum(copy.nbytes for copy in self._copies.values())

    @torch.no_grad()
    def refresh(self) -> bool:
        """Update the copies and shared parameters from the source. True if the address of any parameter changed."""
        before = [p.data_ptr() for p in self.model.parameters() if not p.is_meta]
        names = [name for name, _ in self.model.named_parameters()]
        self._allocate_copies([name for name in names if not self._is_shared(name)])
        self.model.load_state_dict({name: self._weight(name) for name in names}, assign=True)
        self.model.requires_grad_(False)
        return before != [p.data_ptr() for p in self.model.parameters()]

    def _allocate_copies(self, names: list[str]) -> None:
        """Keep the copies of `names` that are on their weights' device, and allocate the missing ones."""
        weights = {name: self._source_weight(name) for name in names}
        old = self._copies
        self._copies = {n: old[n] for n, w in weights.items() if n in old and old[n].device == w.device}
        for name in names:
            if name not in self._copies:
                self._copies[name] = torch.empty_like(weights[name], dtype=self.dtype)

    def _is_shared(self, name: str) -> bool:
        weight, path = self._source_weight(name), name.rpartition(".")[0]
        if self._adapted(path) is not None:
            return False
        if self._owns_matrices and weight.ndim > 1 and not path.endswith(("router", "embed_tokens")):
            return False
        return weight.ndim == 1 or path.endswith("router") or weight.dtype == self.dtype

    def _adapted(self, path: str) -> LoRALinear | None:
        """The module at `path` if it is a projection with active, unmerged adapters, else None."""
        if path == "lm_head" and self._source.lm_head is None:
            return None
        module = self._source.get_submodule(path)
        return module if isinstance(module, LoRALinear) and module.active and module.base is None else None

    def _source_weight(self, name: str) -> Tensor:
        tied = name == "lm_head.weight" and self._source.lm_head is None
        return self._source.get_parameter("embed_tokens.weight" if tied else name)

    def _weight(self, name: str) -> Tensor:
        weight = self._source_weight(name).detach()
        if name not in self._copies:
            return weight
        adapted = self._adapted(name.rpartition(".")[0])
        return self._copies[name].copy_(weight if adapted is None else adapted.merged())


class Runner:
    """Computes steps of `replica` over `cache` and `batch`. backend, weights_dtype: see Engine. late: see DecodeBatch.
    ValueError if the backend does not exist or cannot be used, and for 8-bit weights without native decoding."""

    def __init__(
        self,
        replica: Replica,
        cache: PagedCache,
        batch: DecodeBatch,
        max_context: int,
        backend: Backend,
        late: bool = False,
        weights_dtype: torch.dtype | None = None,
    ) -> None:
        self._replica, self._cache, self._batch = replica, cache, batch
        self._device = cache.k.device
        self._model, self._dtype = replica.model, replica.dtype
        self._layer_caches = [cache.layer(i) for i in range(len(cache.k))]
        missing = why_not_native(self._device, self._dtype)
        if backend == "native" and missing is not None:
            raise ValueError(f"backend='native' is not available: {missing}; use backend='auto' or 'reference'")
        if backend not in BACKENDS:
            raise ValueError(f"unknown backend {backend!r}; choose one of {', '.join(BACKENDS)}")
        config = self._model.config
        heads = (config.num_attention_heads, config.num_key_value_heads, config.head_dim)
        varlen.detect_grouped_heads(self._device, varlen.Heads(*heads, self._dtype))
        self._native, self._reason = backend != "reference" and missing is None, missing
        if weights_dtype is not None and not self._native:
            reason = missing or "the backend is 'reference'"
            raise ValueError(f"8-bit weights need native decoding: {reason}; decode without them")
        self._weights_dtype = weights_dtype
        # the layers compute prompts, larger batches and mixtures of experts, with the same rounded matrices as the step
        self._layers_rounded = weights_dtype is not None and not packs(self._device)
        if self._layers_rounded:
            replica.own_matrices()
        self._rope, self._attention, self._sample = _native_ops() if self._native else _REFERENCE
        counters = torch.zeros(batch.max_batch * heads[0], dtype=torch.int32, device=self._device)
        self._arrivals = (counters,) if self._native else ()  # an argument of the native decode_attention
        positions = torch.arange(max_context, device=self._device)
        self._cos, self._sin = rope_cos_sin(self._model.config, positions)  # [max_context, D / 2]
        self._weights: DecodeWeights | None = None
        self._operands: list[Tensor] = []  # the weights as decode_step takes them
        self._step_rows = 0  # the most rows that decode_step takes
        self._prompt_rows = native_prompt_rows(self._device) if self._native else 0
        self._graphed = late and (self._native or self._device.type == "cpu")
        self._graphs: dict[str, DecodeGraphs[Any]] = {}
        self.weights_changed(moved=True)

    def describe(self) -> str:
        """One line: which operators decode, and why."""
        if self._native:
            return f"decoding: native ({native.build_info().summary(self._device)}{self._describe_weights()})"
        return f"decoding: reference (plain PyTorch){'' if self._reason is None else f': {self._reason}'}"

    def _describe_weights(self) -> str:
        if self._weights_dtype is None:
            return ""
        if self._step_rows >= self._batch.max_batch:
            return ", 8-bit weights"
        name = str(self._dtype).removeprefix("torch.")
        if self._step_rows == 0:
            return f", weights rounded to 8 bits, but read in {name}: the step does not take this model"
        return f", 8-bit weights; more than {self._step_rows} sequences read the same in {name}"

    @property
    def packed_bytes(self) -> int:
        """Size of the weights that only decoding reads: packed ones on a CPU, 8-bit ones on a GPU."""
        shared = {p.data_ptr() for p in self._replica.model.parameters()}
        return sum(t.nbytes for t in self._operands if t.data_ptr() not in shared)

    def weights_changed(self, moved: bool) -> None:
        """Follow Replica.refresh, which returned `moved`. New scales invalidate the content of a float8 cache."""
        if self._native:
            self._weights = DecodeWeights.from_model(self._model, self._dtype, self._weights_dtype)
            self._step_rows = self._batch.max_batch if packs(self._device) else self._weights.cuda_rows
            self._operands = self._weights.operands(into=self._operands) if self._step_rows else []
            if self._layers_rounded:
                self._weights.round_matrices()
        self._cache.set_scales(self._model)
        if moved:
            self._graphs.clear()

    def prefill(self, chunks: Sequence[Chunk]) -> Tensor:
        """Compute the chunks; returns the next token's logits of those that end a prompt, float32 [n, V]."""
        if self._weights is not None and sum(chunk.end - chunk.start for chunk in chunks) <= self._prompt_rows:
            return self._prefill_natively(self._weights, chunks)
        model = self._model
        prompts = pack_chunks(chunks, self._cache.page_size, self._device)
        rotation = Rotation(self._cos, self._sin, prompts.position.unsqueeze(0))
        attention = ChunkAttention(prompts)
        x = model.embed_tokens(prompts.token).to(self._dtype).unsqueeze(0)  # [1, N, C]
        delta = None
        for layer, cache in self._layers():
            layout = cast(Any, PagedLayout(prompts, attention, cache))
            x, delta, _ = layer(x, delta, rotation, layout, None)
        assert delta is not None
        return self._logits(x[0].index_select(0, prompts.last), delta[0].index_select(0, prompts.last))

    def _prefill_natively(self, weights: DecodeWeights, chunks: Sequence[Chunk]) -> Tensor:
        cache = self._cache
        caches, scales = (cache.k, cache.v), (cache.k_scale, cache.v_scale)
        parts = pack_rows(chunks, cache.page_size).parts()
        return torch.cat(
            [prefill_step(weights, self._operands, rows, self._cos, self._sin, caches, scales) for rows in parts]
        )

    def step(self) -> None:
        """Decode one token for every row of the batch, sample the next ones and append them to the batch."""
        self._run("step", self._step)

    def decode(self) -> Tensor:
        """Decode one token for every row of the batch; returns the next tokens' logits, float32 [B, V], valid until the
        next call. For batches in which the host takes part in sampling."""
        return self._run("decode", self._decode)[: len(self._batch)]

    def sample(self, logits: Tensor, first: int = 0) -> tuple[Tensor, Tensor]:
        """Sample from logits, float32 [n, V], of the batch's rows from `first` on; returns tokens int64 [n] and
        log-probabilities float32 [n]."""
        b = self._batch.views(logits.shape[0], first)
        return self._sample(logits, *[b[name] for name in _SAMPLING])

    def likeliest(self, logits: Tensor, counts: dict[int, int], first: int = 0) -> dict[int, tuple[TopLogProbs, ...]]:
        """The likeliest tokens and their log-probabilities, by row of the batch.

        logits: float32 [n, V] of the batch's rows from `first` on. counts: how many tokens to report, by row of
        `logits`. Like those of `sample`, the log-probabilities are of the penalised and scaled, but not truncated
        distribution.
        """
        if not counts:
            return {}
        index = torch.tensor(list(counts), device=logits.device)
        views = self._batch.views(logits.shape[0], first)
        b = {name: views[name][index] for name in _SAMPLING}
        logits = penalised(logits[index], b["repetition_penalty"], b["presence_penalty"], b["history"])
        temperature = torch.where(b["temperature"] > 0, b["temperature"], 1.0)
        log_probs = (logits / temperature[:, None]).log_softmax(-1)
        values, ids = log_probs.topk(min(max(counts.values()), log_probs.shape[-1]), dim=-1)
        rows = zip(counts.items(), ids.tolist(), values.tolist(), strict=True)
        return {
            first + row: (tuple(zip(row_ids[:n], row_values[:n], strict=True)),)
            for (row, n), row_ids, row_values in rows
        }

    def _run(self, name: str, function: Callable[[int], T]) -> T:
        """Call function(rows of the batch); as a graph, if there are graphs, and then perhaps with more rows."""
        rows = len(self._batch)
        if not self._graphed:
            return function(rows)
        if name not in self._graphs:
            with self._batch.blank():
                self._graphs[name] = DecodeGraphs(function, self._batch.max_batch, self._device)
        return self._graphs[name](rows)

    def _step(self, rows: int) -> None:
        self._batch.append(0, *self.sample(self._decode(rows)))

    def _decode(self, rows: int) -> Tensor:
        if self._weights is not None and rows <= self._step_rows:
            return self._decode_whole(self._weights, rows)
        return self._decode_layers(rows)

    def _decode_whole(self, w: DecodeWeights, rows: int) -> Tensor:
        b = self._batch.views(rows)
        return decode_step(
            w, self._operands, b["token"], b["position"], b["slot"], b["page_table"], b["length"], self._cos, self._sin,
            self._cache.k, self._cache.v, self._cache.k_scale, self._cache.v_scale,
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
        """x [B, C] -> [B, C]; writes the tokens' keys and values into the layer's cache."""
        norms = (
            None if attn.q_norm is None else attn.q_norm.weight,
            None if attn.k_norm is None else attn.k_norm.weight,
        )
        positions = (self._cos, self._sin, b["position"], b["slot"])
        caches, scales = (cache.k, cache.v), (cache.k_scale, cache.v_scale)
        q = self._rope(attn.qkv_proj(x), *positions, *caches, attn.heads, *norms, attn.eps, *scales)
        out = self._attention(q, *caches, b["page_table"], b["length"], q.shape[-1] ** -0.5, *scales, *self._arrivals)
        return attn.o_proj(out.flatten(1))

    def _logits(self, x: Tensor, delta: Tensor) -> Tensor:
        x, _ = self._model.norm(x, delta)
        return F.linear(x, self._model.head_weight.to(x.dtype)).float()


def graph_sizes(max_batch: int) -> list[int]:
    """Batch sizes of the graphs: 1, 2, 4, ... and max_batch itself, largest first."""
    powers = [1 << i for i in range(max_batch.bit_length()) if 1 << i < max_batch]
    return [max_batch, *reversed(powers)]


class DecodeGraphs(Generic[T]):
    """One graph of step(rows) for every batch size. `step` may use only tensors whose addresses do not change.

    `step` runs once for each size before its graph is captured, since kernels cannot be compiled during a capture. The
    largest size is captured first, so that the smaller ones fit into its memory pool.
    """

    def __init__(self, step: Callable[[int], T], max_batch: int, device: torch.device) -> None:
        pool = torch.cuda.graph_pool_handle() if device.type == "cuda" else None
        self._replays: dict[int, Callable[[], T]] = {}
        for size in graph_sizes(max_batch):
            run = functools.partial(step, size)
            self._replays[size] = _plain(run) if pool is None else _captured(run, pool)
        self._sizes = sorted(self._replays)

    def __call__(self, rows: int) -> T:
        """Replay the smallest graph for at least `rows` rows; returns the step's result, valid until the next call."""
        return self._replays[next(size for size in self._sizes if size >= rows)]()


def _plain(run: Callable[[], T]) -> Callable[[], T]:
    run()
    return run


def _captured(run: Callable[[], T], pool: Any) -> Callable[[], T]:
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        result = run()

    def replay() -> T:
        graph.replay()
        return result

    return replay
