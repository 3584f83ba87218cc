"""Engine client of the front, or of an engine replica on a Ray cluster.

It supervises the engine process and routes its tokens to requests.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from typing import Any, Optional

from paddlemix_qwenvl_plugin.serve.engine_api import (
    Ended,
    EngineRequest,
    EngineStats,
    EngineUnavailable,
    ModelSettings,
)
from paddlemix_qwenvl_plugin.serve.engine_child import EngineChild
from paddlemix_qwenvl_plugin.serve.messages import decode_tokens, pack, pack_request
from paddlemix_qwenvl_plugin.serve.token_stream import ReceivedTokens
from paddlemix_qwenvl_plugin.util.errors import QwenVLError

_LOG = logging.getLogger(__name__)

# Pauses between attempts to restart the process; doubled after each failure.
_FIRST_PAUSE_SECONDS = 0.5
_LONGEST_PAUSE_SECONDS = 30.0


class ProcessEngineClient:
    """EngineClient whose engine process is a child of this process and is restarted whenever it ends."""

    def __init__(self, settings: ModelSettings) -> None:
        self.ready = False
        self.restarts = 0
        self.stats = EngineStats()
        self._settings = settings
        self._child: Optional[EngineChild] = None
        self._unavailable_reason = "the engine has not been started"  # valid while not ready
        self._streams: dict[int, ReceivedTokens] = {}
        self._n_requests = 0
        self._supervisor: Optional[asyncio.Task[None]] = None

    @property
    def pid(self) -> Optional[int]:
        """Process id of the engine process; None while none runs."""
        return None if self._child is None else self._child.pid

    async def start(self) -> None:
        """Start the engine process and wait until it is ready; then, until `stop`, restart it whenever it ends.

        Errors as for `EngineClient.start`.
        """
        await self._open()
        self._supervisor = asyncio.create_task(self._supervise())

    async def stop(self) -> None:
        """End the engine process and its requests; the process has exited when this returns."""
        if self._supervisor is not None:
            self._supervisor.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._supervisor
            self._supervisor = None
            if self._child is not None:  # the supervisor was cancelled before it began to run
                await self._child.end()
                self._child = None
        elif self._child is not None:  # `start` still waits for the process, and raises once it has ended
            await self._child.end()
        self._fail_all("the server is ending")

    def submit(self, request: EngineRequest) -> ReceivedTokens:
        """Submit a request to the engine process; raise EngineUnavailable if the process is not ready."""
        if not self.ready or self._child is None:
            raise EngineUnavailable(self._unavailable_reason)
        child, number = self._child, self._n_requests
        self._n_requests += 1
        stream = ReceivedTokens(lambda: child.send(pack({"kind": "cancel", "number": number})))
        child.send(pack_request(number, request))
        self._streams[number] = stream
        return stream

    async def _open(self) -> None:
        """Start a process and wait until it is ready; end it on failure."""
        self._child = child = await EngineChild.start(self._settings, self._dispatch)
        try:
            await child.wait_ready()
        except BaseException:
            self._child = None
            await child.end()
            raise
        self.ready = True

    async def _supervise(self) -> None:
        """Restart the process whenever it ends; end it when this task is cancelled."""
        while True:
            child = self._child
            assert child is not None
            try:
                await child.wait_closed()
                self.ready, self._unavailable_reason = False, "the engine process has ended"
                reason = str(await child.wait_ended())
            finally:
                self._child = None
                await child.end()
            _LOG.error("%s; starting a new one", reason)
            self._fail_all(f"{reason}; a new one is being started, try again in a few seconds")
            self.restarts += 1
            await self._restart()

    async def _restart(self) -> None:
        start, pause = time.monotonic(), _FIRST_PAUSE_SECONDS
        while True:
            try:
                await self._open()
            except (QwenVLError, OSError) as error:
                _LOG.error("the engine process cannot be started again: %s; next try in %g s", error, pause)
                self._unavailable_reason = f"the engine cannot be started again: {error}"
                await asyncio.sleep(pause)
                pause = min(2 * pause, _LONGEST_PAUSE_SECONDS)
            else:
                _LOG.info("the engine process is ready again after %.1f s", time.monotonic() - start)
                return

    def _fail_all(self, reason: str) -> None:
        """Fail all requests, because the process has ended or `stop` was called."""
        self.ready, self._unavailable_reason = False, reason
        self.stats = EngineStats()
        streams, self._streams = self._streams, {}
        for stream in streams.values():
            stream.fail(EngineUnavailable(reason))

    def _dispatch(self, message: dict[str, Any]) -> None:
        """Handle a message: store its statistics, or pass its tokens, ends and failures to their streams."""
        if message.pop("kind") == "statistics":
            self.stats = EngineStats(**message)
            return
        for number, tokens, n_cached in message["tokens"]:
            self._streams[number].add(decode_tokens(tokens), n_cached)
        for number, reason, n_cached in message["ended"]:
            self._streams.pop(number).end(Ended(reason, n_cached))
        for number, line in message["failed"]:
            self._streams.pop(number).fail(QwenVLError(line))
