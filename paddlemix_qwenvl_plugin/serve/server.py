"""The life of a server: it loads, answers, and ends with what it has begun."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Optional

import uvicorn
from fastapi import FastAPI

from paddlemix_qwenvl_plugin.serve.connection import Connection
from paddlemix_qwenvl_plugin.serve.json_log import log
from paddlemix_qwenvl_plugin.serve.listening import BACKLOG, Listener, accept_queued
from paddlemix_qwenvl_plugin.serve.reuse_port import give_to_all, give_to_the_newer
from paddlemix_qwenvl_plugin.serve.service import Service

# Longer than clients keep a connection (httpx: 5 s), so that they are the ones to close it: one that is closed while a
# request is on its way loses the request.
_KEEP_ALIVE_SECONDS = 15
# For handlers to send their error events, and for the processes of the service to end.
_LAST_SECONDS = 10.0
_CLEANING_SECONDS = 1.0
# How long connections that are on their way may take to be there.
_HANDSHAKE_SECONDS = 1.0
_TICK_SECONDS = 0.05


async def run(
    service: Service,
    app: FastAPI,
    listener: Listener,
    signals: Sequence[int],
    ready: Callable[[], None],
) -> Optional[int]:
    """Serve until a signal comes, and end in order.

    Args:
        listener: a bound socket. With `reuse_port` it begins to listen when the engine is ready; connections to one
            of systemd's wait in it until then.
        signals: those that end the server. The first lets requests finish, the second does not.
        ready: called when the engine is ready for the first time.

    Returns:
        The second signal; None: there was one only, and all is in order.

    Raises:
        QwenVLError: the engine cannot be started.
    """
    server = Server(service, app, listener)
    with _handling(signals, server):
        loading = asyncio.create_task(service.engine.start())
        try:
            if service.settings.reuse_port or listener.inherited:
                await server.first_of(loading)
                if server.should_exit or loading.exception() is not None:
                    return await _result(loading, server)
            if service.settings.reuse_port and not listener.inherited:
                listener.socket.listen(BACKLOG)
                give_to_all(listener.socket)
            serving = asyncio.create_task(server.serve(sockets=[listener.socket]))
            await server.first_of(loading)
            if loading.done() and loading.exception() is not None:
                server.should_exit = True
            elif loading.done():
                ready()
            await serving
            return await _result(loading, server)
        finally:
            loading.cancel()
            await asyncio.wait([loading])
            await _bounded(service.engine.stop(), "the engine does not end")
            await _bounded(service.images.close(), "the image processes do not end")


async def _result(loading: asyncio.Task[None], server: Server) -> Optional[int]:
    if loading.done():
        await loading
    return server.second_signal


class Server(uvicorn.Server):
    """uvicorn's server, which ends in its own way; signals are `run`'s affair."""

    def __init__(self, service: Service, app: FastAPI, listener: Listener) -> None:
        settings = service.settings
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
        self._ending = asyncio.Event()

    def end(self, number: int) -> None:
        """Take a signal."""
        if not self.should_exit:
            log(logging.INFO, "ending", signal=signal.Signals(number).name)
            self.should_exit = True
            self._ending.set()
        elif self.second_signal is None:
            self.second_signal = number
            self.force_exit = True
            # Nothing keeps a person waiting who says it twice. The engine process ends with this one.
            asyncio.get_running_loop().call_later(_LAST_SECONDS, os._exit, 128 + number)

    async def first_of(self, task: asyncio.Task[Any]) -> None:
        """Wait for a task, or for the first signal."""
        ending = asyncio.create_task(self._ending.wait())
        await asyncio.wait([task, ending], return_when=asyncio.FIRST_COMPLETED)
        ending.cancel()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:  # type: ignore[override]
        """Leave signals alone."""
        yield

    async def shutdown(self, sockets: Optional[list[socket.socket]] = None) -> None:
        """Finish what has begun, within `shutdown_timeout`; then end it with errors."""
        settings = self._service.settings
        deadline = time.monotonic() + settings.shutdown_timeout
        self._service.draining = True
        if settings.reuse_port:
            give_to_the_newer(self._listener.socket)
            await self._wait(lambda: True, min(deadline, time.monotonic() + _HANDSHAKE_SECONDS))
        await self._stop_listening()
        # Where another server takes over, connections that this one has may bring one more request each: a client that
        # was refused would be the one that noticed.
        if not settings.reuse_port and not self._listener.inherited:
            self._service.admission.close()
            for connection in list(self.server_state.connections):
                connection.shutdown()
        await self._wait(lambda: self.server_state.connections or self.server_state.tasks, deadline)
        if self.server_state.tasks:
            log(logging.WARNING, "requests are ended", requests=len(self.server_state.tasks))
        self._service.admission.refuse_waiting()
        await _bounded(self._service.engine.stop(), "the engine does not end")
        await self._wait(lambda: self.server_state.tasks, time.monotonic() + _LAST_SECONDS)
        # What goes on even so sees that its client has gone, and gets a moment to clean up.
        for connection in list(self.server_state.connections):
            connection.transport.abort()
        if self.server_state.tasks:
            await asyncio.wait(self.server_state.tasks, timeout=_CLEANING_SECONDS)
        for task in list(self.server_state.tasks):
            task.cancel()

    async def _stop_listening(self) -> None:
        """Take the connections that wait to be taken, and none after these."""
        queued = [] if self._listener.inherited else accept_queued(self._listener.socket)
        for server in self.servers:
            server.close()
        self._listener.socket.close()
        loop = asyncio.get_running_loop()
        for connection in queued:
            await loop.connect_accepted_socket(self._protocol, connection)

    def _protocol(self) -> Connection:
        protocol: Any = self.config.http_protocol_class
        made: Connection = protocol(self.config, self.server_state, self.lifespan.state)
        return made

    async def _wait(self, busy: Callable[[], Any], deadline: float) -> None:
        while busy() and not self.force_exit and time.monotonic() < deadline:
            await asyncio.sleep(_TICK_SECONDS)


@contextlib.contextmanager
def _handling(numbers: Sequence[int], server: Server) -> Iterator[None]:
    """Within the block these signals end the server."""
    loop = asyncio.get_running_loop()
    # Not loop.add_signal_handler, which Windows has not.
    before = {
        number: signal.signal(number, lambda n, _: loop.call_soon_threadsafe(server.end, n))
        for number in numbers
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


async def _bounded(task: Any, problem: str) -> None:
    """Await the end of something, for a while."""
    try:
        await asyncio.wait_for(task, _LAST_SECONDS)
    except asyncio.TimeoutError:
        log(logging.ERROR, problem)
