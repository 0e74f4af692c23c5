"""What an engine has done and holds: counters, and a snapshot for `Engine.stats`."""

from __future__ import annotations

from collections import Counter, deque
from dataclasses import dataclass, field

RATE_SECONDS = 10.0


@dataclass(frozen=True)
class EngineStats:
    """A snapshot. waiting, running: samples, those whose prompt is being computed among the running ones.

    pages_used are held by requests; pages_cached keep beginnings for reuse and give way when pages are needed.
    kv_bytes: the whole cache; kv_bytes_per_token: of a token in all layers; kv_dtype: "bfloat16", "float8_e4m3fn", ...
    What follows counts since the engine was made: steps, tokens, preemptions, samples by finish_reason. prompt_tokens
    were computed or found in the cache, cached_tokens of them found. tokens_per_second: generated in the last 10
    seconds of work.
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
    """What an engine counts. finished: samples by finish_reason."""

    steps: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    generated_tokens: int = 0
    finished: Counter[str] = field(default_factory=Counter)
    _recent: deque[tuple[float, float, int]] = field(default_factory=deque)  # a step's start, end and tokens
    _told: int = 0  # of generated_tokens, those of earlier steps

    def step(self, start: float, end: float) -> None:
        """A step that lasted from `start` to `end` seconds; what was generated since the last one counts as its own."""
        self.steps += 1
        self._recent.append((start, end, self.generated_tokens - self._told))
        self._told = self.generated_tokens
        while self._recent[0][1] < end - RATE_SECONDS:
            self._recent.popleft()

    @property
    def tokens_per_second(self) -> float:
        """Over the steps of the last RATE_SECONDS before the last one, time between steps not counted."""
        busy = sum(end - start for start, end, _ in self._recent)
        return sum(tokens for _, _, tokens in self._recent) / busy if busy else 0.0
