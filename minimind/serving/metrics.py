"""Figures for Prometheus, in its text format."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from minimind.inference.stats import EngineStats

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)


class Metrics:
    """A registry of its own for each server."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._stats: EngineStats | None = None
        self.first_token = Histogram(
            "minimind_time_to_first_token_seconds",
            "From the submission of a request to its first token",
            buckets=SECONDS,
            registry=self._registry,
        )
        self.responses = Counter(
            "minimind_http_responses", "Responses by route and status", ("route", "status"), registry=self._registry
        )
        self._registry.register(self)

    def render(self, stats: EngineStats) -> bytes:
        """All figures, with a snapshot of the engine's."""
        self._stats = stats
        return generate_latest(self._registry)

    def collect(self) -> Iterator[Metric]:
        """The engine's figures; prometheus_client calls this."""
        s = self._stats
        if s is None:
            return
        for name, text, value in (
            ("requests_waiting", "Samples in the queue", s.waiting),
            ("requests_running", "Samples in the batch, those whose prompt is being computed included", s.running),
            ("batch_limit", "Samples that can be in the batch", s.max_batch),
            ("tokens_per_second", "Generated in the last ten seconds in which the engine worked", s.tokens_per_second),
            ("kv_cache_bytes", "Size of the cache of keys and values", s.kv_bytes),
            ("kv_cache_usage_ratio", "Share of its pages that requests hold", s.pages_used / s.pages_total),
        ):
            yield GaugeMetricFamily(f"minimind_{name}", text, value)
        pages = GaugeMetricFamily("minimind_kv_cache_pages", "Pages of the cache by state", labels=["state"])
        free = s.pages_total - s.pages_used - s.pages_cached
        for state, count in (("used", s.pages_used), ("reusable", s.pages_cached), ("free", free)):
            pages.add_metric([state], count)
        yield pages
        for name, text, value in (
            ("generated_tokens", "Tokens that were drawn", s.generated_tokens),
            ("prompt_tokens", "Tokens of prompts", s.prompt_tokens),
            ("cached_prompt_tokens", "Of them, those found in the cache", s.cached_tokens),
            ("preemptions", "Samples that gave their pages back to older ones", s.preemptions),
            ("engine_steps", "Steps of the engine", s.steps),
        ):
            yield CounterMetricFamily(f"minimind_{name}", text, value)
        finished = CounterMetricFamily("minimind_samples_finished", "Samples by how they ended", labels=["reason"])
        for reason, count in sorted(s.finished.items()):
            finished.add_metric([reason], count)
        yield finished
