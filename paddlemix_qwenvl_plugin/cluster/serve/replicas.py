"""Number and resources of the replicas, from the settings."""

from __future__ import annotations

import math

from paddlemix_qwenvl_plugin.serve.settings import ServeSettings
from paddlemix_qwenvl_plugin.util.errors import UsageError

# For 64 requests, an engine on a GPU generates 2,890 tokens per second, and a front of one CPU sends 1,340
# (docs/scaling.md): rounded up, three fronts per engine on a GPU. An engine on CPUs generates far fewer tokens.
_REQUESTS = 64
_GPU_FRONTS = 3


def max_replicas(settings: ServeSettings) -> int:
    """Return the maximum number of engine replicas.

    Raises:
        UsageError: it is less than the minimum.
    """
    maximum = settings.max_replicas or settings.min_replicas
    if maximum < settings.min_replicas:
        raise UsageError(
            f"--max_replicas {maximum}: less than --min_replicas, {settings.min_replicas}; raise it"
        )
    return maximum


def replica_gpus(settings: ServeSettings) -> float:
    """Return the number of GPUs per engine replica."""
    if settings.replica_gpus is not None:
        return settings.replica_gpus
    return 1.0 if _on_gpu(settings) else 0.0


def front_cpus(settings: ServeSettings) -> float:
    """CPUs that a front reserves."""
    return 1.0 if _on_gpu(settings) else 0.25


def front_requests(settings: ServeSettings) -> float:
    """Concurrent requests per front above which Ray Serve starts another front."""
    return _REQUESTS / _GPU_FRONTS if _on_gpu(settings) else _REQUESTS


def max_fronts(settings: ServeSettings) -> int:
    """Maximum number of fronts: enough for requests in all slots of all engines."""
    n_slots = settings.max_running * max_replicas(settings)
    return max(settings.min_fronts, math.ceil(n_slots / front_requests(settings)))


def needs(settings: ServeSettings) -> str:
    """Describe the free resources that the cluster must have, such as "4 CPUs and 1 GPUs"."""
    n = settings.min_replicas
    cpus = n * settings.replica_cpus + settings.min_fronts * front_cpus(settings)
    gpus = n * replica_gpus(settings)
    return f"{cpus:g} CPUs" + (f" and {gpus:g} GPUs" if gpus else "")


def _on_gpu(settings: ServeSettings) -> bool:
    return settings.device.startswith("gpu")
