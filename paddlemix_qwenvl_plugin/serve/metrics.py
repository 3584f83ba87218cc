"""What `GET /metrics` shows, in the form of Prometheus."""

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

# Seconds: of a token on a GPU to that of a large model on a small CPU; of a short answer to that of a long one.
_TOKEN_BUCKETS = (0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1, 2.5, 5)
_REQUEST_BUCKETS = (0.01, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)


class Metrics:
    """The counters and histograms of a server, in a registry of its own.

    Gauges, and the engine's counters, are read when they are asked for: `watch` names where.
    """

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._requests = Counter(
            "qwenvl_requests", "HTTP requests.", ["path", "status"], registry=self.registry
        )
        self._request_seconds = self._histogram(
            "qwenvl_request_duration_seconds", "From a request's head to the end of its answer.", ["path"]
        )
        self._errors = Counter("qwenvl_errors", "Errors, by their code.", ["kind"], registry=self.registry)
        self._queue_seconds = self._histogram(
            "qwenvl_queue_duration_seconds", "Waiting for a slot of the engine."
        )
        self._first_token = self._histogram(
            "qwenvl_time_to_first_token_seconds", "From a request's head to its first token."
        )
        self._between_tokens = Histogram(
            "qwenvl_time_between_tokens_seconds",
            "Between tokens of a completion. Tokens that arrive together count once, with their mean.",
            buckets=_TOKEN_BUCKETS,
            registry=self.registry,
        )
        ProcessCollector(registry=self.registry)

    def _histogram(self, name: str, text: str, labels: tuple[str, ...] | list[str] = ()) -> Histogram:
        return Histogram(name, text, labels, buckets=_REQUEST_BUCKETS, registry=self.registry)

    def watch(self, engine: EngineClient, slots: Admission) -> None:
        """Read the gauges, and the engine's counters, from these."""
        self.registry.register(_Watched(engine, slots))

    def request(self, path: str, status: int, seconds: float) -> None:
        """Count an HTTP request that has been answered. `path` is a route, of which there are few."""
        self._requests.labels(path, str(status)).inc()
        self._request_seconds.labels(path).observe(seconds)

    def error(self, kind: str) -> None:
        """Count an error, also one in the middle of a stream. `kind` is its code, or its type if it has none."""
        self._errors.labels(kind).inc()

    def queued(self, seconds: float) -> None:
        """A request got its slots."""
        self._queue_seconds.observe(seconds)

    def first_token(self, seconds: float) -> None:
        """The first token of a request is there, so long after the request's head."""
        self._first_token.observe(seconds)

    def next_tokens(self, n: int, seconds: float) -> None:
        """N tokens of a completion came together, so long after those before them."""
        self._between_tokens.observe(seconds / n)

    def render(self, accept: str = "") -> tuple[bytes, str]:
        """All of it, and its content type, as the header Accept of a request wants it."""
        encode, content_type = choose_encoder(accept)
        return encode(self.registry), content_type


class _Watched(Collector):
    """What is read at the moment when it is asked for."""

    def __init__(self, engine: EngineClient, slots: Admission) -> None:
        self._engine = engine
        self._slots = slots

    def collect(self) -> Iterator[Metric]:
        engine, stats, slots = self._engine, self._engine.stats, self._slots
        gauges = {
            "slots_running": ("Completions that hold a slot of the engine.", slots.running),
            "queue_waiting": ("Requests that wait for a slot.", slots.waiting),
            "engine_ready": ("Whether the engine process takes requests.", int(engine.ready)),
            "engine_running": ("Completions in the engine's loop.", stats.running),
            "engine_waiting": ("Completions that wait in the engine's loop, as for blocks.", stats.waiting),
            "kv_blocks": ("Blocks of the KV cache.", stats.blocks),
            "kv_blocks_used": ("Blocks of the KV cache in use.", stats.blocks_used),
        }
        counters = {
            "engine_restarts": ("Engine processes that were started after the first.", engine.restarts),
            "prompt_tokens": ("Tokens of prompts.", stats.prompt_tokens),
            "cached_prompt_tokens": ("Tokens of prompts found in the prefix cache.", stats.cached_tokens),
            "completion_tokens": ("Tokens of completions.", stats.completion_tokens),
            "images_encoded": ("Images that were encoded.", stats.images_encoded),
            "image_cache_hits": ("Images whose features were remembered.", stats.image_cache_hits),
            "preempted": ("Completions that gave their blocks back for a while.", stats.preempted),
            "steps": ("Steps of the engine's loop.", stats.steps),
        }
        for name, (text, value) in gauges.items():
            yield GaugeMetricFamily(f"qwenvl_{name}", text, value)
        for name, (text, value) in counters.items():
            yield CounterMetricFamily(f"qwenvl_{name}", text, value)
