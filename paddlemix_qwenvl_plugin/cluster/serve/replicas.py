"""Bounds and resources of the replicas, from the settings."""

from __future__ import annotations

from paddlemix_qwenvl_plugin.serve.settings import ServeSettings
from paddlemix_qwenvl_plugin.util.errors import UsageError

FRONT_CPUS = 0.25
"""CPUs that a front reserves."""


def max_replicas(settings: ServeSettings) -> int:
    """Maximum of engine replicas.

    Raises:
        UsageError: it is less than the minimum.
    """
    most = settings.max_replicas or settings.min_replicas
    if most < settings.min_replicas:
        raise UsageError(
            f"--max_replicas {most}: less than --min_replicas, {settings.min_replicas}; raise it"
        )
    return most


def replica_gpus(settings: ServeSettings) -> float:
    """GPUs of an engine replica."""
    if settings.replica_gpus is not None:
        return settings.replica_gpus
    return 1.0 if settings.device.startswith("gpu") else 0.0


def needs(settings: ServeSettings) -> str:
    """Describe what the cluster must have free."""
    n = settings.min_replicas
    cpus = n * settings.replica_cpus + settings.min_fronts * FRONT_CPUS
    gpus = n * replica_gpus(settings)
    return f"{cpus:g} CPUs" + (f" and {gpus:g} GPUs" if gpus else "")
