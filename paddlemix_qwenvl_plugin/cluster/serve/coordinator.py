"""Coordinator actor: the cluster-wide queue, and the latest metrics of all processes."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Optional

from prometheus_client.core import Metric

from paddlemix_qwenvl_plugin.cluster.serve.replicas import max_replicas
from paddlemix_qwenvl_plugin.serve.admission import SlotQueue
from paddlemix_qwenvl_plugin.serve.errors import ApiError
from paddlemix_qwenvl_plugin.serve.settings import ServeSettings

REPORT_SECONDS = 1.0
"""Interval of the reports of fronts and engines, in seconds."""

# A process that has not reported for this time counts as lost; its leases are released.
_LOST_SECONDS = 10.0
# A lease that is this old and missing in a report of its front is released: its request has ended. A younger one may be
# missing because the grant was on its way to the front.
_UNCLAIMED_SECONDS = 5.0
# The coordinator exits after this time without fronts, for example after Ray's command `serve shutdown`.
_IDLE_SECONDS = 600.0

Leases = Mapping[str, tuple[int, Optional[str]]]
"""Leases of a front: lease id -> (number of slots, short hash of the API key or None) of each admitted request."""


class Totals(NamedTuple):
    """Cluster state that the coordinator returns to fronts and engines.

    Attributes:
        running: slots in use.
        waiting: requests waiting for slots.
        engines: number of engine replicas that are ready.
        draining: whether new requests are refused.
        ending: whether the fronts must end their running requests.
    """

    running: int
    waiting: int
    engines: int
    draining: bool
    ending: bool


@dataclass
class _Process:
    """Last report of a front or engine replica."""

    kind: str
    reported: float
    ready: bool
    metrics: list[Metric]


@dataclass
class _Lease:
    """Slots of a request.

    Attributes:
        granted: time of the grant; None while the request waits.
        stack: frees the slots when it is closed.
        task: waits for the grant; None once granted.
    """

    front: str
    granted: Optional[float] = None
    stack: contextlib.AsyncExitStack = field(default_factory=contextlib.AsyncExitStack)
    task: Optional[asyncio.Task[Any]] = None


class Coordinator:
    """Cluster-wide SlotQueue with leases: the slots of a front that stops reporting are freed.

    After a restart by Ray, the coordinator takes the leases from the fronts' next reports. All methods run in one event
    loop. Errors are returned, not raised: Ray would wrap them.
    """

    def __init__(self, settings: ServeSettings, restarted: bool = False) -> None:
        self._queue = SlotQueue(**_limits(settings))
        self._leases: dict[str, _Lease] = {}
        self._processes: dict[str, _Process] = {}
        self._draining = self._ending = False
        self._owner = ""
        # Time until which `acquire` waits: after a restart, the slots in use are unknown until all fronts have
        # reported.
        self._settled = time.monotonic() + (2 * REPORT_SECONDS if restarted else 0.0)
        self._idle_since = time.monotonic()
        self._sweeper: Optional[asyncio.Task[None]] = None

    async def configure(self, settings: ServeSettings) -> None:
        """Set the queue's limits from a starting front's settings; accept requests, also after `drain` or `end`."""
        self._queue.set_limits(**_limits(settings))
        self._queue.open()
        self._draining = self._ending = False

    async def set_owner(self, owner: str) -> None:
        """Record the command that owns the application, by a unique id."""
        self._owner = owner

    async def owner(self) -> str:
        """Return the last id given to `set_owner`; "" if it was not called since this actor's last start."""
        return self._owner

    async def acquire(
        self, front: str, lease_id: str, n: int, key: Optional[str]
    ) -> Optional[dict[str, Any]]:
        """Wait for n slots. Return None when they are granted, or the arguments of an ApiError if they are refused.

        Args:
            front: name of the front.
            lease_id: id of the request's lease, the same in a retry of the call.
            key: short hash of the request's API key, or None.
        """
        if self._settled > time.monotonic():
            await asyncio.sleep(self._settled - time.monotonic())
        lease = self._leases.get(lease_id)
        if lease is None:
            lease = self._leases[lease_id] = _Lease(front)
            lease.task = asyncio.ensure_future(lease.stack.enter_async_context(self._queue.slots(n, key)))
        elif lease.task is None:  # a retry: granted, or acquired before this actor's restart and adopted
            return None
        try:
            await lease.task
        except ApiError as error:
            self._leases.pop(lease_id, None)  # the call and its retry await the same task
            return {"message": str(error), **vars(error)}
        except asyncio.CancelledError:  # by `release`: the client is gone, the result is not used
            return None
        lease.task, lease.granted = None, time.monotonic()
        return None

    async def release(self, lease_id: str) -> None:
        """Free the slots of a lease, or stop waiting for them."""
        lease = self._leases.pop(lease_id, None)
        if lease is None:
            return
        if lease.task is not None and not lease.task.done():
            lease.task.cancel()
            with contextlib.suppress(asyncio.CancelledError, ApiError):
                await lease.task
        await lease.stack.aclose()

    async def report(
        self, name: str, kind: str, ready: bool, metrics: list[Metric], leases: Optional[Leases] = None
    ) -> Totals:
        """Record the report of a process, `kind` front or engine, and return the cluster state.

        Adopts reported leases that are unknown here; releases leases of the front that are missing in its report and
        were granted more than _UNCLAIMED_SECONDS ago.
        """
        now = time.monotonic()
        self._processes[name] = _Process(kind, now, ready, metrics)
        for lease_id, (n, key) in (leases or {}).items():
            if lease_id not in self._leases:
                lease = self._leases[lease_id] = _Lease(name, now)
                lease.stack.enter_context(self._queue.adopted(n, key))
        if leases is not None:
            await self._release_unclaimed(name, leases, now)
        if self._sweeper is None:
            self._sweeper = asyncio.ensure_future(self._sweep())
        return self._totals()

    async def metrics(self) -> tuple[dict[str, tuple[str, list[Metric]]], Totals]:
        """Return the kind and the metrics of each process by its name, and the totals."""
        processes = {name: (process.kind, process.metrics) for name, process in self._processes.items()}
        return processes, self._totals()

    async def drain(self) -> Totals:
        """Refuse new requests; waiting and running ones continue."""
        self._draining = True
        self._queue.close()
        return self._totals()

    async def end(self) -> None:
        """Refuse new and waiting requests, and have the fronts end the running ones."""
        self._draining = self._ending = True
        self._queue.refuse_waiting()

    def _totals(self) -> Totals:
        n_engines = sum(process.ready for process in self._processes.values() if process.kind == "engine")
        return Totals(self._queue.running, self._queue.waiting, n_engines, self._draining, self._ending)

    async def _release_unclaimed(self, front: str, claimed: Leases, now: float) -> None:
        """Release the leases that a front does not report: its `release` was lost, or arrived before `acquire`."""
        for lease_id, lease in list(self._leases.items()):
            is_old = lease.granted is not None and now - lease.granted > _UNCLAIMED_SECONDS
            if lease.front == front and is_old and lease_id not in claimed:
                await self.release(lease_id)

    async def _sweep(self) -> None:
        """Remove processes that stopped reporting, with their leases; exit after a long time without fronts."""
        while True:
            await asyncio.sleep(REPORT_SECONDS)
            now = time.monotonic()
            for name, process in list(self._processes.items()):
                if now - process.reported > _LOST_SECONDS:
                    del self._processes[name]
            for lease_id, lease in list(self._leases.items()):
                if lease.front not in self._processes:
                    await self.release(lease_id)
            if any(process.kind == "front" for process in self._processes.values()):
                self._idle_since = now
            elif now - self._idle_since > _IDLE_SECONDS:
                import ray

                ray.kill(ray.get_runtime_context().current_actor)


def _limits(settings: ServeSettings) -> dict[str, Any]:
    return {
        "max_running": settings.max_running * max_replicas(settings),
        "max_waiting": settings.max_waiting,
        "waiting_timeout": settings.waiting_timeout,
        "max_per_key": settings.max_per_key,
    }
