"""Prometheus metrics of the server, for `GET /metrics`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import choose_encoder
from prometheus_client.process_collector import ProcessCollector
from prometheus_client.registry import Collector

from paddlemix_qwenvl_plugin.serve.engine_api import EngineClient

if TYPE_CHECKING:
    from paddlemix_qwenvl_plugin.serve.service import Admission

# Bounds of the histograms' buckets, in seconds. Times between tokens: from those of a GPU to those of a large model on
# a small CPU. Times of requests (also queue time and time to first token): from those of a short to a long completion.
_TOKEN_BUCKETS = (0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1, 2.5, 5)
_REQUEST_BUCKETS = (0.01, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)


class Metrics:
    """Counters and histograms of a server, in a separate registry.

    Gauges and the engine's counters are read at each scrape, from the objects passed to `watch`. On a cluster, `watch`
    and `render` are not used: cluster/serve/cluster_metrics.py renders the metrics of all processes.
    """

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._requests = Counter(
            "qwenvl_requests", "HTTP requests.", ["path", "status"], registry=self.registry
        )
        self._request_seconds = self._histogram(
            "qwenvl_request_duration_seconds",
            "From a request's headers to the end of its response.",
            ["path"],
        )
        self._errors = Counter("qwenvl_errors", "Errors, by their code.", ["kind"], registry=self.registry)
        self._queue_seconds = self._histogram(
            "qwenvl_queue_duration_seconds", "Waiting for a slot of the engine."
        )
        self._first_token = self._histogram(
            "qwenvl_time_to_first_token_seconds", "From a request's headers to its first token."
        )
        self._between_tokens = Histogram(
            "qwenvl_time_between_tokens_seconds",
            "Between tokens of a completion. Tokens that arrive together are observed once, with their mean.",
            buckets=_TOKEN_BUCKETS,
            registry=self.registry,
        )
        ProcessCollector(registry=self.registry)

    def _histogram(self, name: str, text: str, labels: tuple[str, ...] | list[str] = ()) -> Histogram:
        return Histogram(name, text, labels, buckets=_REQUEST_BUCKETS, registry=self.registry)

    def watch(self, engine: EngineClient, admission: Admission) -> None:
        """Register the objects from which gauges and the engine's counters are read."""
        self.registry.register(_StateCollector(engine, admission))

    def request(self, path: str, status: int, seconds: float) -> None:
        """Count a request that has ended.

        `path`: a route or "other", since each value of the label is a time series.
        """
        self._requests.labels(path, str(status)).inc()
        self._request_seconds.labels(path).observe(seconds)

    def error(self, kind: str) -> None:
        """Count an error response or an error event. `kind` is the error's code, or its type if it has no code."""
        self._errors.labels(kind).inc()

    def queued(self, seconds: float) -> None:
        """Observe the queue time of an admitted request."""
        self._queue_seconds.observe(seconds)

    def first_token(self, seconds: float) -> None:
        """Observe the time from a request's headers to its first token."""
        self._first_token.observe(seconds)

    def next_tokens(self, n: int, seconds: float) -> None:
        """Observe once the mean time per token of n tokens that arrived together, `seconds` after the token before."""
        self._between_tokens.observe(seconds / n)

    def render(self, accept: str = "") -> tuple[bytes, str]:
        """Render all metrics in the format of the Accept header; return the body and its content type."""
        encode, content_type = choose_encoder(accept)
        return encode(self.registry), content_type


class _StateCollector(Collector):
    """Collector that reads gauges and the engine's counters at each scrape."""

    def __init__(self, engine: EngineClient, admission: Admission) -> None:
        self._engine = engine
        self._admission = admission

    def collect(self) -> Iterator[Metric]:
        yield from slot_metrics(self._admission.running, self._admission.waiting)
        yield from engine_metrics(self._engine)


def slot_metrics(running: int, waiting: int) -> Iterator[Metric]:
    """Gauges of the slots and of the queue."""
    yield GaugeMetricFamily("qwenvl_slots_running", "Engine slots in use.", running)
    yield GaugeMetricFamily("qwenvl_queue_waiting", "Requests waiting for a slot.", waiting)


def engine_metrics(engine: EngineClient) -> Iterator[Metric]:
    """Gauges and counters of an engine process."""
    stats = engine.stats
    gauges = {
        "engine_ready": ("Whether the engine process accepts requests.", int(engine.ready)),
        "engine_running": ("Completions running in the engine's loop.", stats.running),
        "engine_waiting": ("Completions waiting in the engine's loop, such as for blocks.", stats.waiting),
        "kv_blocks": ("Blocks of the KV cache.", stats.blocks),
        "kv_blocks_used": ("Blocks of the KV cache in use.", stats.blocks_used),
    }
    counters = {
        "engine_restarts": ("Restarts of the engine process.", engine.restarts),
        "prompt_tokens": ("Prompt tokens.", stats.prompt_tokens),
        "cached_prompt_tokens": ("Prompt tokens found in the prefix cache.", stats.cached_tokens),
        "completion_tokens": ("Completion tokens.", stats.completion_tokens),
        "images_encoded": ("Images encoded by the vision stage.", stats.images_encoded),
        "image_cache_hits": ("Images whose features were found in the cache.", stats.image_cache_hits),
        "preempted": ("Preemptions.", stats.preempted),
        "steps": ("Steps of the engine's loop.", stats.steps),
    }
    for name, (text, value) in gauges.items():
        yield GaugeMetricFamily(f"qwenvl_{name}", text, value)
    for name, (text, value) in counters.items():
        yield CounterMetricFamily(f"qwenvl_{name}", text, value)
