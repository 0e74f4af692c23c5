"""Batches: the sizes of rows, micro-batches and steps, and the way of a batch to the training device.

Sizes are as large as the data and a GPU's memory allow.

The memory is computed from the model's shape. It counts the tensors that the Triton path keeps for the backward in
16-bit compute, float32 master weights with gradient and AdamW state, a 16-bit copy of the weights, the head's gradient
and chunk of logits, and the scratch of attention's backward. Fragmentation and CUDA's own half gigabyte are left to
`share`. tests/kernels/test_memory.py compares the kept tensors with those that autograd saves; `torch.compile` may keep
fewer, as it recomputes some.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch

from minimind.config import ModelConfig
from minimind.data import Batch, Corpus, PackedLoader
from minimind.modeling import Model
from minimind.objectives.next_token import TokenBatch
from minimind.training.depth import WHOLE, DepthWarmup

if TYPE_CHECKING:
    from minimind.training.job import Job

CONTEXT_BYTES = 1 << 29  # CUDA's context and libraries, about
MOST_TOKENS = 1 << 16  # of a forward and backward, even if more fit
SMALLEST = 4  # with --batch-warmup, the first steps are this many times smaller
GPU_BATCH, CPU_BATCH = 1 << 16, 1 << 12  # tokens of a step by default
# Short runs of pretraining on a CPU (docs/recipe.md): a run of at most so many tokens takes steps of so many, and a run
# with at most one token for so many parameters trains DEPTH_LAYERS of the layers in this share of its steps.
SHORT_RUNS = {51_200: 1024, 1_638_400: 2048}
DEPTH_WARMUPS, DEPTH_LAYERS = {112: 0.9375, 56: 0.875}, 0.125
Growth = tuple[tuple[int, int], ...]  # (number, tokens) of smaller steps at the beginning of a run
_HEAD_CHUNK = 2048  # tokens whose logits exist at once
_PER_BOUNDARY = 64  # tokens of a document, on average; the built-in corpus has 93, with the quarter that a loader adds


class EpochLoader(Protocol):
    """A loader on the host that knows the length of a pass over its data."""

    @property
    def tokens_per_epoch(self) -> int:
        """Tokens of one pass, without padding."""

    @property
    def fill(self) -> float:
        """Share of the positions of a batch that hold tokens."""

    @property
    def view(self) -> Corpus:
        """The documents."""


@dataclass(frozen=True)
class TrainingPlan:
    """The loader and the number of steps. step_tokens: tokens of a step, padding included; 0 where they vary, which
    makes targets the unit of progress. growth: (steps, tokens of each) of the first ones, where these are smaller.
    depth: the first ones that train the lowest layers alone."""

    loader: Any
    steps: int
    micro_batches: int = 1
    step_tokens: int = 0
    growth: Growth = ()
    depth: DepthWarmup = WHOLE

    def micro_batches_of(self, step: int) -> int:
        """Micro-batches of `step`, from 0."""
        for steps, tokens in self.growth:
            if step < steps:
                return self.micro_batches * tokens // self.step_tokens
            step -= steps
        return self.micro_batches

    def tokens_before(self, step: int) -> int:
        """Tokens of the first `step` steps."""
        total = 0
        for steps, tokens in self.growth:
            total += min(step, steps) * tokens
            step -= min(step, steps)
        return total + step * self.step_tokens

    @property
    def whole_steps(self) -> int:
        """The number of steps that the run would have if all were of `step_tokens`: that of the rate's schedule."""
        return math.ceil(self.tokens_before(self.steps) / self.step_tokens) if self.growth else self.steps

    def place_in_schedule(self, step: int) -> float:
        """`step`, counted in steps of `step_tokens`."""
        return self.tokens_before(step) / self.step_tokens if self.growth else step


def activation_bytes(config: ModelConfig, recompute: bool = False) -> int:
    """Bytes that one token keeps from the forward to the backward, without the loss."""
    if recompute:  # the inputs of all blocks, and one block at a time
        return config.num_hidden_layers * 4 * config.hidden_size + _layer_bytes(config)
    return config.num_hidden_layers * _layer_bytes(config) + 4 * config.hidden_size  # the first input, the last sum


def _layer_bytes(config: ModelConfig) -> int:
    hidden, dim = config.hidden_size, config.head_dim
    q, kv = config.num_attention_heads * dim, config.num_key_value_heads * dim
    halves = 4 * hidden + 2 * q + 2 * kv  # both norms' inputs and outputs; q, k, v and the attention's result
    floats = 2 + config.num_attention_heads  # 1 / rms of each norm; the log-sum-exp of each head
    if config.qk_norm:
        halves += q + 2 * kv  # as projected
        floats += config.num_attention_heads + config.num_key_value_heads
    if not config.num_experts:
        return 2 * (halves + 3 * config.intermediate_size) + 4 * floats
    halves += config.num_shared_experts * 3 * config.intermediate_size
    halves += config.num_experts_per_tok * 2 * config.moe_intermediate_size
    floats += hidden + 3 * config.num_experts + 4 * config.num_experts_per_tok + 1  # the router's input and its scores
    return 2 * halves + 4 * floats


