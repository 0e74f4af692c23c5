"""The inference engine, used by chat, evaluation, RL rollouts and the API.

A step decodes one token for every running sequence and computes the next chunks of new prompts, then samples a token
for each of them. Requests join and leave between steps.

    submit -> Scheduler: queue, pages -> Runner: model over PagedCache, sampling -> SequenceOutput: text, stops -> Delta

On a GPU the host is one step late (batch.py): `step` launches a step and then reads the tokens of the previous one. A
sequence that ended with them still has a row in the launched step; its result is dropped, and its page is released with
the sequence's others. A sequence that ends by its length leaves earlier, since that is known before its token is. The
tokens are read first if the host needs them: to preempt, to cancel, to refresh weights, or to take part in sampling
(for grammars, and to report the likeliest tokens).
"""

from __future__ import annotations

import math
import time
from collections.abc import Generator, Iterable, Iterator

import numpy as np
import torch
from torch import Tensor

from minimind.inference.batch import DecodeBatch, SampledStep, host_is_late, on_device
from minimind.inference.decode.int8 import check_weights_dtype
from minimind.inference.decode.kv_cache import PagedCache, cache_pages, check_kv_dtype
from minimind.inference.request_state import Admission, RequestState, SequenceOutput, context_length, refused
from minimind.inference.requests import Counters, Delta, EngineStats, Request, RequestOutput, TopLogProbs
from minimind.inference.runner import Backend, Replica, Runner
from minimind.inference.scheduler import PagePool, Scheduler, SequenceState, StepPlan
from minimind.modeling import Model
from minimind.tokenization import Tokenizer

# A prompt step of minimind2-small takes the host about 1.2 ms, whatever its length. An RTX 3090 computes 2,048 tokens
# in 2.5 ms (minimind2: 10 ms), so it does not wait for the host, and decoding sequences are not delayed for long.
GPU_CHUNK = 2048
CPU_CHUNK = 512  # 128 to 2,048 take the same time per token; a longer chunk only delays decoding sequences


