"""Membership of a front or engine replica in the cluster: the coordinator's handle, and reports to it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable
from typing import Any, NamedTuple, Optional

import ray
from prometheus_client.core import Metric

from paddlemix_qwenvl_plugin.cluster.serve.coordinator import REPORT_SECONDS, Coordinator, Leases, Totals
from paddlemix_qwenvl_plugin.serve.settings import ServeSettings

_LOG = logging.getLogger(__name__)

_NAME, _NAMESPACE = "qwenvl-coordinator", "qwenvl"
# Calls that wait at the same time: a request in the queue is one.
_CONCURRENCY = 100_000


class Report(NamedTuple):
    """State of a replica for the coordinator."""

    ready: bool
    metrics: list[Metric]
    leases: Optional[Leases] = None


class _RestartableCoordinator(Coordinator):
    def __init__(self, settings: ServeSettings) -> None:
        super().__init__(settings, ray.get_runtime_context().was_current_actor_reconstructed)


def coordinator(settings: ServeSettings) -> Any:
    """Handle of the cluster's coordinator, which the first caller creates.

    It is no replica: an update of the application must not lose the queue.
    """
    return (
        ray.remote(_RestartableCoordinator)
        .options(
            name=_NAME,
            namespace=_NAMESPACE,
            get_if_exists=True,
            lifetime="detached",
            max_restarts=-1,
            max_concurrency=_CONCURRENCY,
            num_cpus=0,
        )
        .remote(settings)
    )


def running_coordinator() -> Optional[Any]:
    """Handle of the coordinator if one runs."""
    with contextlib.suppress(ValueError):
        return ray.get_actor(_NAME, _NAMESPACE)
    return None


class Member:
    """Replica that reports to the coordinator once a second.

    Attributes:
        name: the replica's id, the value of the metrics' label.
        coordinator: handle of the coordinator.
        totals: state of the cluster after the last report.
    """

    def __init__(
        self,
        name: str,
        kind: str,
        settings: ServeSettings,
        state: Callable[[], Report],
        reported: Optional[Callable[[], Awaitable[None]]] = None,
    ) -> None:
        """Find or create the coordinator.

        Args:
            kind: front or engine.
            state: called for each report.
            reported: called after each report, when `totals` are new.
        """
        self.name = name
        self.coordinator = coordinator(settings)
        self.totals = Totals(0, 0, 0, False, False)
        self._kind = kind
        self._state = state
        self._reported = reported
        self._task: Optional[asyncio.Task[None]] = None

    def start(self) -> None:
        """Begin to report; from the event loop."""
        self._task = asyncio.ensure_future(self._run())

    async def report(self) -> None:
        """Report now."""
        self.totals = await self.coordinator.report.remote(self.name, self._kind, *self._state())
        if self._reported is not None:
            await self._reported()

    async def _run(self) -> None:
        while True:
            try:
                await self.report()
            except ray.exceptions.RayError as error:  # restarting
                _LOG.warning("the coordinator does not answer: %s", error)
            await asyncio.sleep(REPORT_SECONDS)
