"""`qwenvl serve --ray`: deploy the application, wait for a signal, remove the application."""

from __future__ import annotations

import contextlib
import logging
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import version
from typing import Any, Optional
from uuid import uuid4

from packaging.version import Version

from paddlemix_qwenvl_plugin.cluster.connect import connect
from paddlemix_qwenvl_plugin.cluster.serve.replicas import max_replicas, needs
from paddlemix_qwenvl_plugin.serve.api_keys import check_exposure, read_api_keys
from paddlemix_qwenvl_plugin.serve.settings import ServeSettings
from paddlemix_qwenvl_plugin.serve.start import check_model
from paddlemix_qwenvl_plugin.util.errors import QwenVLError, UsageError, first_line

_OLDEST_RAY = Version("2.50")
# Older versions of Ray use an attribute of protobuf that protobuf 7 no longer has.
_OLDEST_RAY_WITH_PROTOBUF_7 = Version("2.57")
_POLL_SECONDS = 0.5
_KEEP_ALIVE_SECONDS = 15  # longer than clients keep an idle connection (serve/server.py)
# Maximum wait for the HTTP proxies: one on the head node, and one on each machine with a replica.
_PROXY_SECONDS = 60.0


class _Signal(BaseException):
    """Raised in the main thread when a signal arrives."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


def check_version() -> None:
    """Raise UsageError if Ray is too old, or does not work with the installed protobuf: Ray Serve would not start."""
    found, protobuf = Version(version("ray")), Version(version("protobuf"))
    if found < _OLDEST_RAY:
        raise UsageError(
            f"--ray: qwenvl serve needs Ray {_OLDEST_RAY} or newer, and this is {found}; pip install -U 'ray[serve]'"
        )
    if found < _OLDEST_RAY_WITH_PROTOBUF_7 and protobuf.major >= 7:
        raise UsageError(
            f"--ray: Ray Serve {found} does not work with protobuf {protobuf}; "
            f"pip install 'protobuf<7', or Ray {_OLDEST_RAY_WITH_PROTOBUF_7} or newer"
        )


def start_on(
    address: str, settings: ServeSettings, signals: Sequence[int], print_line: Callable[[str], None]
) -> Optional[int]:
    """Serve on a Ray cluster until a signal ends it, or until another `qwenvl serve --ray` updates the application.

    Args:
        address: address of the cluster; see `connect`.
        signals: signals that end the server.
        print_line: prints a line for the user.

    Returns:
        The signal that interrupted the command: one before the deployment began, or one after the signal that ends the
        server; else None.

    Raises:
        UsageError: wrong settings or a wrong address, or Ray is not installed, too old, or incompatible with the
            installed protobuf.
        QwenVLError: no cluster answers, the application does not start or is removed, or the cluster ends.
    """
    _check(settings)
    with _raise_on_signals(signals):
        try:
            with connect(address):
                check_version()
                try:
                    _serve(settings, print_line)
                except _Signal:
                    _remove(settings)
        except _Signal as last:
            return last.number
    return None


def _check(settings: ServeSettings) -> None:
    """Check the settings before connecting to the cluster."""
    check_model(settings)
    max_replicas(settings)
    if settings.port == 0:
        raise UsageError(
            "--port 0: on a Ray cluster the head node and all machines with a replica listen on the same port; name one"
        )
    read_api_keys(settings)
    check_exposure(settings, settings.host)


def _serve(settings: ServeSettings, print_line: Callable[[str], None]) -> None:
    """Deploy the application, and wait until another command updates it."""
    engines = f"{settings.min_replicas} engine replica{'s' * (settings.min_replicas > 1)}"
    print_line(
        f"Starting {engines} and {settings.min_fronts} fronts, which need {needs(settings)} of the cluster"
    )
    _deploy(settings)
    n_not_ready = _wait_for_proxies()
    if n_not_ready:
        machines = f"{n_not_ready} machine{'s' * (n_not_ready > 1)}"
        print_line(
            f"No server on port {settings.port} of {machines} after {_PROXY_SECONDS:g} s; "
            "check that the port is free there. `serve status` lists the proxies of all machines."
        )
    print_line(f"Serving on {engines} at http://{settings.host}:{settings.port}")
    _watch()
    print_line("Another command has updated the application; this one ends.")


def _deploy(settings: ServeSettings) -> None:
    """Deploy or update the application and wait until it runs.

    Raises:
        QwenVLError: it does not start, and has been deleted; or an update does not start, and the earlier replicas
            that Ray has not stopped yet continue.
    """
    from ray import serve
    from ray.exceptions import RayError
    from ray.serve.config import HTTPOptions

    from paddlemix_qwenvl_plugin.cluster.serve.application import NAME, application

    logging.getLogger("ray.serve").setLevel(logging.ERROR)  # the import of Ray Serve sets the level
    app = application(settings)
    http_options = HTTPOptions(
        host=settings.host, port=settings.port, keep_alive_timeout_s=_KEEP_ALIVE_SECONDS
    )
    is_update = False
    try:
        serve.start(proxy_location="EveryNode", http_options=http_options)
        is_update = NAME in serve.status().applications
        serve.run(app, name=NAME, route_prefix="/")
    except (RuntimeError, RayError) as error:
        message = first_line(error)
        with contextlib.suppress(RayError):  # Serve's controller itself may have failed
            status = serve.status().applications.get(NAME)
            message = _reason(status) if status is not None else message
            if not is_update:
                serve.delete(NAME)
        what = "the application does not start on the cluster"
        if is_update:
            what = "the update does not start; the earlier replicas that still run continue"
        raise QwenVLError(f"{what}: {message}") from error


def _wait_for_proxies() -> int:
    """Wait until all HTTP proxies are ready; return how many are not ready at the timeout.

    Ray Serve restarts a proxy whose start takes too long, for example on a busy machine, and the restart resets the
    connections that the proxy has accepted.
    """
    from ray import serve
    from ray.exceptions import RayError

    deadline = time.monotonic() + _PROXY_SECONDS
    n_not_ready = 0
    while time.monotonic() < deadline:
        with contextlib.suppress(RayError):  # Serve's controller restarts; _watch reports a lost cluster
            statuses = [status.value for status in serve.status().proxies.values()]
            n_not_ready = sum(status in ("STARTING", "UNHEALTHY") for status in statuses)
            if n_not_ready == 0:
                break
        time.sleep(_POLL_SECONDS)
    return n_not_ready


def _watch() -> None:
    """Wait until another command updates the application.

    Raises:
        QwenVLError: the application has been removed, or the cluster has ended.
    """
    import ray
    from ray import serve

    from paddlemix_qwenvl_plugin.cluster.serve.application import NAME
    from paddlemix_qwenvl_plugin.cluster.serve.membership import running_coordinator

    command_id = uuid4().hex
    owner = ""  # "" also after a restart of the coordinator: the loop then sets the id again
    while owner in ("", command_id):
        try:
            coordinator = running_coordinator()
            if coordinator is None or NAME not in serve.status().applications:
                raise QwenVLError("the application has been removed from the cluster")
            if not owner:
                ray.get(coordinator.set_owner.remote(command_id))
            time.sleep(_POLL_SECONDS)
            owner = ray.get(coordinator.owner.remote())
        except ray.exceptions.ActorUnavailableError:  # Ray restarts the coordinator
            time.sleep(_POLL_SECONDS)
        except ray.exceptions.RayError as error:
            raise QwenVLError(f"the cluster no longer answers: {first_line(error)}") from error


def _remove(settings: ServeSettings) -> None:
    """Drain the queue within `shutdown_timeout`, fail the remaining requests, and remove the application."""
    import ray
    from ray import serve

    from paddlemix_qwenvl_plugin.cluster.serve.application import NAME
    from paddlemix_qwenvl_plugin.cluster.serve.membership import running_coordinator

    coordinator = running_coordinator()
    if coordinator is None:
        serve.delete(NAME)
        return
    deadline = time.monotonic() + settings.shutdown_timeout
    with contextlib.suppress(ray.exceptions.RayError):  # without the coordinator nothing can be drained
        while time.monotonic() < deadline:
            totals = ray.get(coordinator.drain.remote())
            if not totals.running and not totals.waiting:
                break
            time.sleep(_POLL_SECONDS)
        ray.get(coordinator.end.remote())
    serve.delete(NAME)
    ray.kill(coordinator)


def _reason(status: Any) -> str:
    """Extract the error message of the application or of a failed deployment."""
    messages = [status.message, *(deployment.message for deployment in status.deployments.values())]
    lines = [line for message in messages for line in message.splitlines() if line.strip()]
    error_lines = [line for line in lines if "Error" in line]
    return str((error_lines or lines or ["see `serve status`"])[-1]).strip()


@contextlib.contextmanager
def _raise_on_signals(numbers: Sequence[int]) -> Iterator[None]:
    """Raise _Signal when one of the signals `numbers` arrives within the block."""

    def handle(number: int, frame: object) -> None:
        raise _Signal(number)

    previous_handlers = {number: signal.signal(number, handle) for number in numbers}
    try:
        yield
    finally:
        for number, handler in previous_handlers.items():
            signal.signal(number, handler)