def attention_scratch_bytes(config: ModelConfig, tokens: int, boundaries: int) -> int:
    """Bytes that FlashAttention-2's backward allocates for one layer at a time: float32 sums of dq, heads rounded up to
    a multiple of 32, and of the softmax's gradient, both with 128 more rows per document; with grouped queries also
    16-bit gradients of keys and values per query head (mha_varlen_bwd in its csrc/flash_attn/flash_api.cpp)."""
    heads, dim = config.num_attention_heads, config.head_dim
    sums = 4 * (tokens + 128 * boundaries) * heads * (-(-dim // 32) * 32 + 1)
    return sums + (4 * tokens * heads * dim if config.num_key_value_heads < heads else 0)


def state_bytes(config: ModelConfig, parameters: int) -> int:
    """Bytes that do not depend on the batch: 16 per parameter, a 16-bit copy, and the head's gradient and logits."""
    head = config.vocab_size * (4 * config.hidden_size + 6 * _HEAD_CHUNK)
    return 18 * parameters + head


def step_bytes(
    config: ModelConfig, parameters: int, trained: int, tokens: int, recompute: bool = False, trunks: int = 1
) -> int:
    """Bytes of a forward and backward of `tokens` on one GPU: what `tokens_that_fit` counts, and CUDA's own. trained:
    the number of trained `parameters`; frozen ones have neither gradient nor moments. trunks: the number of models of
    this shape that a step runs through."""
    frozen = parameters - trained
    activations = tokens * (activation_bytes(config, recompute) + 4 * config.hidden_size)
    scratch = attention_scratch_bytes(config, tokens, -(-tokens // _PER_BOUNDARY))
    return CONTEXT_BYTES + state_bytes(config, parameters) - 12 * frozen + trunks * activations + scratch


def tokens_that_fit(
    config: ModelConfig, parameters: int, memory: int, recompute: bool = False, share: float = 0.9
) -> int:
    """Tokens that a forward and backward may hold on a GPU with `memory` bytes; 0 where the model alone does not fit.
    Besides its activations every token has the gradient of its hidden state and a 16-bit copy of it, and its part of
    the scratch of attention's backward."""
    left = share * (memory - CONTEXT_BYTES) - state_bytes(config, parameters)
    scratch = attention_scratch_bytes(config, _PER_BOUNDARY, 1) / _PER_BOUNDARY
    return max(0, int(left / (activation_bytes(config, recompute) + 4 * config.hidden_size + scratch)))


def choose_batch_shape(job: Job, loader: Callable[[int], EpochLoader]) -> tuple[int, int, EpochLoader]:
    """(rows of a micro-batch over all ranks, micro-batches of a step, the loader with these rows). loader(rows) makes
    one. Raises ValueError, naming the flags, if the flags do not fit each other."""
    shape = batch_shape(job)
    made = loader(shape[0])
    fitted = fit_to_data(job, made, *shape)
    return (*fitted, made if fitted == shape else loader(fitted[0]))


def batch_shape(job: Job, batch_tokens: int | None = None) -> tuple[int, int]:
    """(rows of a micro-batch, micro-batches of a step) for steps of `batch_tokens`, by default --batch-tokens."""
    args, ranks = job.args, job.parallel.world_size
    batch_tokens = batch_tokens or job.settle("batch_tokens", lambda: (usual_batch(job), ""))
    micro = args.micro_tokens or micro_tokens(job, batch_tokens)
    if args.batch_warmup and (batch_tokens // micro) % SMALLEST:
        raise ValueError(
            f"--batch-warmup {args.batch_warmup}: the first steps take a quarter of {batch_tokens} tokens, and that is "
            f"no multiple of the micro-batch of {micro}; set --batch-tokens and --micro-tokens so that it is"
        )
    if batch_tokens % micro or micro % args.row:
        raise ValueError(
            f"--batch-tokens {batch_tokens} must be a multiple of --micro-tokens {micro}, "
            f"and that of --seq-len {args.seq_len}"
        )
    if micro < ranks * args.row:
        raise ValueError(
            f"--micro-tokens {micro}: fewer than a row of --seq-len {args.seq_len} for each of {ranks} "
            f"processes; use {ranks * args.row} or more, or fewer processes"
        )
    return micro // args.row, batch_tokens // micro


def fit_to_data(job: Job, loader: EpochLoader, rows: int, micro_batches: int) -> tuple[int, int]:
    """The shape of a step that is no larger than a pass over the data, unless --batch-tokens asks for one; a resumed
    run keeps the shape it began with. A note says how a step compares with data that are smaller."""
    row, step, ranks = job.args.row, rows * micro_batches, job.parallel.world_size
    pass_rows = max(1, round(loader.tokens_per_epoch * job.args.scale / loader.fill / row))
    if step <= pass_rows:
        return rows, micro_batches
    taken, advice = step, "lower --batch-tokens"
    if job.flags.batch_tokens is None:
        unit = rows if job.args.micro_tokens or rows <= pass_rows else ranks  # a step is a multiple of it
        fitting = max(unit, pass_rows // unit * unit) * row
        kept = job.settle("step", lambda: (fitting, ""))
        taken = step if kept == "usual" else kept // row
        advice = "--batch-tokens sets another"
    size = f"{loader.view.num_documents:,} documents, {loader.tokens_per_epoch:,} tokens in {pass_rows:,} rows"
    job.notes.append(
        f"little data: {size} of {row}, less than a step of {step * row:,} tokens; a step takes {taken * row:,}, "
        f"each row {taken / pass_rows:.1f} times; {advice}"
    )
    return (rows, micro_batches) if taken == step else batch_shape(job, taken * row)


def growing_steps(tokens: float, step_tokens: int, share: float) -> tuple[int, Growth]:
    """(steps of a run over `tokens`; number and tokens of the smaller ones), where `share` of the tokens is trained on
    in steps that are a quarter and then half as large."""
    growth = tuple(
        (math.ceil(tokens * share / 2 / size), size) for size in (step_tokens // SMALLEST, 2 * step_tokens // SMALLEST)
    )
    left = tokens - sum(steps * size for steps, size in growth)
    return sum(steps for steps, _ in growth) + max(1, math.ceil(left / step_tokens)), growth


def usual_batch(job: Job) -> int:
    """Tokens of an optimizer step where neither a flag nor the data decide."""
    return GPU_BATCH if job.default_device == "cuda" and job.initial.preset != "nano" else CPU_BATCH


def pretraining_batch(job: Job, tokens: float) -> tuple[int, str]:
    """(tokens of a step, the reason) of a pretraining run over `tokens` where no flag decides."""
    usual = usual_batch(job)
    unit = job.args.micro_tokens or job.parallel.world_size * job.args.row
    small = next((size for most, size in SHORT_RUNS.items() if tokens <= most and not size % unit), usual)
    if job.default_device != "cpu" or small == usual:
        return usual, ""
    return small, f"--batch-tokens {small}: a run of few steps learns more in smaller ones (docs/recipe.md)"


def pretraining_depth(job: Job, tokens: float) -> tuple[float, int]:
    """Settle --depth-warmup and --depth-layers of a pretraining run over `tokens`: (share of the steps, the number
    of layers that they train)."""
    depth = job.config.num_hidden_layers

    def usual() -> float:
        if job.parallel.world_size > 1 or job.initial.weights is not None or job.default_device != "cpu":
            return 0.0
        with torch.device("meta"):
            parameters = Model(job.config).num_parameters()
        return next((share for each, share in DEPTH_WARMUPS.items() if tokens * each <= parameters), 0.0)

    share = job.settle("depth_warmup", lambda: (usual(), ""))
    if not share:
        return 0.0, depth
    return share, max(1, int(depth * job.settle("depth_layers", lambda: (DEPTH_LAYERS, ""))))


def longest_row(job: Job) -> int:
    """The longest row, a power of two up to 4096, that divides the tokens of a step and of a micro-batch, leaves a
    row for every process, and fits into a GPU's memory; 512 where that would be shorter."""
    args, ranks = job.args, job.parallel.world_size
    batch = args.batch_tokens or usual_batch(job)
    sizes = [batch, args.micro_tokens or batch]
    fits, row = min(_fitting(job.config, job.device, args.recompute), job.config.positions), 4096
    while row > 512 and (any(size % row or size < ranks * row for size in sizes) or row > fits):
        row //= 2
    return row


def micro_tokens(job: Job, batch_tokens: int) -> int:
    """Tokens of a micro-batch: the step's, halved until they fit into a GPU's memory."""
    ranks = job.parallel.world_size
    limit = min(MOST_TOKENS, ranks * _fitting(job.config, job.device, job.args.recompute))
    limit = min(limit, batch_tokens // SMALLEST) if job.args.batch_warmup else limit
    return halved(batch_tokens, limit, job.args.row, ranks)


def halved(batch_tokens: int, limit: int, row: int, ranks: int) -> int:
    """`batch_tokens`, halved down to `limit` as long as every rank has a whole row."""
    while batch_tokens > limit and batch_tokens % (2 * row) == 0 and batch_tokens // 2 >= ranks * row:
        batch_tokens //= 2
    return batch_tokens


def _fitting(config: ModelConfig, device: torch.device, recompute: bool) -> int:
    """Tokens of a forward and backward that fit into the memory of one GPU; no limit on other devices."""
    if device.type != "cuda":
        return 1 << 62
    memory = torch.cuda.get_device_properties(device).total_memory
    with torch.device("meta"):
        parameters = Model(config).num_parameters()
    return tokens_that_fit(config, parameters, memory, recompute)


_BOUNDARIES = 64  # the padded number of boundaries is a multiple of this


class Loader(Protocol):
    """This rank's share of the micro-batches, on the device. A batch has num_targets, and over all ranks
    global_num_targets and global_weight; the loss is divided by the latter."""

    @property
    def host(self) -> Any:
        """The newest batch, on the host."""

    def next_batch(self) -> Any: ...

    def fetch(self) -> None:
        """Start preparing the next batch."""

    def state(self) -> dict[str, Any]:
        """The position and everything else that is needed to continue, as plain values and tensors."""

    def load_state(self, state: dict[str, Any]) -> None: ...


@dataclass(frozen=True)
class _Ahead:
    """A batch that was fetched ahead: as the loader made it, and on the device."""

    host: Batch
    batch: Any


class DeviceBatches:
    """The batches of `loader`, in its order. `fetch` starts the copy of the next one, so that `next_batch` need not
    wait if it is called while the device computes.

    cu_seqlens is padded with empty documents to the same length in all batches, so that a compiled step fits them all.
    An empty document costs FlashAttention a block and 128 rows of scratch, so the length is only a quarter above that
    of the loader's first window; where a later batch needs more, it grows by half, and a compiled step is compiled
    again.

    place(batch, device, boundaries): makes the loss's input from a loader's batch; `to_device` by default.
    """

    def __init__(self, loader: PackedLoader, device: torch.device, place: Callable[..., Any] | None = None) -> None:
        self.loader, self.device, self.place = loader, device, place or to_device
        self.boundaries = _round_up(loader.max_segments + 1)
        self._ahead: _Ahead | None = None
        self._position = loader.state()
        self.host: Batch | None = None  # the newest batch on the host

    def next_batch(self) -> Any:
        self.fetch()
        assert self._ahead is not None
        ahead, self._ahead = self._ahead, None
        self._position, self.host = self.loader.state(), ahead.host
        return ahead.batch

    def fetch(self) -> None:
        if self._ahead is None:
            host = self.loader.next_batch()
            self._ahead = _Ahead(host, self.to_device(host))

    def to_device(self, batch: Batch) -> Any:
        if len(batch.cu_seqlens) > self.boundaries:
            self.boundaries = _round_up(max(len(batch.cu_seqlens), self.boundaries * 3 // 2))
        return self.place(batch, self.device, self.boundaries)

    def state(self) -> dict[str, int]:
        """The loader's position after the newest batch that was returned."""
        return self._position

    def load_state(self, state: dict[str, Any]) -> None:
        self.loader.load_state(state)
        self._ahead, self._position = None, self.loader.state()


def to_device(batch: Batch, device: torch.device, boundaries: int | None = None) -> TokenBatch:
    """The packed rows as tensors. boundaries: the padded length of cu_seqlens."""
    more = [] if batch.loss_weights is None else [batch.loss_weights]
    input_ids, targets, bounds, *weights = move(batch, device, boundaries, more)
    counts = batch.num_targets, batch.global_num_targets
    if not weights:
        return TokenBatch(input_ids, targets, bounds, *counts)
    return TokenBatch(input_ids, targets, bounds, *counts, weights[0], batch.global_weight)


def move(
    batch: Batch, device: torch.device, boundaries: int | None, more: Sequence[np.ndarray] = ()
) -> list[torch.Tensor]:
    """input_ids, targets, cu_seqlens and `more` as tensors; the copy to a GPU is asynchronous."""
    cu_seqlens = batch.cu_seqlens
    if boundaries is not None:
        cu_seqlens = np.pad(cu_seqlens, (0, boundaries - len(cu_seqlens)), mode="edge")
    parts = [torch.from_numpy(array) for array in (batch.input_ids, batch.targets, cu_seqlens, *more)]
    if device.type == "cuda":
        parts = [part.pin_memory().to(device, non_blocking=True) for part in parts]
    return parts


def _round_up(n: int) -> int:
    return -(-n // _BOUNDARIES) * _BOUNDARIES
