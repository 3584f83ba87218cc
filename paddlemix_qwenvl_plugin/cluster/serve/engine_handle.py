"""Engine client of a front: runs requests on engine replicas, and again if a replica fails."""

from __future__ import annotations

import asyncio
import logging
import random
from dataclasses import replace
from typing import Any, Optional

from ray.exceptions import RayError, RayTaskError
from ray.serve.exceptions import RayServeException

from paddlemix_qwenvl_plugin.cluster.serve.prefix import prefix_of
from paddlemix_qwenvl_plugin.serve.engine_api import Ended, EngineRequest, EngineStats, EngineUnavailable
from paddlemix_qwenvl_plugin.serve.token_stream import ReceivedTokens
from paddlemix_qwenvl_plugin.util.errors import QwenVLError

_LOG = logging.getLogger(__name__)

# Seconds before each retry. Few retries, because the request may be what crashes the engines.
_PAUSES = (0.0, 0.5, 2.0)


class HandleEngineClient:
    """EngineClient over the Ray Serve handle of the engine replicas.

    Completions are bit-identical on all replicas with the same instruction set or kind of GPU. If a replica fails, the
    request is recomputed, in one of the first two retries on another replica if one has a free slot (PrefixRouter);
    tokens already sent are not sent again, so that the client sees only a pause.

    Attributes:
        ready: whether an engine replica is ready; set by the front.
        restarts, stats: unused, see EngineClient.
        image_end: id of the token after an image's slots; -1 until the front sets it.
    """

    def __init__(self, handle: Any) -> None:
        """Create a client of an Engine's DeploymentHandle."""
        self.ready = False
        self.restarts = 0
        self.stats = EngineStats()
        self._handle = handle.options(stream=True)
        self.image_end = -1
        self._running: dict[asyncio.Task[None], ReceivedTokens] = {}

    async def start(self) -> None:
        """Do nothing: Ray Serve starts the replicas."""

    async def stop(self) -> None:
        """Fail the running requests."""
        for task, stream in list(self._running.items()):
            stream.fail(EngineUnavailable("the server is ending"))
            task.cancel()

    def submit(self, request: EngineRequest) -> ReceivedTokens:
        """Submit a request to an engine replica.

        The returned stream raises EngineUnavailable if replicas fail in all attempts. An error of the request itself is
        raised without a further attempt.
        """
        if request.options.seed is None:  # a retry must sample the same tokens
            request = replace(request, options=replace(request.options, seed=random.getrandbits(63)))
        stream = ReceivedTokens(lambda: cancel())  # `cancel` needs the task, which needs the stream
        task = asyncio.ensure_future(self._run(request, stream))

        def cancel() -> None:
            task.cancel()

        def remove(task: asyncio.Task[None]) -> None:
            del self._running[task]
            if task.cancelled():  # possibly before a replica was called
                stream.end(Ended("cancelled", stream.n_cached))
                return
            error = task.exception()
            if error is not None:  # none that _run expects; without an end, the reader would wait forever
                _LOG.error("a request ended with an unexpected exception", exc_info=error)
                stream.fail(QwenVLError(f"internal error: {type(error).__name__}"))

        self._running[task] = stream
        task.add_done_callback(remove)
        return stream

    async def _run(self, request: EngineRequest, stream: ReceivedTokens) -> None:
        prefix = await asyncio.to_thread(prefix_of, request, self.image_end)
        n_tokens = 0
        for attempt, pause in enumerate((*_PAUSES, None)):  # None: no retry after the last attempt
            call = self._handle.generate.remote(request, n_tokens, prefix=prefix, attempt=attempt)
            try:
                async for tokens, n_cached, reason in call:
                    n_tokens += len(tokens)
                    if tokens:
                        stream.add(tokens, n_cached)
                    if reason is not None:
                        stream.end(Ended(reason, n_cached))
                        return
                raise EngineUnavailable("the engine replica has ended")
            except asyncio.CancelledError:
                call.cancel()
                raise
            except (QwenVLError, RayError, RayServeException) as error:
                request_error = _request_error(error)
                if request_error is not None:
                    stream.fail(request_error)
                    return
                line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
                _LOG.warning("an engine replica failed in attempt %d: %s", attempt + 1, line)
                if pause is None:
                    stream.fail(EngineUnavailable("the engine replicas fail; try again in a few seconds"))
                    return
                await asyncio.sleep(pause)


def _request_error(error: Exception) -> Optional[QwenVLError]:
    """Return the error of the request itself; None if the replica failed and a retry may succeed."""
    cause = error.cause if isinstance(error, RayTaskError) else error
    if isinstance(cause, EngineUnavailable) or not isinstance(cause, QwenVLError):
        return None
    return cause
