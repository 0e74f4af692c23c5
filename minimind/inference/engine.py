"""The engine: one for chat, evaluation, RL rollouts and the API.

A step decodes one token for every running sample and computes the next chunk of the prompts that came in; all of them
draw their next token. Requests join and leave between steps.

    submit -> Scheduler: queue and pages -> Runner: the model over PagedCache, draw -> Track: text and stops -> Delta

On a GPU the host is one step late (drawn.py): `step` launches a step and then reads the tokens of the one before. A
sample that ended with them has a row in the launched step all the same; what that draws is dropped, and its page goes
back with the sample's others. A sample that ends by its length leaves before, since that is known before its token is.
Where somebody needs the tokens now, they are read first: to preempt, to cancel, to take up new weights, and where the
host has a say in the draw itself (grammars; the likeliest tokens, which are found beside the draw).
"""

from __future__ import annotations

import math
import time
from collections.abc import Generator, Iterable, Iterator

import numpy as np
import torch
from torch import Tensor

from minimind.inference.admission import Admission, max_positions
from minimind.inference.batch import DecodeBatch
from minimind.inference.cache import PagedCache, PagePool, cache_pages
from minimind.inference.decode.cache_dtype import check_kv_dtype
from minimind.inference.decode.ops import Backend
from minimind.inference.drawn import SampledStep, host_is_late
from minimind.inference.replica import Replica
from minimind.inference.requests import Delta, Request, RequestOutput, TopLogProbs
from minimind.inference.runner import Runner
from minimind.inference.scheduler import Scheduler, SequenceState, StepPlan
from minimind.inference.stats import Counters, EngineStats
from minimind.inference.tracking import RequestState, SequenceOutput, refused
from minimind.inference.transfer import on_device
from minimind.modeling import Model
from minimind.tokenization import Tokenizer

# A prompt step of minimind2-small takes the host about 1.2 ms, whatever its length. An RTX 3090 computes 2,048 tokens
# in 2.5 ms (minimind2: 10): it does not wait for the host, and those who decode do not wait long for their next token.
GPU_CHUNK = 2048
CPU_CHUNK = 512  # 128 to 2,048 take the same time a token; a longer chunk only stalls the others longer


