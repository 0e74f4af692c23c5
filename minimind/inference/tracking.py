"""What the engine keeps of a request (Job) and of each of its samples (Track) while tokens come in."""

from __future__ import annotations

import hashlib
import struct
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from minimind.inference.detokenize import Detokenizer
from minimind.inference.requests import (
    MAX_SEED,
    Completion,
    Constraint,
    Delta,
    FinishReason,
    Request,
    RequestOutput,
    RequestTiming,
    SamplingParams,
    TopLogProbs,
)
from minimind.inference.scheduler import SequenceState


@dataclass
class RequestState:
    """An unfinished request.

    limit: tokens of prompt and output together. stop_ids: all that end a sample. token_bytes: None without a tokenizer.
    samples: the unfinished ones.
    """

    id: str
    prompt: list[int]
    params: SamplingParams
    seed: int
    limit: int
    stop_ids: frozenset[int]
    token_bytes: Sequence[bytes] | None
    constraint: Callable[[], Constraint] | None = None
    submitted: float = field(default_factory=time.perf_counter)
    started: float | None = None
    first_token: float | None = None
    cached: int = 0
    samples: list[SequenceState] = field(default_factory=list)
    completions: list[Completion] = field(default_factory=list)
    error: str | None = None

    def output(self) -> RequestOutput:
        now = time.perf_counter()
        queued, ttft = (0.0 if t is None else t - self.submitted for t in (self.started, self.first_token))
        completions = sorted(self.completions, key=lambda completion: completion.index)
        timing = RequestTiming(queued, ttft, now - self.submitted)
        return RequestOutput(self.id, self.prompt, completions, self.error, self.cached, timing)

    def sample_seed(self, index: int) -> int:
        """The first sample has the request's own seed, so that n = 1 draws what the first of n = 8 does."""
        return self.seed if index == 0 else mix(self.seed, index)


class SequenceOutput:
    """The output of one sample so far."""

    __slots__ = ("constraint", "detokenizer", "index", "job", "log_probs", "top_log_probs")

    def __init__(self, job: RequestState, index: int) -> None:
        self.job, self.index = job, index
        self.constraint = None if job.constraint is None else job.constraint()
        self.log_probs: list[float] = []
        self.top_log_probs: list[TopLogProbs] = []
        table = job.token_bytes
        self.detokenizer = None if table is None else Detokenizer(table, job.params.stop)

    @property
    def needs_host(self) -> bool:
        """Whether a draw waits for the host: to say what may come, or to be told what else was likely."""
        return self.constraint is not None or bool(self.job.params.logprobs)

    def take(self, sample: SequenceState, log_prob: float, top: tuple[TopLogProbs, ...] = ()) -> Delta:
        """The delta of the token that `sample.tokens` now ends with; its finish_reason says whether it was the last."""
        token, detokenizer = sample.tokens[-1], self.detokenizer
        if self.job.first_token is None:
            self.job.first_token = time.perf_counter()
        self.log_probs.append(log_prob)
        if self.constraint is not None:
            self.constraint.advance(token)
        if top:
            self.top_log_probs.extend(top)
        text = ""
        reason: FinishReason | None = None
        stop: str | int | None = None
        if token in self.job.stop_ids:
            reason, stop = "stop", token
        elif detokenizer is not None:
            text = detokenizer.push(token)
            if detokenizer.stopped is not None:
                reason, stop = "stop", detokenizer.stopped
        if reason is None and len(sample.tokens) >= self.job.limit:
            reason = "length"
        delta = Delta(self.job.id, self.index, text, (token,), (log_prob,), top)
        return delta if reason is None else self.finish(sample, reason, stop, delta)

    def finish(
        self, sample: SequenceState, reason: FinishReason, stop: str | int | None = None, delta: Delta | None = None
    ) -> Delta:
        """The sample's last delta: `delta`, or one without a token, with the text that was held back. With the last
        sample's, the output of the request."""
        job, text, rest = self.job, "", ""
        if self.detokenizer is not None:
            rest = self.detokenizer.flush()
            text = self.detokenizer.text
        tokens = sample.tokens[sample.prompt_length :]
        job.completions.append(Completion(self.index, text, tokens, self.log_probs, self.top_log_probs, reason, stop))
        output = job.output() if len(job.completions) == job.params.n else None
        if delta is None:
            delta = Delta(job.id, self.index, "", (), (), ())
        return delta._replace(text=delta.text + rest, finish_reason=reason, stop=stop, output=output)


def refused(request: Request, error: str) -> RequestOutput:
    """The output of a request that cannot be served."""
    prompt = list(request.prompt) if isinstance(request.prompt, list | tuple) else []
    return RequestOutput(request.id or "", prompt, [], error)


def mix(seed: int, number: int) -> int:
    """A seed of 63 bits for the `number`-th of what `seed` stands for, unlike that of every other pair."""
    digest = hashlib.blake2b(struct.pack("<QQ", seed, number), digest_size=8).digest()
    return int.from_bytes(digest, "little") & MAX_SEED
