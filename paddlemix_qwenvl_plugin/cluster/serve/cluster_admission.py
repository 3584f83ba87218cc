"""Admission of a front's requests to the coordinator's cluster-wide queue."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import time
from collections.abc import AsyncIterator, Callable
from typing import Any, Optional

import ray

from paddlemix_qwenvl_plugin.cluster.serve.coordinator import Leases
from paddlemix_qwenvl_plugin.cluster.serve.membership import Member
from paddlemix_qwenvl_plugin.serve.errors import ApiError

# Retries while Ray restarts the coordinator: total time, and interval.
_RESTART_SECONDS = 30.0
_PAUSE_SECONDS = 0.2


class ClusterAdmission:
    """The Admission (serve/service.py) on a cluster: slots are from the coordinator's queue, which all fronts share."""

    def __init__(self, observe_wait: Callable[[float], None]) -> None:
        """Create the admission; `join` connects it.

        Args:
            observe_wait: called with the waiting time in seconds of each admitted request.
        """
        self._observe_wait = observe_wait
        self._member: Any = None
        self._numbers = itertools.count()
        self._leases: dict[str, tuple[int, Optional[str]]] = {}

    def join(self, member: Member) -> None:
        """Set the Member whose coordinator grants slots; to be called before the first request."""
        self._member = member

    @property
    def leases(self) -> Leases:
        """Leases that requests of this front hold."""
        return dict(self._leases)

    @property
    def running(self) -> int:
        """Number of slots in use in the cluster, as of the last report."""
        return int(self._member.totals.running)

    @property
    def waiting(self) -> int:
        """Number of requests waiting for slots in the cluster, as of the last report."""
        return int(self._member.totals.waiting)

    @contextlib.asynccontextmanager
    async def slots(self, n: int, key: Optional[str]) -> AsyncIterator[None]:
        """Acquire n slots of the cluster's queue for the block; `key`: short hash of the request's API key, or None.

        Raises:
            ApiError: the queue refuses the request or does not answer.
        """
        lease = f"{self._member.name}-{next(self._numbers)}"
        begin = time.monotonic()
        try:
            refusal = await self._acquire(lease, n, key)
            if refusal is not None:
                raise ApiError(**refusal)
            self._leases[lease] = n, key
            self._observe_wait(time.monotonic() - begin)
            yield
        finally:
            self._leases.pop(lease, None)
            self._member.coordinator.release.remote(lease)

    def close(self) -> None:
        """Do nothing; not called on a cluster, where `qwenvl serve --ray` drains the coordinator's queue at its end."""

    def refuse_waiting(self) -> None:
        """Do nothing; not called on a cluster, where `qwenvl serve --ray` calls Coordinator.end after draining."""

    async def _acquire(self, lease: str, n: int, key: Optional[str]) -> Optional[dict[str, Any]]:
        """Acquire the slots; return None or the arguments of an ApiError. A retry does not take them twice."""
        failing_since: Optional[float] = None
        while True:
            try:
                refusal: Optional[dict[str, Any]] = await self._member.coordinator.acquire.remote(
                    self._member.name, lease, n, key
                )
                return refusal
            except ray.exceptions.RayError as error:
                now = time.monotonic()
                failing_since = failing_since or now
                if now - failing_since > _RESTART_SECONDS:
                    raise queue_unavailable() from error
                await asyncio.sleep(_PAUSE_SECONDS)


def queue_unavailable() -> ApiError:
    """Create the error of a request for which the coordinator does not answer."""
    return ApiError(
        503,
        "The cluster's queue does not answer; try again later",
        "server_error",
        code="queue_unavailable",
        headers={"Retry-After": "1"},
    )
