"""Server lifecycle: startup, serving, graceful shutdown."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from typing import Any, Optional

import uvicorn
from fastapi import FastAPI

from paddlemix_qwenvl_plugin.serve.connection import Connection
from paddlemix_qwenvl_plugin.serve.json_log import log
from paddlemix_qwenvl_plugin.serve.listening import BACKLOG, Listener, accept_queued
from paddlemix_qwenvl_plugin.serve.reuse_port import direct_to_newer_server, distribute_to_all_servers
from paddlemix_qwenvl_plugin.serve.service import Service

# Longer than clients keep an idle connection (httpx: 5 s), so that the client closes it: if the server closes it, a
# request in transit is lost.
_KEEP_ALIVE_SECONDS = 15
# Timeout of each of these phases of the shutdown: the engine process ends, handlers send their error events, the image
# processes end. Also the time from the second signal to the forced exit.
_STEP_TIMEOUT_SECONDS = 10.0
# Timeout for the cleanup of handlers whose connection was aborted.
_CLEANUP_SECONDS = 1.0
# Time for TCP handshakes in progress to complete.
_HANDSHAKE_SECONDS = 1.0
_POLL_SECONDS = 0.05


async def run(
    service: Service,
    app: FastAPI,
    listener: Listener,
    signals: Sequence[int],
    ready: Callable[[], None],
) -> Optional[int]:
    """Serve until a signal arrives; then shut down gracefully.

    Args:
        listener: a bound socket. With `reuse_port` it begins to listen when the engine is ready. An inherited socket
            listens already, and queues connections until the engine is ready. Any other socket listens already too, and
            its requests are answered while the model is loading, with 503 if they need the engine.
        signals: signals that end the server. At the first signal, admitted requests, running or waiting, may finish;
            the second aborts them.
        ready: called when the engine is ready for the first time.

    Returns:
        The second signal; None if only one arrived.

    Raises:
        QwenVLError, OSError: the engine cannot be started.
    """
    server = Server(service, app, listener)
    with _signal_handlers(signals, server):
        loading = asyncio.create_task(service.engine.start())
        try:
            if service.settings.reuse_port or listener.inherited:
                await server.wait_for_task_or_signal(loading)
                if server.should_exit or loading.exception() is not None:
                    return await _result(loading, server)
            if service.settings.reuse_port and not listener.inherited:
                listener.socket.listen(BACKLOG)
                distribute_to_all_servers(listener.socket)
            serving = asyncio.create_task(server.serve(sockets=[listener.socket]))
            await server.wait_for_task_or_signal(loading)
            if loading.done() and loading.exception() is not None:
                server.should_exit = True
            elif loading.done():
                ready()
            await serving
            return await _result(loading, server)
        finally:
            loading.cancel()
            await asyncio.wait([loading])
            await _with_timeout(service.engine.stop(), "the engine does not end")
            await _with_timeout(service.images.close(), "the image processes do not end")


async def _result(loading: asyncio.Task[None], server: Server) -> Optional[int]:
    """Return the result of `run`: the second signal, if any. Raise the error of the engine's start, if any."""
    if loading.done():
        await loading
    return server.second_signal


