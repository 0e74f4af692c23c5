"""The engine's state of an unfinished request: its limits when it is admitted, and the output of its sequences.

Output tokens become text incrementally. A byte-level BPE token is a piece of a byte string and may end inside a
character: Chinese characters take three bytes, emoji four. The bytes run through an incremental UTF-8 decoder, which
holds an unfinished character back. So the joined pieces are exactly `tokenizer.decode` of all ids, including U+FFFD for
invalid bytes.
"""

from __future__ import annotations

import codecs
import hashlib
import struct
import time
from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass, field

from minimind.config import ModelConfig
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
from minimind.tokenization import Tokenizer

_Utf8 = codecs.getincrementaldecoder("utf-8")


@dataclass
class RequestState:
    """An unfinished request. limit: tokens of prompt and output together. stop_ids: all ids that end a sequence.
    token_bytes: the bytes of every id; None without a tokenizer. sequences: the unfinished ones."""

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
    sequences: list[SequenceState] = field(default_factory=list)
    completions: list[Completion] = field(default_factory=list)
    error: str | None = None

    def output(self) -> RequestOutput:
        """The output of the request at this moment."""
        now = time.perf_counter()
        queued, ttft = (0.0 if t is None else t - self.submitted for t in (self.started, self.first_token))
        completions = sorted(self.completions, key=lambda completion: completion.index)
        timing = RequestTiming(queued, ttft, now - self.submitted)
        return RequestOutput(self.id, self.prompt, completions, self.error, self.cached, timing)

    def sequence_seed(self, index: int) -> int:
        """The seed of the sequence `index`. The first one has the request's seed, so that it is the same for any n."""
        return self.seed if index == 0 else derive_seed(self.seed, index)


class SequenceOutput:
    """The output of one sequence so far. request: the state of its request."""

    __slots__ = ("constraint", "detokenizer", "index", "log_probs", "request", "top_log_probs")

    def __init__(self, request: RequestState, index: int) -> None:
        self.request, self.index = request, index
        self.constraint = None if request.constraint is None else request.constraint()
        self.log_probs: list[float] = []
        self.top_log_probs: list[TopLogProbs] = []
        token_bytes = request.token_bytes
        self.detokenizer = None if token_bytes is None else Detokenizer(token_bytes, request.params.stop)

    @property
    def needs_host(self) -> bool:
        """Whether sampling needs the host in step: for a constraint, or to report the likeliest tokens."""
        return self.constraint is not None or bool(self.request.params.logprobs)

    def add_token(self, sequence: SequenceState, log_prob: float, top: tuple[TopLogProbs, ...] = ()) -> Delta:
        """The delta of the last of `sequence.tokens`. Its finish_reason is set if this token ends the sequence."""
        token, detokenizer = sequence.tokens[-1], self.detokenizer
        if self.request.first_token is None:
            self.request.first_token = time.perf_counter()
        self.log_probs.append(log_prob)
        if self.constraint is not None:
            self.constraint.advance(token)
        if top:
            self.top_log_probs.extend(top)
        text = ""
        reason: FinishReason | None = None
        stop: str | int | None = None
        if token in self.request.stop_ids:
            reason, stop = "stop", token
        elif detokenizer is not None:
            text = detokenizer.push(token)
            if detokenizer.stopped is not None:
                reason, stop = "stop", detokenizer.stopped
        if reason is None and len(sequence.tokens) >= self.request.limit:
            reason = "length"
        delta = Delta(self.request.id, self.index, text, (token,), (log_prob,), top)
        return delta if reason is None else self.finish(sequence, reason, stop, delta)

    def finish(
        self, sequence: SequenceState, reason: FinishReason, stop: str | int | None = None, delta: Delta | None = None
    ) -> Delta:
        """The sequence's last delta: `delta`, or one without a token, plus the text that was held back. With the last
        sequence of the request, the delta contains the request's output."""
        request, text, rest = self.request, "", ""
        if self.detokenizer is not None:
            rest = self.detokenizer.flush()
            text = self.detokenizer.text
        tokens = sequence.tokens[sequence.prompt_length :]
        completion = Completion(self.index, text, tokens, self.log_probs, self.top_log_probs, reason, stop)
        request.completions.append(completion)
        output = request.output() if len(request.completions) == request.params.n else None
        if delta is None:
            delta = Delta(request.id, self.index, "", (), (), ())
        return delta._replace(text=delta.text + rest, finish_reason=reason, stop=stop, output=output)