class Engine:
    """Continuous batching over a paged key/value cache. Single-threaded; deterministic for given requests and steps.

    model: its weights are shared where they have `dtype`; other matrices, and projections with active low-rank
        adapters, are copied, and native decoding on a CPU reads a packed copy of its own. `refresh_weights` takes up
        what has changed in the model since. Runs as in eval mode; the model itself is not touched.
    tokenizer: None for requests by token ids only: no text, no stop strings, no end-of-sequence id. Ids of the model
        beyond the tokenizer's have no probability.
    dtype: float32, bfloat16 or float16, of activations; None: what the model computes in.
    kv_dtype: of the cache: one of these or float8_e4m3fn, half of bfloat16's memory (docs/decoding.md); None: as dtype.
        Prompts, too, see keys and values as the cache gives them back.
    kv_bytes, kv_tokens: the cache's size, one of them; neither: max_batch full contexts, but at most 512 MiB on a CPU
        and half of the free memory on a GPU. It is taken at once and never grows.
    max_batch: samples that decode together.
    max_context: tokens of prompt and output; None: as many as the model has positions, YaRN's scaling included.
    page_size: tokens of a page; None: 16 on a CPU, 64 on a GPU.
    prefill_chunk: prompt tokens that a step computes at most, so that a long prompt does not stall the others; None:
        512 on a CPU, 2,048 on a GPU (docs/decoding.md).
    prefix_cache: reuse the pages of equal beginnings. What was found and what would have been computed may differ in
        the last bits.
    backend: of decoding: "native" is the C++ and CUDA extension, "reference" plain PyTorch, "auto" native where built.
    seed: of requests that bring none.

    ValueError, one line, for what cannot work: a tokenizer of more ids than the model has, a budget below one page, a
    backend that is not there.
    """

    def __init__(
        self,
        model: Model,
        tokenizer: Tokenizer | None,
        *,
        dtype: torch.dtype | None = None,
        kv_dtype: torch.dtype | None = None,
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
        max_context = max_positions(config, max_context)
        dtype = dtype or model.compute_dtype or model.dtype
        if dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise ValueError(f"dtype={dtype} must be torch.float32, torch.bfloat16 or torch.float16")
        kv_dtype = kv_dtype or dtype
        check_kv_dtype(kv_dtype, device)
        of_sample = -(-max_context // page_size)
        useful_tokens = max_batch * of_sample * page_size
        token_bytes = model.kv_bytes_per_token(kv_dtype)
        pages = cache_pages(token_bytes, device, page_size, kv_bytes, kv_tokens, useful_tokens)
        table_pages = min(pages, of_sample)

        self.dtype, self.kv_dtype, self.device, self.max_context = dtype, kv_dtype, device, max_context
        self._pool = PagePool(pages, prefix_cache)
        self._scheduler = Scheduler(self._pool, page_size, max_batch, prefill_chunk)
        self._admission = Admission(config.num_tokens, tokenizer, max_context, pages, page_size, seed)
        self._cache = PagedCache.allocate(config, pages, page_size, kv_dtype, device)
        self._replica = Replica(model, dtype, config)
        self._late = host_is_late(device)
        self._batch = DecodeBatch(max_batch, table_pages, page_size, config.num_tokens, device, self._late)
        self._runner = Runner(self._replica, self._cache, self._batch, max_context, backend, self._late)
        self._unread: SampledStep | None = None  # what the last step drew
        self._jobs: dict[str, RequestState] = {}
        self._arrivals = 0
        self._undelivered: list[Delta] = []
        self._counters = Counters()

    def generate(self, requests: Iterable[Request]) -> list[RequestOutput]:
        """Run the requests to their end; outputs in their order. A request that cannot be served comes back with
        finish_reason "error" and its `error` line, and the others do not notice."""
        names: list[str | RequestOutput] = []
        outputs: dict[str, RequestOutput] = {}
        for delta in self._run(requests, names):
            if delta.output is not None:
                outputs[delta.id] = delta.output
        return [outputs[name] if isinstance(name, str) else name for name in names]

    def stream(self, requests: Iterable[Request]) -> Iterator[Delta]:
        """Deltas of the requests as they come; a refused one gives a single delta with finish_reason "error". Closing
        the iterator cancels what is unfinished. Other requests may be submitted, run and cancelled meanwhile."""
        names: list[str | RequestOutput] = []
        deltas = self._run(requests, names)
        try:
            yield from deltas
        finally:
            deltas.close()

    def submit(self, request: Request) -> str:
        """Queue a request and return its id. ValueError, one line, if it cannot be served."""
        job = self._admission.job(request, self._jobs)
        self._jobs[job.id] = job
        for first in range(0, job.params.n, self._scheduler.max_batch):
            count = min(job.params.n - first, self._scheduler.max_batch)
            sample = SequenceState(self._arrivals, first, count, job.prompt.copy(), SequenceOutput(job, first))
            job.samples.append(sample)
            self._scheduler.add(sample)
        self._arrivals += 1
        return job.id

    def cancel(self, request_id: str) -> bool:
        """End an unfinished request: its pages are free at once, its samples finish with "cancelled" in the deltas of
        the next `step`. False if there is no such request."""
        if request_id in self._jobs:
            self._read_now()
        job = self._jobs.get(request_id)
        if job is None:
            return False
        for sample in job.samples.copy():
            tracks = [sample.track, *(SequenceOutput(job, sample.index + i) for i in range(1, sample.count))]
            self._undelivered += [track.finish(sample, "cancelled") for track in tracks]
            self._remove(sample, "cancelled", len(tracks))
        return True

    @property
    def has_work(self) -> bool:
        """Whether `step` has something to do or to deliver."""
        return bool(self._jobs or self._undelivered)

    @torch.inference_mode()
    def step(self) -> list[Delta]:
        """One token for every running sample, and the next chunk of the prompts that wait. [] when there is no work. On
        a GPU the deltas are those of the step before, none in the first."""
        deltas, self._undelivered = self._undelivered, []
        if self._jobs:
            try:
                self._step(deltas)
            except BaseException:  # out of memory, Ctrl-C: what the step had planned is not in the cache
                self._undelivered = deltas
                self._start_over()
                raise
        return deltas

    def refresh_weights(self) -> None:
        """Take up the model's changed weights: copy anew what is not shared, and forget every cached key and value.
        Running samples keep their tokens; their keys and values are computed again with the new weights."""
        self._read_now()
        moved = self._replica.refresh()
        self._runner.weights_changed(moved)
        self._start_over()

    def let_go_of_model(self) -> None:
        """Leave it to others to keep the model alive, without which `refresh_weights` is an error."""
        self._replica.let_go_of_source()

    @property
    def held_bytes(self) -> int:
        """Of memory, beside the model's: the cache and copies of weights. CUDA graphs come on top."""
        return self._cache.bytes + self._replica.copied_bytes + self._runner.packed_bytes

    def stats(self) -> EngineStats:
        counters = self._counters
        scheduler, pool = self._scheduler, self._pool
        return EngineStats(
            waiting=sum(sample.count for sample in scheduler.waiting),
            running=sum(sample.count for sample in scheduler.running),
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
        """One line for the head of a run: backend, dtype, cache and batch."""
        cache, scheduler = self._cache, self._scheduler
        shared = "weights shared with the model"
        if copied := self._replica.copied_bytes + self._runner.packed_bytes:
            shared = f"{copied / 2**20:.0f} MiB of weights copied"
        return (
            f"{self._runner.describe()}; {_name(self.dtype)}, {shared}; cache {cache.bytes / 2**20:.0f} MiB of "
            f"{_name(self.kv_dtype)} for {cache.pages * cache.page_size} tokens in pages of {cache.page_size}; "
            f"batch up to {scheduler.max_batch}, context {self.max_context}"
        )

    def _run(self, requests: Iterable[Request], names: list[str | RequestOutput]) -> Generator[Delta, None, None]:
        """Deltas of the requests. `names` gets for each of them, in order, its id or the output of its refusal."""
        own: set[str] = set()
        try:
            for request in requests:
                try:
                    name = self.submit(request)
                    names.append(name)
                    own.add(name)
                except ValueError as error:
                    output = refused(request, str(error))
                    names.append(output)
                    yield Delta(output.id, 0, "", (), (), (), "error", None, output)
            while own:
                deltas = self.step()
                self._undelivered += [delta for delta in deltas if delta.id not in own]
                mine = [delta for delta in deltas if delta.id in own]
                if not mine and not own & self._jobs.keys():
                    raise RuntimeError(f"someone else's Engine.step took the deltas of {', '.join(sorted(own))}")
                for delta in mine:
                    if delta.output is not None:
                        own.discard(delta.id)
                    yield delta
        finally:
            for name in own:
                self.cancel(name)
            self._undelivered = [delta for delta in self._undelivered if delta.id not in own]

    def _step(self, deltas: list[Delta]) -> None:
        """Append the deltas of the tokens that are read in this step."""
        start = time.perf_counter()
        if self._unread is not None:
            for sample in self._batch.at_limit():
                self._leave(sample)
                sample.ending = True
            if self._scheduler.short_of_pages():  # whom to preempt depends on who ended
                self._read(deltas)
        launched = self._launch(self._scheduler.plan(), start)
        self._read(deltas)
        self._unread = launched
        if launched is not None and launched.in_step:
            self._read(deltas)
        self._counters.step(start, time.perf_counter())

    def _launch(self, plan: StepPlan, now: float) -> SampledStep | None:
        """Begin a step; what it draws, None if that is nothing."""
        self._carry_out(plan, now)
        batch, runner = self._batch, self._runner
        decoding, top = len(batch), dict[int, tuple[TopLogProbs, ...]]()
        if decoding:
            batch.upload()
            if batch.needs_host():
                self._draw(runner.decode(), 0, top)
            else:
                runner.step()
            batch.advance()
            for sample in batch.samples:
                sample.computed += 1
        if plan.chunks:
            logits = self._join(plan, runner.prefill(plan.chunks))
            if len(batch) > decoding:
                batch.upload()
                self._draw(logits, decoding, top)
                batch.advance(decoding)
        if not len(batch):
            return None
        drawn = batch.drawn(decoding, in_step=not self._late or batch.needs_host())
        drawn.top = top
        return drawn

    def _carry_out(self, plan: StepPlan, now: float) -> None:
        for sample in plan.preempted:
            self._leave(sample)
        if plan.copies:
            self._cache.copy_pages(plan.copies)
        for sample in plan.grown:
            self._batch.set_last_page(sample)
        for chunk in plan.chunks:
            job = chunk.sample.track.job
            if job.started is None:
                job.started, job.cached = now, chunk.sample.cached
                self._counters.prompt_tokens += len(job.prompt)
                self._counters.cached_tokens += job.cached

    def _join(self, plan: StepPlan, logits: Tensor) -> Tensor:
        """Let the samples whose prompts are computed into the batch. logits [finished prompts, V] -> [joined, V]."""
        copies: list[int] = []
        for chunk in plan.chunks:
            if chunk.last:
                leader: SequenceOutput = chunk.sample.track
                job, samples = leader.job, self._scheduler.fork(chunk.sample)
                copies.append(len(samples))
                for sample in samples:
                    if sample.track is None:
                        sample.track = SequenceOutput(job, sample.index)
                        job.samples.append(sample)
                    seed = job.sample_seed(sample.index)
                    self._batch.join(sample, job.params, seed, job.limit, sample.track.needs_host)
        if len(copies) == sum(copies):
            return logits
        (rows,) = on_device([np.repeat(np.arange(len(copies)), copies)], logits.device)
        return logits.index_select(0, rows)

    def _draw(self, logits: Tensor, first: int, top: dict[int, tuple[TopLogProbs, ...]]) -> None:
        """The next token of every row from `first` on; into `top` goes what those who asked are told beside it."""
        if self._batch.needs_host(first):
            self._constrain(logits, first)
        tokens, log_probs = self._runner.sample(logits, first)
        if self._batch.needs_host(first):
            top |= self._alternatives(logits, first)
        self._batch.take(first, tokens, log_probs)

    def _read(self, deltas: list[Delta]) -> None:
        """Take up the tokens that are not read yet."""
        drawn, self._unread = self._unread, None
        if drawn is None:
            return
        tokens, log_probs = drawn.read()
        for row in drawn.order:
            sample, token, log_prob = drawn.samples[row], tokens[row], log_probs[row]
            if sample.ended:
                continue
            if row < drawn.decoded:
                self._scheduler.decoded(sample)
            track: SequenceOutput = sample.track
            if log_prob != log_prob:
                track.job.error = track.job.error or "the model's logits are not finite; do its weights hold NaN?"
                delta = track.finish(sample, "error")
            else:
                sample.tokens.append(token)
                delta = track.take(sample, log_prob, drawn.top.get(row, ()))
            deltas.append(delta)
            self._counters.generated_tokens += len(delta.token_ids)
            if delta.finish_reason is not None:
                self._remove(sample, delta.finish_reason)

    def _read_now(self) -> None:
        """The same between steps; the next one delivers them."""
        try:
            self._read(self._undelivered)
        except BaseException:
            self._start_over()
            raise

    def _constrain(self, logits: Tensor, first: int) -> None:
        """Rule out, in place, what the samples' constraints do not allow. logits [n, V] of the rows from `first` on."""
        for row, sample in enumerate(self._batch.samples[first:]):
            constraint = sample.track.constraint
            try:
                allowed = None if constraint is None else constraint.allowed()
            except ValueError as problem:
                sample.track.job.error = str(problem)
                logits[row] = math.nan  # no token can be drawn: the sample ends
                continue
            if allowed is not None:
                ruled_out = torch.from_numpy(~allowed).to(logits.device)
                logits[row].masked_fill_(ruled_out, -math.inf)

    def _alternatives(self, logits: Tensor, first: int) -> dict[int, tuple[TopLogProbs, ...]]:
        """By row of the batch, for the samples that asked: the likeliest tokens and their log-probabilities."""
        wanted = {
            row: sample.track.job.params.logprobs
            for row, sample in enumerate(self._batch.samples[first:])
            if sample.track.job.params.logprobs
        }
        if not wanted:
            return {}
        values, ids = self._runner.likeliest(logits, list(wanted), max(wanted.values()), first)
        pairs = zip(wanted.items(), ids.tolist(), values.tolist(), strict=True)
        return {
            first + row: (tuple(zip(row_ids[:n], row_values[:n], strict=True)),)
            for (row, n), row_ids, row_values in pairs
        }

    def _start_over(self) -> None:
        """Trust nothing in the cache: running samples go back to the queue with the tokens that they have. One that
        was drawn and is not read will be drawn again, the same."""
        self._unread = None
        self._batch.clear()
        for sample in self._scheduler.running.copy():
            self._scheduler.preempt(sample)
        self._pool.forget()

    def _leave(self, sample: SequenceState) -> None:
        if sample.row >= 0:
            self._batch.leave(sample)

    def _remove(self, sample: SequenceState, reason: str, count: int = 1) -> None:
        """Forget a finished sample, or one that stands for `count` that are cancelled."""
        sample.ended = True
        self._leave(sample)
        self._scheduler.remove(sample)
        self._counters.finished[reason] += count
        job: RequestState = sample.track.job
        job.samples.remove(sample)
        if not job.samples:
            del self._jobs[job.id]


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