class Engine:
    """Continuous batching over a paged key/value cache. Single-threaded; deterministic for given requests and steps.

    model: weights that have `dtype` are shared. Other matrices, and projections with active low-rank adapters, are
        copied, and native decoding on a CPU reads a packed copy. Call `refresh_weights` after the model changes. The
        engine computes as in eval mode and does not change the model.
    tokenizer: None for requests by token ids only, without text, stop strings and end-of-sequence id. Ids of the model
        beyond the tokenizer's have probability 0.
    dtype: of activations: float32, bfloat16 or float16; None: the model's compute dtype.
    kv_dtype: of the cache: one of these or float8_e4m3fn, which halves bfloat16's memory (docs/decoding.md); None:
        dtype. The rounding of the cache affects prompts too.
    weights_dtype: torch.int8 computes with 8-bit weights, with native operators (docs/decoding.md); None: dtype. Where
        the native step does not compute prompts, a CPU computes them in dtype, and a GPU in dtype with the same rounded
        weights, of which it holds a copy; so also larger batches than the step takes, and mixtures of experts.
    kv_bytes, kv_tokens: the cache's size; give at most one. Neither: max_batch full contexts, but at most 512 MiB on a
        CPU and half of the free memory on a GPU. The cache is allocated at once and never grows.
    max_batch: most sequences that decode together.
    max_context: tokens of prompt and output together; None: all positions of the model, including YaRN's.
    page_size: tokens per page; None: 16 on a CPU, 64 on a GPU.
    prefill_chunk: most prompt tokens per step, so that a long prompt does not delay the other requests; None: 512 on a
        CPU, 2,048 on a GPU (docs/decoding.md).
    prefix_cache: reuse the pages of equal prefixes. Where the model's layers compute prompts, reused and recomputed
        pages may differ in the last bits.
    backend: of decoding: "native" (the C++ and CUDA extension), "reference" (plain PyTorch), or "auto" (native if it is
        built).
    seed: the seeds of requests without one are derived from it.

    ValueError, one line, for a tokenizer with more ids than the model, a budget below one page, a backend that is not
    available, and arguments outside their range.
    """

    def __init__(
        self,
        model: Model,
        tokenizer: Tokenizer | None,
        *,
        dtype: torch.dtype | None = None,
        kv_dtype: torch.dtype | None = None,
        weights_dtype: torch.dtype | None = None,
        kv_bytes: int | None = None,
        kv_tokens: int | None = None,
        max_batch: int = 32,
        max_context: int | None = None,
        page_size: int | None = None,
        prefill_chunk: int | None = None,
        prefix_cache: bool = True,
        backend: Backend = "auto",
        seed: int = 0,
    ) -> None:
        config, device = model.config, model.device
        if tokenizer is not None:
            config = config.with_tokenizer(tokenizer.vocab_size, "Engine")
        if prefill_chunk is None:
            prefill_chunk = GPU_CHUNK if device.type == "cuda" else CPU_CHUNK
        for name, value in (("max_batch", max_batch), ("prefill_chunk", prefill_chunk)):
            if value < 1:
                raise ValueError(f"{name}={value} must be at least 1")
        page_size = page_size or (64 if device.type == "cuda" else 16)
        max_context = context_length(config, max_context)
        dtype = dtype or model.compute_dtype or model.dtype
        if dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise ValueError(f"dtype={dtype} must be torch.float32, torch.bfloat16 or torch.float16")
        kv_dtype = kv_dtype or dtype
        check_kv_dtype(kv_dtype, device)
        check_weights_dtype(weights_dtype, device)
        context_pages = -(-max_context // page_size)
        useful_tokens = max_batch * context_pages * page_size
        token_bytes = model.kv_bytes_per_token(kv_dtype)
        pages = cache_pages(token_bytes, device, page_size, kv_bytes, kv_tokens, useful_tokens)
        table_pages = min(pages, context_pages)

        self.dtype, self.kv_dtype, self.device, self.max_context = dtype, kv_dtype, device, max_context
        self._pool = PagePool(pages, prefix_cache)
        self._scheduler = Scheduler(self._pool, page_size, max_batch, prefill_chunk)
        self._admission = Admission(config.num_tokens, tokenizer, max_context, pages, page_size, seed)
        self._cache = PagedCache.allocate(config, pages, page_size, kv_dtype, device)
        self._replica = Replica(model, dtype, config)
        self._late = host_is_late(device)
        self._batch = DecodeBatch(max_batch, table_pages, page_size, config.num_tokens, device, self._late)
        options = (max_context, backend, self._late, weights_dtype)
        self._runner = Runner(self._replica, self._cache, self._batch, *options)
        self._unread: SampledStep | None = None  # the last step, whose tokens are not read yet
        self._requests: dict[str, RequestState] = {}
        self._arrivals = 0
        self._undelivered: list[Delta] = []
        self._counters = Counters()

    def generate(self, requests: Iterable[Request]) -> list[RequestOutput]:
        """Run the requests to their end and return their outputs in order. The output of a request that cannot be
        served has finish_reason "error" and the reason in `error`; it does not affect the others."""
        ids: list[str | RequestOutput] = []
        outputs: dict[str, RequestOutput] = {}
        for delta in self._run(requests, ids):
            if delta.output is not None:
                outputs[delta.id] = delta.output
        return [outputs[entry] if isinstance(entry, str) else entry for entry in ids]

    def stream(self, requests: Iterable[Request]) -> Iterator[Delta]:
        """Yield the requests' deltas as they are generated. A refused request yields one delta with finish_reason
        "error". Closing the iterator cancels unfinished requests. Other requests may be submitted, run and cancelled
        meanwhile."""
        yield from self._run(requests, [])

    def submit(self, request: Request) -> str:
        """Queue a request and return its id. ValueError, one line, if it cannot be served."""
        state = self._admission.admit(request, self._requests)
        self._requests[state.id] = state
        for first in range(0, state.params.n, self._scheduler.max_batch):
            count = min(state.params.n - first, self._scheduler.max_batch)
            sequence = SequenceState(self._arrivals, first, count, state.prompt.copy(), SequenceOutput(state, first))
            state.sequences.append(sequence)
            self._scheduler.add(sequence)
        self._arrivals += 1
        return state.id

    def cancel(self, request_id: str) -> bool:
        """End an unfinished request. Its pages are released at once; the next `step` returns deltas with finish_reason
        "cancelled". False if there is no such request."""
        if request_id in self._requests:
            self._read_now()
        state = self._requests.get(request_id)
        if state is None:
            return False
        for sequence in state.sequences.copy():
            outputs = [sequence.output, *(SequenceOutput(state, sequence.index + i) for i in range(1, sequence.count))]
            self._undelivered += [output.finish(sequence, "cancelled") for output in outputs]
            self._remove(sequence, "cancelled", len(outputs))
        return True

    @property
    def has_work(self) -> bool:
        """Whether `step` has something to compute or to return."""
        return bool(self._requests or self._undelivered)

    @torch.inference_mode()
    def step(self) -> list[Delta]:
        """Compute one token for every running sequence and the next chunk of waiting prompts; returns the deltas, [] if
        there is no work. On a GPU the deltas are those of the previous step, and the first step returns none."""
        deltas, self._undelivered = self._undelivered, []
        if self._requests:
            try:
                self._step(deltas)
            except BaseException:  # out of memory, Ctrl-C: the planned tokens are not in the cache
                self._undelivered = deltas
                self._start_over()
                raise
        return deltas

    def refresh_weights(self) -> None:
        """Use the model's changed weights: update all copies and discard all cached keys and values. Running sequences
        keep their tokens; their keys and values are computed again."""
        self._read_now()
        moved = self._replica.refresh()
        self._runner.weights_changed(moved)
        self._start_over()

    def release_model(self) -> None:
        """Keep only a weak reference to the model. If it no longer exists, `refresh_weights` fails."""
        self._replica.release_source()

    @property
    def held_bytes(self) -> int:
        """Memory of the cache and of copied weights; CUDA graphs take more."""
        return self._cache.bytes + self._replica.copied_bytes + self._runner.packed_bytes

    def stats(self) -> EngineStats:
        """A snapshot of the engine's state and counters."""
        counters = self._counters
        scheduler, pool = self._scheduler, self._pool
        return EngineStats(
            waiting=sum(sequence.count for sequence in scheduler.waiting),
            running=sum(sequence.count for sequence in scheduler.running),
            max_batch=scheduler.max_batch,
            pages_total=pool.pages,
            pages_used=pool.pages - pool.available,
            pages_cached=pool.cached,
            page_size=scheduler.page_size,
            kv_bytes=self._cache.bytes,
            kv_bytes_per_token=self._cache.bytes // (pool.pages * scheduler.page_size),
            kv_dtype=_name(self.kv_dtype),
            steps=counters.steps,
            prompt_tokens=counters.prompt_tokens,
            cached_tokens=counters.cached_tokens,
            generated_tokens=counters.generated_tokens,
            preemptions=scheduler.preemptions,
            finished=dict(counters.finished),
            tokens_per_second=counters.tokens_per_second,
        )

    def describe(self) -> str:
        """One line about the backend, dtype, cache and batch, to print at the start of a run."""
        cache, scheduler = self._cache, self._scheduler
        shared = "weights shared with the model"
        if copied := self._replica.copied_bytes + self._runner.packed_bytes:
            shared = f"{copied / 2**20:.0f} MiB of weights copied"
        return (
            f"{self._runner.describe()}; {_name(self.dtype)}, {shared}; cache {cache.bytes / 2**20:.0f} MiB of "
            f"{_name(self.kv_dtype)} for {cache.pages * cache.page_size} tokens in pages of {cache.page_size}; "
            f"batch up to {scheduler.max_batch}, context {self.max_context}"
        )

    def _run(self, requests: Iterable[Request], ids: list[str | RequestOutput]) -> Generator[Delta, None, None]:
        """Yield deltas of the requests. Appends to `ids` each request's id, or its output if it was refused."""
        own: set[str] = set()
        try:
            for request in requests:
                try:
                    request_id = self.submit(request)
                    ids.append(request_id)
                    own.add(request_id)
                except ValueError as error:
                    output = refused(request, str(error))
                    ids.append(output)
                    yield Delta(output.id, 0, "", (), (), (), "error", None, output)
            while own:
                deltas = self.step()
                self._undelivered += [delta for delta in deltas if delta.id not in own]
                own_deltas = [delta for delta in deltas if delta.id in own]
                if not own_deltas and not own & self._requests.keys():
                    raise RuntimeError(f"another caller's Engine.step took the deltas of {', '.join(sorted(own))}")
                for delta in own_deltas:
                    if delta.output is not None:
                        own.discard(delta.id)
                    yield delta
        finally:
            for request_id in own:
                self.cancel(request_id)
            self._undelivered = [delta for delta in self._undelivered if delta.id not in own]

    def _step(self, deltas: list[Delta]) -> None:
        """Run one step and append the deltas of the tokens that it reads."""
        start = time.perf_counter()
        if self._unread is not None:
            for sequence in self._batch.at_limit():
                self._leave(sequence)
                sequence.ending = True
            if self._scheduler.short_of_pages():  # which sequence to preempt depends on which ones have ended
                self._read(deltas)
        launched = self._launch(self._scheduler.plan(), start)
        self._read(deltas)
        self._unread = launched
        if launched is not None and launched.in_step:
            self._read(deltas)
        self._counters.step(start, time.perf_counter())

    def _launch(self, plan: StepPlan, now: float) -> SampledStep | None:
        """Launch a step; returns its sampled tokens, None if the batch is empty."""
        self._apply(plan, now)
        batch, runner = self._batch, self._runner
        decoding, top = len(batch), dict[int, tuple[TopLogProbs, ...]]()
        if decoding:
            batch.upload()
            if batch.needs_host():
                self._sample(runner.decode(), 0, top)
            else:
                runner.step()
            batch.advance()
            for sequence in batch.sequences:
                sequence.computed += 1
        if plan.chunks:
            logits = self._join(plan, runner.prefill(plan.chunks))
            if len(batch) > decoding:
                batch.upload()
                self._sample(logits, decoding, top)
                batch.advance(decoding)
        if not len(batch):
            return None
        sampled = batch.start_reading(decoding, in_step=not self._late or batch.needs_host())
        sampled.top = top
        return sampled

    def _apply(self, plan: StepPlan, now: float) -> None:
        """Update the batch, the pages and the requests for a plan, before its tokens are computed."""
        for sequence in plan.preempted:
            self._leave(sequence)
        if plan.copies:
            sides = [np.array(side, np.int64) for side in zip(*plan.copies, strict=True)]
            self._cache.copy_pages(*on_device(sides, self.device))
        for sequence in plan.grown:
            self._batch.set_last_page(sequence)
        for chunk in plan.chunks:
            state: RequestState = chunk.sequence.output.request
            if state.started is None:
                state.started, state.cached = now, chunk.sequence.cached
                self._counters.prompt_tokens += len(state.prompt)
                self._counters.cached_tokens += state.cached

    def _join(self, plan: StepPlan, logits: Tensor) -> Tensor:
        """Add the sequences of complete prompts to the batch. logits: [complete prompts, V] -> [added sequences, V]."""
        copies: list[int] = []
        for chunk in plan.chunks:
            if chunk.last:
                state: RequestState = chunk.sequence.output.request
                sequences = self._scheduler.fork(chunk.sequence)
                copies.append(len(sequences))
                for sequence in sequences:
                    if sequence.output is None:
                        sequence.output = SequenceOutput(state, sequence.index)
                        state.sequences.append(sequence)
                    seed = state.sequence_seed(sequence.index)
                    self._batch.join(sequence, state.params, seed, state.limit, sequence.output.needs_host)
        if len(copies) == sum(copies):
            return logits
        (rows,) = on_device([np.repeat(np.arange(len(copies)), copies)], logits.device)
        return logits.index_select(0, rows)

    def _sample(self, logits: Tensor, first: int, top: dict[int, tuple[TopLogProbs, ...]]) -> None:
        """Sample the next token of every row from `first` on; adds the likeliest tokens to `top` if requested."""
        if self._batch.needs_host(first):
            self._constrain(logits, first)
        tokens, log_probs = self._runner.sample(logits, first)
        if self._batch.needs_host(first):
            counts = {
                row: count
                for row, sequence in enumerate(self._batch.sequences[first:])
                if (count := sequence.output.request.params.logprobs)
            }
            top |= self._runner.likeliest(logits, counts, first)
        self._batch.append(first, tokens, log_probs)

    def _read(self, deltas: list[Delta]) -> None:
        """Read the tokens of the last launched step, if they are unread, and append their deltas."""
        sampled, self._unread = self._unread, None
        if sampled is None:
            return
        tokens, log_probs = sampled.read()
        for row in sampled.order:
            sequence, token, log_prob = sampled.sequences[row], tokens[row], log_probs[row]
            if sequence.ended:
                continue
            if row < sampled.decoded:
                self._scheduler.decoded(sequence)
            output: SequenceOutput = sequence.output
            if math.isnan(log_prob):
                output.request.error = output.request.error or "the logits are not finite; do the weights contain NaN?"
                delta = output.finish(sequence, "error")
            else:
                sequence.tokens.append(token)
                delta = output.add_token(sequence, log_prob, sampled.top.get(row, ()))
            deltas.append(delta)
            self._counters.generated_tokens += len(delta.token_ids)
            if delta.finish_reason is not None:
                self._remove(sequence, delta.finish_reason)

    def _read_now(self) -> None:
        """Read unread tokens between steps; the next step returns their deltas."""
        try:
            self._read(self._undelivered)
        except BaseException:
            self._start_over()
            raise

    def _constrain(self, logits: Tensor, first: int) -> None:
        """Mask, in place, the tokens that constraints rule out. logits: [n, V] of the rows from `first` on."""
        for row, sequence in enumerate(self._batch.sequences[first:]):
            constraint = sequence.output.constraint
            try:
                allowed = None if constraint is None else constraint.allowed()
            except ValueError as problem:
                sequence.output.request.error = str(problem)
                logits[row] = math.nan  # ends the sequence, since no token can be sampled
                continue
            if allowed is not None:
                ruled_out = torch.from_numpy(~allowed).to(logits.device)
                logits[row].masked_fill_(ruled_out, -math.inf)

    def _start_over(self) -> None:
        """Discard the cache: running sequences go back to the queue with their tokens. Unread tokens are sampled again
        and will be the same."""
        self._unread = None
        self._batch.clear()
        for sequence in self._scheduler.running.copy():
            self._scheduler.preempt(sequence)
        self._pool.forget()

    def _leave(self, sequence: SequenceState) -> None:
        if sequence.row >= 0:
            self._batch.leave(sequence)

    def _remove(self, sequence: SequenceState, reason: str, count: int = 1) -> None:
        """Remove a finished sequence, or one that stands for `count` cancelled sequences."""
        sequence.ended = True
        self._leave(sequence)
        self._scheduler.remove(sequence)
        self._counters.finished[reason] += count
        state: RequestState = sequence.output.request
        state.sequences.remove(sequence)
        if not state.sequences:
            del self._requests[state.id]


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
