"""Membership of a replica in the cluster: finding the coordinator, and periodic reports to it."""

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
# Maximum number of concurrent calls of the coordinator; each waiting request is a call.
_CONCURRENCY = 100_000


class Report(NamedTuple):
    """State of a replica, reported to the coordinator; `leases` is None for an engine."""

    ready: bool
    metrics: list[Metric]
    leases: Optional[Leases] = None


class _RestartableCoordinator(Coordinator):
    """Coordinator that learns from Ray whether it has been restarted."""

    def __init__(self, settings: ServeSettings) -> None:
        super().__init__(settings, ray.get_runtime_context().was_current_actor_reconstructed)


def coordinator(settings: ServeSettings) -> Any:
    """Return the handle of the cluster's coordinator; the first call creates it, later ones ignore `settings`.

    A detached actor instead of a replica, so that the queue survives updates of the application, which change its
    limits by `Coordinator.configure`.
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
    """Return the handle of the coordinator, for the command `qwenvl serve --ray`; None if it does not run."""
    with contextlib.suppress(ValueError):
        return ray.get_actor(_NAME, _NAMESPACE)
    return None


class Member:
    """Client of the coordinator in a replica, which reports once a second.

    Attributes:
        name: id of the replica, and label value of its metrics.
        coordinator: handle of the coordinator.
        totals: state of the cluster after the last report.
    """

    def __init__(
        self,
        name: str,
        kind: str,
        settings: ServeSettings,
        state: Callable[[], Report],
        on_report: Optional[Callable[[], Awaitable[None]]] = None,
    ) -> None:
        """Find or create the coordinator.

        Args:
            kind: front or engine.
            state: returns the content of each report.
            on_report: called without arguments after each report, once `totals` is updated.
        """
        self.name = name
        self.coordinator = coordinator(settings)
        self.totals = Totals(running=0, waiting=0, engines=0, draining=False, ending=False)
        self._kind = kind
        self._state = state
        self._on_report = on_report
        self._task: Optional[asyncio.Task[None]] = None

    def start(self) -> None:
        """Start periodic reports; call within the event loop."""
        self._task = asyncio.ensure_future(self._run())

    async def report(self) -> None:
        """Send a report now and update `totals`; raise RayError if the coordinator does not answer."""
        self.totals = await self.coordinator.report.remote(self.name, self._kind, *self._state())
        if self._on_report is not None:
            await self._on_report()

    async def _run(self) -> None:
        while True:
            try:
                await self.report()
            except ray.exceptions.RayError as error:  # Ray restarts the coordinator
                _LOG.warning("the coordinator does not answer: %s", error)
            await asyncio.sleep(REPORT_SECONDS)