class Server(uvicorn.Server):
    """uvicorn server with a graceful shutdown; `run` installs the signal handlers."""

    def __init__(self, service: Service, app: FastAPI, listener: Listener) -> None:
        settings = service.settings
        # A subclass, since uvicorn creates the protocol objects and does not pass the setting.
        protocol = type("Connection", (Connection,), {"send_timeout": settings.send_timeout})
        super().__init__(
            uvicorn.Config(
                app,
                http=protocol,
                loop="asyncio",
                ws="none",
                lifespan="off",
                log_config=None,
                access_log=False,
                proxy_headers=False,
                server_header=False,
                backlog=BACKLOG,
                timeout_keep_alive=_KEEP_ALIVE_SECONDS,
            )
        )
        self.second_signal: Optional[int] = None
        self._service = service
        self._listener = listener
        self._first_signal = asyncio.Event()

    def end(self, number: int) -> None:
        """Handle a signal: the first starts the shutdown, the second limits the remaining time of the shutdown."""
        if not self.should_exit:
            log(logging.INFO, "ending", signal=signal.Signals(number).name)
            self.should_exit = True
            self._first_signal.set()
        elif self.second_signal is None:
            self.second_signal = number
            self.force_exit = True
            # If the shutdown takes longer than this, this process exits. The engine process ends with it.
            asyncio.get_running_loop().call_later(_STEP_TIMEOUT_SECONDS, os._exit, 128 + number)

    async def wait_for_task_or_signal(self, task: asyncio.Task[Any]) -> None:
        """Wait until a task is done or the first signal arrives."""
        signal_task = asyncio.create_task(self._first_signal.wait())
        await asyncio.wait([task, signal_task], return_when=asyncio.FIRST_COMPLETED)
        signal_task.cancel()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:  # type: ignore[override]
        """Override uvicorn's method to install no signal handlers: `run` has installed them."""
        yield

    async def shutdown(self, sockets: Optional[list[socket.socket]] = None) -> None:
        """Let admitted requests finish within `shutdown_timeout`; then end the remaining ones with errors."""
        settings = self._service.settings
        deadline = time.monotonic() + settings.shutdown_timeout
        self._service.draining = True
        if settings.reuse_port:
            direct_to_newer_server(self._listener.socket)
            await self._wait(lambda: True, min(deadline, time.monotonic() + _HANDSHAKE_SECONDS))
        await self._stop_listening()
        # If another server takes over, this server still answers one more request on each open connection: refusing it
        # would make the handover visible to the client.
        if not settings.reuse_port and not self._listener.inherited:
            self._service.admission.close()
            for connection in list(self.server_state.connections):
                connection.shutdown()
        await self._wait(lambda: self.server_state.connections or self.server_state.tasks, deadline)
        if self.server_state.tasks:
            log(logging.WARNING, "requests are ended", requests=len(self.server_state.tasks))
        self._service.admission.refuse_waiting()
        await _with_timeout(self._service.engine.stop(), "the engine does not end")
        await self._wait(lambda: self.server_state.tasks, time.monotonic() + _STEP_TIMEOUT_SECONDS)
        # The remaining handlers see a disconnect and may clean up.
        for connection in list(self.server_state.connections):
            connection.transport.abort()
        if self.server_state.tasks:
            await asyncio.wait(self.server_state.tasks, timeout=_CLEANUP_SECONDS)
        for task in list(self.server_state.tasks):
            task.cancel()

    async def _stop_listening(self) -> None:
        """Close the listening socket, and serve the connections in its queue.

        The queue of an inherited socket remains: systemd keeps the socket open for the next server.
        """
        queued = [] if self._listener.inherited else accept_queued(self._listener.socket)
        for server in self.servers:
            server.close()
        self._listener.socket.close()
        loop = asyncio.get_running_loop()
        for connection in queued:
            await loop.connect_accepted_socket(self._protocol, connection)

    def _protocol(self) -> Connection:
        """Create uvicorn's protocol object for an accepted connection."""
        protocol: Any = self.config.http_protocol_class
        connection: Connection = protocol(self.config, self.server_state, self.lifespan.state)
        return connection

    async def _wait(self, busy: Callable[[], Any], deadline: float) -> None:
        """Wait while `busy` returns a true value; at most until the deadline or the second signal."""
        while busy() and not self.force_exit and time.monotonic() < deadline:
            await asyncio.sleep(_POLL_SECONDS)


@contextlib.contextmanager
def _signal_handlers(numbers: Sequence[int], server: Server) -> Iterator[None]:
    """Let signals end the server within the block."""
    loop = asyncio.get_running_loop()
    # signal.signal, since Windows lacks loop.add_signal_handler.
    previous_handlers = {
        number: signal.signal(number, lambda n, _: loop.call_soon_threadsafe(server.end, n))
        for number in numbers
    }
    try:
        yield
    finally:
        for number, handler in previous_handlers.items():
            signal.signal(number, handler)


async def _with_timeout(awaitable: Awaitable[Any], problem: str) -> None:
    """Await with a timeout of _STEP_TIMEOUT_SECONDS; after the timeout log `problem`."""
    try:
        await asyncio.wait_for(awaitable, _STEP_TIMEOUT_SECONDS)
    except asyncio.TimeoutError:
        log(logging.ERROR, problem)
