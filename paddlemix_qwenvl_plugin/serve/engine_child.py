"""An engine process as the front holds it: started, talked to, ended."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
from dataclasses import asdict
from typing import Any, Callable, Optional

from paddlemix_qwenvl_plugin.serve.engine_api import ModelSettings
from paddlemix_qwenvl_plugin.serve.messages import Unpacker, pack
from paddlemix_qwenvl_plugin.util.errors import QwenVLError, UsageError

_MODULE = "paddlemix_qwenvl_plugin.serve.engine_process"

# How long a process may take from SIGTERM to its end.
_END_SECONDS = 5.0


class EngineChild(asyncio.Protocol):
    """A running engine process. Use `start`."""

    def __init__(self, on_message: Callable[[dict[str, Any]], None]) -> None:
        self._on_message = on_message
        self._unpacker = Unpacker()
        self._transport: Optional[asyncio.WriteTransport] = None
        self._process: Optional[subprocess.Popen[bytes]] = None
        self._closed = asyncio.Event()
        self._ready = asyncio.Event()
        self._broken: Optional[QwenVLError] = None  # what it says is wrong

    @classmethod
    async def start(
        cls, settings: ModelSettings, on_message: Callable[[dict[str, Any]], None]
    ) -> EngineChild:
        """Start a process; it begins to open the model.

        Args:
            on_message: called with each message of a process that is ready.
        """
        child = cls(on_message)
        ours, theirs = socket.socketpair()
        try:
            with theirs:
                # Not asyncio's: the socket tells when it ends, and nobody else waits for it.
                child._process = subprocess.Popen(
                    [sys.executable, "-m", _MODULE, str(theirs.fileno())],
                    stdin=subprocess.DEVNULL,
                    stdout=2,  # what native code prints
                    pass_fds=[theirs.fileno()],
                    env={**os.environ, **settings.environment},
                    start_new_session=True,  # Ctrl-C in the terminal is for the front
                )
            ours.setblocking(False)
            await asyncio.get_running_loop().create_unix_connection(lambda: child, sock=ours)
        except BaseException:
            ours.close()
            await child.end()
            raise
        opening = asdict(settings)
        del opening["environment"]
        child.send(pack({name: str(v) if isinstance(v, os.PathLike) else v for name, v in opening.items()}))
        return child

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def send(self, message: bytes) -> None:
        """Send a packed message; nothing happens if the process has ended."""
        if self._transport is not None and not self._transport.is_closing():
            self._transport.write(message)

    async def wait_ready(self) -> None:
        """Wait until it takes requests.

        Raises:
            QwenVLError: it ended before; what it said, or how it ended.
        """
        waiting = [asyncio.ensure_future(event.wait()) for event in (self._ready, self._closed)]
        try:
            await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for each in waiting:
                each.cancel()
        if not self._ready.is_set():
            raise await self.wait_ended()

    async def wait_closed(self) -> None:
        """Wait until it is there no more, or does not listen."""
        await self._closed.wait()

    async def wait_ended(self) -> QwenVLError:
        """Wait for its end; why it ended, in one line."""
        assert self._process is not None
        await self.wait_closed()
        await self.end()
        code = self._process.returncode
        if self._broken is not None:
            return self._broken
        return QwenVLError(f"the engine process {_how(code)}")

    async def end(self) -> None:
        """End it, by force if need be."""
        if self._transport is not None:
            self._transport.close()
        process = self._process
        if process is None:
            return
        process.terminate()
        try:
            await asyncio.get_running_loop().run_in_executor(None, process.wait, _END_SECONDS)
        except subprocess.TimeoutExpired:  # in the middle of a long step
            pass
        finally:
            process.kill()
            process.wait()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.WriteTransport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        for header, _ in self._unpacker.feed(data):
            if header["kind"] == "ready":
                self._ready.set()
            elif header["kind"] == "broken":
                kind = UsageError if header["exit_code"] == UsageError.exit_code else QwenVLError
                self._broken = kind(header["line"])
            else:
                self._on_message(header)

    def connection_lost(self, error: Optional[Exception]) -> None:
        self._closed.set()


def _how(code: Optional[int]) -> str:
    """How a process ended."""
    if code is None or code >= 0:
        return f"ended with exit code {code}"
    if -code == signal.SIGKILL:
        return "was killed (SIGKILL), as the system does when memory runs out"
    with contextlib.suppress(ValueError):
        return f"was ended by {signal.Signals(-code).name}"
    return f"was ended by signal {-code}"
