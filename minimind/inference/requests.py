"""The engine's inputs and outputs: requests with sampling parameters, deltas, completions, statistics.

All log-probabilities are of the distribution before truncation: log softmax of the penalised logits divided by the
temperature (undivided if the temperature is 0), as the sampling operator defines them. With temperature 1 and without
penalties they are the model's own, as PPO and GRPO need them.
"""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np

FinishReason = Literal["stop", "length", "cancelled", "error"]
TopLogProbs = tuple[tuple[int, float], ...]  # (token id, log-probability), likeliest first

MAX_SEED = 2**63 - 1
RATE_SECONDS = 10.0


@dataclass(frozen=True)
class SamplingParams:
    """How to sample the completions of a request. The defaults are the model's own distribution, untruncated.

    max_new_tokens: limit per completion; None: the end of the context.
    temperature: 0 takes the likeliest token.
    top_k, top_p, min_p: keep the k likeliest tokens (0: all), the smallest set with a mass of at least p (1: all), and
        tokens at least min_p times as likely as the likeliest (0: all); applied in this order.
    repetition_penalty: a value above 1 divides positive and multiplies negative logits of tokens that occurred in the
        prompt or the output (Keskar et al. 2019, arXiv 1909.05858). presence_penalty is subtracted from them.
    seed: the same seed gives the same completion whatever else runs. None: derived from the engine's seed and the
        number of the request.
    stop: strings that end a completion; its text ends before the first. The name of a special token stands for the
        token.
    stop_token_ids: ids that end a completion, in addition to the tokenizer's end-of-sequence id unless ignore_eos.
    logprobs: None, or the number of likeliest alternatives to report for every token, 0 to 100.
    n: completions of the same prompt, which is computed and stored once.

    ValueError, one line, for a value outside its range.
    """

    max_new_tokens: int | None = 256
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    logprobs: int | None = None
    n: int = 1
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)
        object.__setattr__(self, "stop", stop)
        object.__setattr__(self, "stop_token_ids", tuple(int(i) for i in self.stop_token_ids))
        if self.max_new_tokens is not None:
            _whole("max_new_tokens", self.max_new_tokens, 1, None)
        _whole("top_k", self.top_k, 0, None)
        _whole("n", self.n, 1, None)
        if self.seed is not None:
            _whole("seed", self.seed, 0, MAX_SEED)
        if self.logprobs is not None:
            _whole("logprobs", self.logprobs, 0, 100)
        _within("temperature", self.temperature, 0.0, 1e4)
        _within("top_p", self.top_p, 0.0, 1.0, open_low=True)
        _within("min_p", self.min_p, 0.0, 1.0)
        _within("repetition_penalty", self.repetition_penalty, 0.0, 1e4, open_low=True)
        _within("presence_penalty", self.presence_penalty, -1e4, 1e4)
        if any(not isinstance(s, str) or not s for s in stop):
            raise ValueError(f"stop={list(stop)!r}: a stop string is a non-empty str")


class Constraint(Protocol):
    """Restricts the tokens of one completion, for example by a grammar."""

    def allowed(self) -> np.ndarray | None:
        """The tokens allowed next, bool [vocab_size]; None: all. ValueError, one line, if none is allowed: then the
        completion ends with "error", and the output contains the line."""

    def advance(self, token_id: int) -> None:
        """Take note of the sampled token."""


@dataclass(frozen=True)
class Request:
    """One prompt: token ids, or text, in which the names of special tokens stand for those tokens.

    id: identifies the request in deltas and outputs; unique among unfinished requests. None: the engine numbers it.
    constraint: called for each completion to make its Constraint. Tokens that it rules out have probability 0, in the
        log-probabilities too.
    """

    prompt: str | Sequence[int]
    params: SamplingParams = field(default_factory=SamplingParams)
    id: str | None = None
    constraint: Callable[[], Constraint] | None = None


class Delta(NamedTuple):
    """The progress of completion `index` of request `id` in one step.

    text: new text in whole characters. Text that may become a stop string is held back, so it can be "".
    token_ids, log_probs, top_logprobs: of this step's tokens, even if their text is held back.
    finish_reason: None until the completion ends. stop: the string or token id that ended it.
    output: the request's output, in the last delta of its last completion.
    """

    id: str
    index: int  # type: ignore[assignment]  # hides a method of tuple
    text: str
    token_ids: tuple[int, ...]
    log_probs: tuple[float, ...]
    top_logprobs: tuple[TopLogProbs, ...]
    finish_reason: FinishReason | None = None
    stop: str | int | None = None
    output: RequestOutput | None = None


