"""Engine process as a child of the front, or of an engine replica on a Ray cluster: start, messages, shutdown."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
from dataclasses import asdict
from typing import Any, Callable, Optional, cast

from paddlemix_qwenvl_plugin.serve.engine_api import ModelSettings
from paddlemix_qwenvl_plugin.serve.messages import Unpacker, pack
from paddlemix_qwenvl_plugin.util.errors import QwenVLError, UsageError

_MODULE = "paddlemix_qwenvl_plugin.serve.engine_process"

# Timeout from SIGTERM to the process's exit; then SIGKILL.
_END_SECONDS = 5.0


class EngineChild(asyncio.Protocol):
    """A running engine process; create with `start`."""

    def __init__(self, on_message: Callable[[dict[str, Any]], None]) -> None:
        self._on_message = on_message
        self._unpacker = Unpacker()
        self._transport: Optional[asyncio.WriteTransport] = None
        self._process: Optional[subprocess.Popen[bytes]] = None
        self._closed = asyncio.Event()
        self._ready = asyncio.Event()
        self._error: Optional[QwenVLError] = None  # the error that the process reported before it ended

    @classmethod
    async def start(
        cls, settings: ModelSettings, on_message: Callable[[dict[str, Any]], None]
    ) -> EngineChild:
        """Start a process, which begins to open the model.

        Args:
            on_message: called with each message except "ready" and "broken", which this class handles.

        Raises:
            OSError: the process cannot be started.
        """
        child = cls(on_message)
        front_socket, child_socket = socket.socketpair()
        try:
            with child_socket:
                # asyncio's subprocess is not needed: the closed socket signals the exit, and `end` waits in a thread.
                child._process = subprocess.Popen(
                    [sys.executable, "-m", _MODULE, str(child_socket.fileno())],
                    stdin=subprocess.DEVNULL,
                    stdout=2,  # to stderr: native code may print, and the server's stdout must stay clean
                    pass_fds=[child_socket.fileno()],
                    env={**os.environ, **settings.environment},
                    start_new_session=True,  # Ctrl-C in the terminal is for the front
                )
            front_socket.setblocking(False)
            await asyncio.get_running_loop().create_unix_connection(lambda: child, sock=front_socket)
        except BaseException:
            front_socket.close()
            await child.end()
            raise
        fields = asdict(settings)
        del fields["environment"]
        message = {
            name: str(value) if isinstance(value, os.PathLike) else value for name, value in fields.items()
        }
        child.send(pack(message))
        return child

    @property
    def pid(self) -> int:
        """Process id."""
        assert self._process is not None
        return self._process.pid

    def send(self, message: bytes) -> None:
        """Send a packed message; no effect if the process has ended."""
        if self._transport is not None and not self._transport.is_closing():
            self._transport.write(message)

    async def wait_ready(self) -> None:
        """Wait until the process accepts requests.

        Raises:
            QwenVLError: the process ended before it was ready; the message is its error message or its exit status.
        """
        waiters = [asyncio.ensure_future(event.wait()) for event in (self._ready, self._closed)]
        try:
            await asyncio.wait(waiters, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for waiter in waiters:
                waiter.cancel()
        if not self._ready.is_set():
            raise await self.wait_ended()

    async def wait_closed(self) -> None:
        """Wait until the process has exited or closed its socket."""
        await self._closed.wait()

    async def wait_ended(self) -> QwenVLError:
        """Wait for the exit or a closed socket, end the process and return the reason as a one-line error."""
        assert self._process is not None
        await self.wait_closed()
        await self.end()
        code = self._process.returncode
        if self._error is not None:
            return self._error
        return QwenVLError(f"the engine process {_exit_text(code)}")

    async def end(self) -> None:
        """End the process: SIGTERM, then SIGKILL if it still runs after a timeout."""
        if self._transport is not None:
            self._transport.close()
        process = self._process
        if process is None:
            return
        process.terminate()
        try:
            await asyncio.get_running_loop().run_in_executor(None, process.wait, _END_SECONDS)
        except subprocess.TimeoutExpired:  # the process is computing a long step
            pass
        finally:
            process.kill()
            process.wait()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the transport for `send`."""
        self._transport = cast(asyncio.WriteTransport, transport)  # uvloop's transport is no subclass of it

    def data_received(self, data: bytes) -> None:
        """Handle "ready" and "broken"; pass other messages on."""
        for header, _ in self._unpacker.feed(data):
            if header["kind"] == "ready":
                self._ready.set()
            elif header["kind"] == "broken":
                error_type = UsageError if header["exit_code"] == UsageError.exit_code else QwenVLError
                self._error = error_type(header["line"])
            else:
                self._on_message(header)

    def connection_lost(self, error: Optional[Exception]) -> None:
        """Mark the process as closed."""
        self._closed.set()


def _exit_text(code: Optional[int]) -> str:
    """Describe an exit code of subprocess.Popen; -N: the process was ended by signal N."""
    if code is None or code >= 0:
        return f"ended with exit code {code}"
    if -code == signal.SIGKILL:
        return "was killed (SIGKILL), as the system does when memory runs out"
    with contextlib.suppress(ValueError):
        return f"was ended by {signal.Signals(-code).name}"
    return f"was ended by signal {-code}"
