"""Front replica on Ray Serve: the HTTP application of `qwenvl serve`."""

from __future__ import annotations

from typing import Any, Optional

from prometheus_client.core import Metric
from ray import serve
from ray.exceptions import RayError
from ray.serve.handle import DeploymentHandle
from starlette.applications import Starlette
from starlette.types import Message, Receive, Scope, Send

from paddlemix_qwenvl_plugin.cluster.serve.cluster_admission import ClusterAdmission, queue_unavailable
from paddlemix_qwenvl_plugin.cluster.serve.cluster_metrics import render
from paddlemix_qwenvl_plugin.cluster.serve.engine_handle import HandleEngineClient
from paddlemix_qwenvl_plugin.cluster.serve.membership import Member, Report
from paddlemix_qwenvl_plugin.serve.api_keys import ApiKeys
from paddlemix_qwenvl_plugin.serve.app import create_app
from paddlemix_qwenvl_plugin.serve.json_log import LOGGER, start_logging
from paddlemix_qwenvl_plugin.serve.metrics import Metrics
from paddlemix_qwenvl_plugin.serve.opening import open_service
from paddlemix_qwenvl_plugin.serve.settings import ServeSettings


class _App(Starlette):
    """ASGI application that forwards to this process's front: Ray Serve requires an application before a front exists.

    A subclass of Starlette because Ray before 2.56 reads Starlette's attributes. The routes and error handlers are
    those of the front's application.
    """

    front: Optional[Front] = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        assert _App.front is not None
        if scope["type"] == "lifespan":
            await self._lifespan(_App.front, receive, send)
            return

        async def send_without_id(message: Message) -> None:
            if message["type"] == "http.response.start":  # Ray's proxy adds the header as well
                headers = [(name, value) for name, value in message["headers"] if name != b"x-request-id"]
                message = {**message, "headers": headers}
            await send(message)

        await _App.front.asgi(scope, receive, send_without_id)

    async def _lifespan(self, front: Front, receive: Receive, send: Send) -> None:
        """Let the front join the cluster at startup, before Ray sends requests, and close the front at shutdown."""
        await receive()
        await front.join()
        await send({"type": "lifespan.startup.complete"})
        await receive()
        await front.close()
        await send({"type": "lifespan.shutdown.complete"})


class Front:
    """Ray Serve replica that answers HTTP requests with the engine replicas.

    Attributes:
        asgi: the application; not named `app`, an attribute of Ray Serve's ingress.
    """

    def __init__(
        self, settings: ServeSettings, keys: Optional[ApiKeys], engine: DeploymentHandle[Any]
    ) -> None:
        """Open the configuration and tokenizer, and create the application; `join` connects it to the cluster.

        Not a coroutine: Ray before 2.55 does not await the `__init__` of an ingress.

        Args:
            keys: API keys; None: requests need no key.
        """
        start_logging(settings.log_level)
        self._settings = settings
        metrics = Metrics()
        self._admission = ClusterAdmission(metrics.queued)
        self._engine = HandleEngineClient(engine)
        self._service = open_service(settings, LOGGER.info, self._engine, self._admission, metrics)
        # The token after an image's slots, `</img>`, follows `<img>` in the vocabulary.
        self._engine.image_end = self._service.config.visual.image_start_id + 1
        self._service.cluster_metrics = self._render_metrics
        self.asgi: Any = create_app(self._service, keys=keys)
        _App.front = self

    async def join(self) -> None:
        """Configure the cluster's coordinator with this front's settings, and begin periodic reports to it."""
        name = serve.get_replica_context().replica_id.unique_id
        self._member = Member(name, "front", self._settings, self._state, self._apply_totals)
        self._admission.join(self._member)
        await self._member.coordinator.configure.remote(self._settings)
        await self._member.report()
        self._member.start()

    async def close(self) -> None:
        """End the image processes."""
        await self._service.images.close()

    def _state(self) -> Report:
        metrics: list[Metric] = list(self._service.metrics.registry.collect())
        return Report(ready=True, metrics=metrics, leases=self._admission.leases)

    async def _apply_totals(self) -> None:
        """Apply the reported cluster state to the engine client and the service."""
        totals = self._member.totals
        self._engine.ready = totals.engines > 0
        self._service.draining = totals.draining
        if totals.ending:
            await self._engine.stop()

    async def _render_metrics(self, accept: str) -> tuple[bytes, str]:
        try:
            await self._member.report()  # otherwise this front's own metrics are up to a second old
            processes, totals = await self._member.coordinator.metrics.remote()
        except RayError as error:  # Ray restarts the coordinator
            raise queue_unavailable() from error
        return render(processes, totals, accept)


def ingress() -> Any:
    """Create the class of the deployment Front: a Front behind Ray Serve's ingress."""
    return serve.ingress(_App())(Front)