@dataclass(frozen=True)
class Completion:
    """One finished completion.

    text: up to the stop string, without special tokens such as <|im_end|>; "" if the engine has no tokenizer.
    token_ids: all sampled tokens, including a final stop token. log_probs: one for each token.
    top_logprobs: the likeliest alternatives for each token; empty unless SamplingParams.logprobs is at least 1.
    stop: the stop string or token id if finish_reason is "stop".
    """

    index: int
    text: str
    token_ids: list[int]
    log_probs: list[float]
    top_logprobs: list[TopLogProbs]
    finish_reason: FinishReason
    stop: str | int | None = None


@dataclass(frozen=True)
class RequestTiming:
    """Seconds from submission to the first computation, the first token and the end; 0 for those that never came."""

    queued: float = 0.0
    ttft: float = 0.0
    total: float = 0.0


@dataclass(frozen=True)
class RequestOutput:
    """A finished request: its `n` completions in order of their index; none if it was refused.

    error: the reason, in one line, if the request was refused or a completion ended with "error".
    cached_tokens: tokens of the prompt that were found in the prefix cache.
    """

    id: str
    prompt_token_ids: list[int]
    completions: list[Completion]
    error: str | None = None
    cached_tokens: int = 0
    timing: RequestTiming = field(default_factory=RequestTiming)

    @property
    def text(self) -> str:
        """The text of the first completion; "" for a refused request."""
        return self.completions[0].text if self.completions else ""

    @property
    def token_ids(self) -> list[int]:
        return self.completions[0].token_ids if self.completions else []

    @property
    def log_probs(self) -> list[float]:
        return self.completions[0].log_probs if self.completions else []

    @property
    def finish_reason(self) -> FinishReason:
        return self.completions[0].finish_reason if self.completions else "error"

    @property
    def completion_tokens(self) -> int:
        """Number of sampled tokens of all completions."""
        return sum(len(c.token_ids) for c in self.completions)

    @property
    def tokens_per_second(self) -> float:
        """The rate of all completions together after their first tokens; 0 for a single token."""
        seconds = self.timing.total - self.timing.ttft
        later = self.completion_tokens - len(self.completions)
        return later / seconds if seconds > 0 and later > 0 else 0.0


def _whole(name: str, value: Any, low: int, high: int | None) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < low or (high or value) < value:
        expected = f"an integer of at least {low}" if high is None else f"an integer in {low}..{high}"
        raise ValueError(f"{name}={value!r} must be {expected}")


def _within(name: str, value: Any, low: float, high: float, open_low: bool = False) -> None:
    number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not number or not low <= value <= high or (open_low and value == low):
        bounds = f"{'more than' if open_low else 'at least'} {low:g} and at most {high:g}"
        raise ValueError(f"{name}={value!r} must be a number, {bounds}")


@dataclass(frozen=True)
class EngineStats:
    """A snapshot of an engine's state.

    waiting, running: sequences; those whose prompt is being computed are running. pages_used: held by requests.
    pages_cached: prefixes kept for reuse, which are evicted when pages are needed. kv_bytes: of the whole cache.
    kv_bytes_per_token: of a token in all layers. kv_dtype: "bfloat16", "float8_e4m3fn", ...

    The rest counts from the engine's creation: steps, tokens, preemptions, finished sequences by finish_reason.
    prompt_tokens were computed or found in the cache; cached_tokens were found. tokens_per_second: generated tokens in
    the last 10 seconds of work.
    """

    waiting: int
    running: int
    max_batch: int
    pages_total: int
    pages_used: int
    pages_cached: int
    page_size: int
    kv_bytes: int
    kv_bytes_per_token: int
    kv_dtype: str
    steps: int
    prompt_tokens: int
    cached_tokens: int
    generated_tokens: int
    preemptions: int
    finished: dict[str, int]
    tokens_per_second: float


@dataclass
class Counters:
    """Counts of an engine. finished: sequences by finish_reason."""

    steps: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    generated_tokens: int = 0
    finished: Counter[str] = field(default_factory=Counter)
    _recent: deque[tuple[float, float, int]] = field(default_factory=deque)  # start, end and tokens of recent steps
    _counted: int = 0  # generated_tokens of earlier steps

    def step(self, start: float, end: float) -> None:
        """Count a step that lasted from `start` to `end`, in seconds; tokens since the last step belong to it."""
        self.steps += 1
        self._recent.append((start, end, self.generated_tokens - self._counted))
        self._counted = self.generated_tokens
        while self._recent[0][1] < end - RATE_SECONDS:
            self._recent.popleft()

    @property
    def tokens_per_second(self) -> float:
        """The rate of the last RATE_SECONDS, without the time between steps."""
        busy = sum(end - start for start, end, _ in self._recent)
        return sum(tokens for _, _, tokens in self._recent) / busy if busy else 0.0