class Admission:
    """Checks requests against an engine's limits. vocabulary: number of token ids. context: tokens of prompt and
    output. pages, page_size: of the cache. seed: seeds of requests without one are derived from it."""

    def __init__(
        self, vocabulary: int, tokenizer: Tokenizer | None, context: int, pages: int, page_size: int, seed: int
    ) -> None:
        self._vocabulary, self._tokenizer, self._context = vocabulary, tokenizer, context
        self._pages, self._page_size, self._seed = pages, page_size, seed
        self._token_bytes = None if tokenizer is None else tokenizer.token_bytes()
        self._requests = 0

    def admit(self, request: Request, unfinished: Container[str]) -> RequestState:
        """The state of a new request. unfinished: ids that are in use. ValueError, one line, if it cannot be served."""
        number = self._requests
        self._requests += 1
        request_id = f"request-{number}" if request.id is None else request.id
        if request_id in unfinished:
            raise ValueError(f"request id {request_id!r} is that of an unfinished request; use another")
        params, prompt = request.params, self._encode(request.prompt)
        limit = self._limit(len(prompt), params.max_new_tokens)
        seed = derive_seed(self._seed, number) if params.seed is None else params.seed
        stop_ids = self._stop_ids(request)
        return RequestState(request_id, prompt, params, seed, limit, stop_ids, self._token_bytes, request.constraint)

    def _encode(self, prompt: str | Sequence[int]) -> list[int]:
        if isinstance(prompt, str):
            if self._tokenizer is None:
                raise ValueError("this engine has no tokenizer: give the prompt as token ids")
            ids = self._tokenizer.encode(prompt)
        else:
            try:
                ids = [int(i) for i in prompt]
            except (TypeError, ValueError):
                raise ValueError("the prompt is neither a str nor a sequence of token ids") from None
        if not ids:
            raise ValueError("the prompt is empty; give at least one token, such as the tokenizer's bos_token_id")
        unknown = next((i for i in ids if not 0 <= i < self._vocabulary), None)
        if unknown is not None:
            raise ValueError(f"token id {unknown} of the prompt is outside the vocabulary of {self._vocabulary}")
        return ids

    def _limit(self, prompt: int, new_tokens: int | None) -> int:
        """The limit of prompt and output together, in tokens. The last token is sampled but never stored."""
        if prompt >= self._context:
            raise ValueError(
                f"the prompt has {prompt} tokens, the context {self._context}: shorten it to at most "
                f"{self._context - 1}, so that one can follow"
            )
        capacity = self._pages * self._page_size
        limit = self._context if new_tokens is None else min(self._context, prompt + new_tokens)
        if new_tokens is None:
            limit = min(limit, max(capacity, prompt) + 1)
        if limit - 1 > capacity:
            raise ValueError(
                f"the request may need {limit - 1} tokens of cache, which holds {capacity}: give the engine more "
                f"kv_bytes, or the request a shorter prompt or fewer max_new_tokens"
            )
        return limit

    def _stop_ids(self, request: Request) -> frozenset[int]:
        params, tokenizer = request.params, self._tokenizer
        ids = set(params.stop_token_ids)
        if tokenizer is None:
            if params.stop:
                raise ValueError("this engine has no tokenizer: give stop_token_ids instead of stop strings")
            return frozenset(ids)
        if not params.ignore_eos:
            ids.add(tokenizer.eos_token_id)
        ids.update(tokenizer.special_tokens[text] for text in params.stop if text in tokenizer.special_tokens)
        return frozenset(ids)


def context_length(config: ModelConfig, max_context: int | None) -> int:
    """Tokens of prompt and output together: `max_context`, or all positions of the model, including YaRN's."""
    positions = config.positions
    if max_context is not None and not 2 <= max_context <= positions:
        raise ValueError(f"max_context={max_context} must lie in 2..{positions}, the positions that the model has")
    return max_context or positions


def refused(request: Request, error: str) -> RequestOutput:
    """The output of a request that was refused. error: the reason, in one line."""
    prompt = list(request.prompt) if isinstance(request.prompt, list | tuple) else []
    return RequestOutput(request.id or "", prompt, [], error)


def derive_seed(seed: int, number: int) -> int:
    """A seed of 63 bits that is derived from `seed` and `number`; other pairs give other seeds."""
    digest = hashlib.blake2b(struct.pack("<QQ", seed, number), digest_size=8).digest()
    return int.from_bytes(digest, "little") & MAX_SEED


class Detokenizer:
    """Turns the tokens of one sequence into text, up to the first stop string. `stopped`: that string, or None.

    token_bytes: the bytes of every id, from `Tokenizer.token_bytes`.
    stops: non-empty stop strings. The text ends before the one that is complete first; if several are complete at the
        same character, before the longest. So the result does not depend on token boundaries.
    """

    __slots__ = ("_decode", "_held", "_pieces", "_stops", "_token_bytes", "stopped")

    def __init__(self, token_bytes: Sequence[bytes], stops: Sequence[str] = ()) -> None:
        self._token_bytes = token_bytes
        self._decode = _Utf8("replace").decode
        self._stops = tuple(stops)
        self._held = ""
        self._pieces: list[str] = []
        self.stopped: str | None = None

    @property
    def text(self) -> str:
        """All text that `push` and `flush` have returned."""
        if len(self._pieces) > 1:
            self._pieces = ["".join(self._pieces)]
        return self._pieces[0] if self._pieces else ""

    def push(self, token_id: int) -> str:
        """Add a token; returns the new text that is certain, "" once `stopped`."""
        return self._release(self._decode(self._token_bytes[token_id]))

    def flush(self) -> str:
        """The remaining text at the end of the sequence; an unfinished character becomes U+FFFD."""
        text = self._release(self._decode(b"", True))
        if self.stopped is None and self._held:
            self._pieces.append(self._held)
            text += self._held
        self._held = ""
        return text

    def _release(self, new: str) -> str:
        if not new or self.stopped is not None:
            return ""
        if self._stops:
            held = self._held + new
            matches = [(at + len(stop), at, stop) for stop in self._stops if (at := held.find(stop)) >= 0]
            if matches:
                _, cut, self.stopped = min(matches)
                self._held = ""
            else:
                cut = len(held) - overlap(held, self._stops)
                self._held = held[cut:]
            new = held[:cut]
        if new:
            self._pieces.append(new)
        return new


def overlap(text: str, stops: tuple[str, ...]) -> int:
    """Length of the longest suffix of `text` that is a prefix of a stop string. `text` contains no stop string."""
    longest = min(len(text), max(map(len, stops)) - 1)
    for length in range(longest, 0, -1):
        tail = text[-length:]
        if any(stop.startswith(tail) for stop in stops):
            return length
    return 0
