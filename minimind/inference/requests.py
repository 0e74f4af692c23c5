"""What goes into the engine and what comes out: SamplingParams, Request; Delta, Completion, RequestOutput.

Log-probabilities everywhere are those of the distribution that was sampled from before truncation: log softmax of the
penalised logits divided by the temperature (of the penalised logits where the temperature is 0), as the sampling
operator defines them. With temperature 1 and no penalties they are the model's own, which is what PPO and GRPO want.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np

FinishReason = Literal["stop", "length", "cancelled", "error"]
TopLogProbs = tuple[tuple[int, float], ...]  # (token id, log-probability), likeliest first

MAX_SEED = 2**63 - 1


@dataclass(frozen=True)
class SamplingParams:
    """How the samples of one request are drawn. The defaults are the model's own distribution, untruncated.

    max_new_tokens: at most so many per sample; None: up to the context's end.
    temperature: 0 takes the likeliest token.
    top_k, top_p, min_p: keep the k likeliest (0: all), the smallest set of mass >= p (1: all), those at least
        min_p times as likely as the likeliest (0: all); applied in this order.
    repetition_penalty: > 1 divides positive and multiplies negative logits of tokens that occurred in the prompt or
        the output (Keskar et al. 2019, arXiv 1909.05858); presence_penalty is subtracted from them.
    seed: the same seed gives the same sample whatever else runs; None: the engine takes one from its own seed and
        the number of the request.
    stop: strings that end a sample; text keeps what stands before the first. A special token's name counts as
        that token.
    stop_token_ids: ids that end a sample, besides the tokenizer's end-of-sequence id unless ignore_eos.
    logprobs: None, or the number of likeliest alternatives to report at every token, 0 to 100.
    n: samples of the same prompt, which is computed and stored once.

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
    """What one sample may say, decided token by token; a grammar, for example."""

    def allowed(self) -> np.ndarray | None:
        """The tokens that may come next, bool [vocab_size]; None: all of them. ValueError, one line, where none may:
        the sample ends with "error", and the output says why."""

    def advance(self, token_id: int) -> None:
        """This token was drawn."""


@dataclass(frozen=True)
class Request:
    """One prompt: text (special tokens' names in it are read as those tokens, as in a rendered chat) or token ids.

    id: how deltas and the output name it, unique among the unfinished; None: the engine numbers it.
    constraint: makes one for each sample. What it rules out has probability 0, in the log-probabilities too.
    """

    prompt: str | Sequence[int]
    params: SamplingParams = field(default_factory=SamplingParams)
    id: str | None = None
    constraint: Callable[[], Constraint] | None = None


class Delta(NamedTuple):
    """What one step added to sample `index` of request `id`.

    text: new text, whole characters only; what may still become a stop string is held back, so it can be "".
    token_ids, log_probs, top_logprobs: of this step's tokens, whether their text is out already or not.
    finish_reason: None while the sample goes on. stop: the string or token id that ended it.
    output: the whole request, with the last delta of its last sample.
    """

    id: str
    index: int  # type: ignore[assignment]  # a tuple's method of that name is of no use here
    text: str
    token_ids: tuple[int, ...]
    log_probs: tuple[float, ...]
    top_logprobs: tuple[TopLogProbs, ...]
    finish_reason: FinishReason | None = None
    stop: str | int | None = None
    output: RequestOutput | None = None


@dataclass(frozen=True)
class Completion:
    """One finished sample.

    text: without special tokens such as <|im_end|>, and up to the stop string. "" where the engine has no tokenizer.
    token_ids: all that were sampled, a final stop token included; log_probs: one for each of them.
    top_logprobs: of each token the likeliest alternatives, empty unless SamplingParams.logprobs is at least 1.
    stop: the stop string or token id where finish_reason is "stop".
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
    """Seconds since submission: until the first computation, the first token, the end. All 0 where it did not come."""

    queued: float = 0.0
    ttft: float = 0.0
    total: float = 0.0


@dataclass(frozen=True)
class RequestOutput:
    """A finished request: `n` completions in order of their index; none if it was refused.

    error: one line, why it was refused or why a sample ended with "error".

    cached_tokens: of the prompt, how many were found in the prefix cache.
    """

    id: str
    prompt_token_ids: list[int]
    completions: list[Completion]
    error: str | None = None
    cached_tokens: int = 0
    timing: RequestTiming = field(default_factory=RequestTiming)

    @property
    def text(self) -> str:
        """Of the first sample; "" for a refused request."""
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
        """Sampled tokens of all samples."""
        return sum(len(c.token_ids) for c in self.completions)

    @property
    def tokens_per_second(self) -> float:
        """Of all samples after the first token; 0 for a single token."""
        seconds = self.timing.total - self.timing.ttft
        later = self.completion_tokens - len(self.completions)
        return later / seconds if seconds > 0 and later > 0 else 0.0


def _whole(name: str, value: Any, low: int, high: int | None) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < low or (high or value) < value:
        wanted = f"an integer of at least {low}" if high is None else f"an integer in {low}..{high}"
        raise ValueError(f"{name}={value!r} must be {wanted}")


def _within(name: str, value: Any, low: float, high: float, open_low: bool = False) -> None:
    number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not number or not low <= value <= high or (open_low and value == low):
        bounds = f"{'more than' if open_low else 'at least'} {low:g} and at most {high:g}"
        raise ValueError(f"{name}={value!r} must be a number, {bounds}")
