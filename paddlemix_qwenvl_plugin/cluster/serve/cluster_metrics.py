"""Prometheus metrics of all fronts and engines in one response."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from prometheus_client.core import Metric
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

from paddlemix_qwenvl_plugin.cluster.serve.coordinator import Totals
from paddlemix_qwenvl_plugin.serve.metrics import slot_metrics


class _Cluster(Collector):
    """Collector of the reported metrics, each labelled with its process, and of the cluster's slots and queue.

    Separate series per process let Prometheus detect the reset of counters when a process starts.
    """

    def __init__(self, processes: Mapping[str, tuple[str, list[Metric]]], totals: Totals) -> None:
        self._processes = processes
        self._totals = totals

    def collect(self) -> Iterator[Metric]:
        families: dict[str, Metric] = {}
        for name, (kind, metrics) in sorted(self._processes.items()):
            for metric in metrics:
                family = families.setdefault(
                    metric.name, Metric(metric.name, metric.documentation, metric.type, metric.unit)
                )
                family.samples += [s._replace(labels={**s.labels, kind: name}) for s in metric.samples]
        yield from slot_metrics(self._totals.running, self._totals.waiting)
        yield from families.values()


def render(
    processes: Mapping[str, tuple[str, list[Metric]]], totals: Totals, accept: str
) -> tuple[bytes, str]:
    """Render the metrics of all processes as (response body, content type).

    Args:
        processes: kind (front or engine) and metrics of each process by its name.
        totals: the cluster's slots and queue.
        accept: the request's Accept header, which selects the format.
    """
    encode, content_type = choose_encoder(accept)
    return encode(_Cluster(processes, totals)), content_type
