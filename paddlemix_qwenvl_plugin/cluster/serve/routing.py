"""Prefix-aware routing: requests with the same prefix go to one replica, which caches it, unless it is overloaded."""

from __future__ import annotations

import hashlib
from typing import Optional

from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica

# A replica is overloaded if its queue has more requests than the shortest queue of all replicas plus this number.
_SLACK = 4


class PrefixRouter(RequestRouter):  # type: ignore[misc]  # untyped for mypy
    """Request router that ranks the replicas of each prefix by rendezvous hashing.

    All fronts compute the same ranking without shared state. Adding or removing a replica moves only the prefixes that
    rank this replica first. A first attempt goes to the first replica of its ranking that is not overloaded.

    The call's keyword arguments are `prefix`, a digest, and `attempt`, the number of earlier attempts. Each retry
    starts one rank later, whatever the load: a failed replica may have the shortest queue.
    """

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: Optional[PendingRequest] = None
    ) -> list[list[RunningReplica]]:
        """Rank the replicas of a request; Ray takes the first that accepts it."""
        arguments = {} if pending_request is None else pending_request.kwargs
        prefix, attempt = arguments.get("prefix", ""), arguments.get("attempt", 0)
        ranking = sorted(candidate_replicas, key=lambda replica: _weight(prefix, replica))
        if not ranking:
            return []
        first_rank = attempt % len(ranking)
        ranking = ranking[first_rank:] + ranking[:first_rank]
        if attempt == 0:
            max_queued = min(map(self._queued, ranking)) + _SLACK
            # A stable sort: overloaded replicas last.
            ranking.sort(key=lambda replica: self._queued(replica) > max_queued)
        return [[replica] for replica in ranking]

    def _queued(self, replica: RunningReplica) -> int:
        """Return the queue length of a replica, as cached in this front; 0 if unknown."""
        return self.replica_queue_len_cache.get(replica.replica_id) or 0


def _weight(prefix: str, replica: RunningReplica) -> bytes:
    return hashlib.blake2b(f"{prefix} {replica.replica_id.unique_id}".encode(), digest_size=8).digest()
