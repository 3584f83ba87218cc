"""Ray Serve application of `qwenvl serve --ray`: the deployments Front and Engine, with autoscaling."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Optional

from ray import serve
from ray.serve.config import AutoscalingConfig, RequestRouterConfig

from paddlemix_qwenvl_plugin.cluster.serve.engine import Engine
from paddlemix_qwenvl_plugin.cluster.serve.front import ingress
from paddlemix_qwenvl_plugin.cluster.serve.replicas import (
    front_cpus,
    front_requests,
    max_fronts,
    max_replicas,
    replica_gpus,
)
from paddlemix_qwenvl_plugin.cluster.serve.routing import PrefixRouter
from paddlemix_qwenvl_plugin.serve.api_keys import read_api_keys
from paddlemix_qwenvl_plugin.serve.settings import ServeSettings
from paddlemix_qwenvl_plugin.serve.start import check_model

NAME = "qwenvl"
"""Name of the Ray Serve application."""

# Autoscaling target: share of an engine's slots that are in use on average.
_TARGET_SHARE = 0.8
# Concurrent requests of a front outside the queue: health checks, metrics, requests to be refused.
_SPARE_REQUESTS = 1000
_HEALTH_SECONDS = 5.0


def build(arguments: dict[str, Any]) -> serve.Application:
    """Build the application from settings: the `import_path` of Ray Serve's config file or KubeRay's RayService.

    `arguments` are the `args` there, settings by name.

    Raises:
        ValidationError, UsageError: a setting is wrong.
    """
    return application(ServeSettings(**arguments))


def application(settings: ServeSettings) -> serve.Application:
    """Build the Ray Serve application from validated settings.

    Raises:
        UsageError: the settings name no model or contradict each other, or the API keys cannot be read.
    """
    check_model(settings)
    settings = _with_absolute_paths(settings)
    max_engines = max_replicas(settings)
    router: Any = PrefixRouter  # annotated wrongly in Ray
    engine = serve.deployment(
        name="Engine",
        autoscaling_config=AutoscalingConfig(
            min_replicas=settings.min_replicas,
            max_replicas=max_engines,
            initial_replicas=settings.min_replicas,
            target_ongoing_requests=max(1.0, _TARGET_SHARE * settings.max_running),
        ),
        max_ongoing_requests=settings.max_running,
        request_router_config=RequestRouterConfig(request_router_class=router),
        ray_actor_options={"num_cpus": settings.replica_cpus, "num_gpus": replica_gpus(settings)},
        health_check_period_s=_HEALTH_SECONDS,
        # When a replica is removed, requests that take longer are recomputed on another replica.
        graceful_shutdown_timeout_s=settings.shutdown_timeout,
    )(Engine)
    n_requests = settings.max_running * max_engines + settings.max_waiting
    front = serve.deployment(
        name="Front",
        autoscaling_config=AutoscalingConfig(
            min_replicas=settings.min_fronts,
            max_replicas=max_fronts(settings),
            initial_replicas=settings.min_fronts,
            target_ongoing_requests=front_requests(settings),
        ),
        max_ongoing_requests=n_requests + _SPARE_REQUESTS,
        ray_actor_options={"num_cpus": front_cpus(settings)},
        health_check_period_s=_HEALTH_SECONDS,
        # The maximum time of a request whose body has been received, so that an update of the application ends none.
        graceful_shutdown_timeout_s=settings.waiting_timeout + settings.running_timeout,
    )(ingress())
    bound: serve.Application = front.bind(settings, read_api_keys(settings), engine.bind(settings))
    return bound


def _with_absolute_paths(settings: ServeSettings) -> ServeSettings:
    """Make the paths of the model and its adapters absolute, for processes with other working directories."""
    names = ("first_model_path", "second_model_path", "model_name_or_path")
    paths: dict[str, Optional[Path]] = {name: getattr(settings, name) for name in names}
    adapters = [text.partition("=") for text in settings.adapter]
    return settings.model_copy(
        update={
            **{name: path.absolute() for name, path in paths.items() if path is not None},
            "adapter": [f"{name}={Path(folder).absolute()}" for name, _, folder in adapters],
        }
    )
