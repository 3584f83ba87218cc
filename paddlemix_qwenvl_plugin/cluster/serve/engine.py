"""Engine replica on Ray Serve, which supervises an engine process."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from typing import NamedTuple, Optional

from ray import serve

from paddlemix_qwenvl_plugin.cluster.serve.membership import Member, Report
from paddlemix_qwenvl_plugin.serve.engine_api import EngineRequest, Token
from paddlemix_qwenvl_plugin.serve.engine_client import ProcessEngineClient
from paddlemix_qwenvl_plugin.serve.json_log import LOGGER, start_logging
from paddlemix_qwenvl_plugin.serve.metrics import engine_metrics
from paddlemix_qwenvl_plugin.serve.opening import model_settings
from paddlemix_qwenvl_plugin.serve.settings import ServeSettings

# Health checks fail once the engine process has been unavailable for this time; Ray then replaces the replica.
_UNHEALTHY_SECONDS = 60.0


class Chunk(NamedTuple):
    """Tokens of a request since the previous chunk; the last chunk has the finish reason.

    `n_cached`: number of prompt tokens found in the prefix cache.
    """

    tokens: list[Token]
    n_cached: int
    reason: Optional[str] = None


class Engine:
    """Ray Serve replica that runs an engine process, restarts it after an exit, and streams completions."""

    async def __init__(self, settings: ServeSettings) -> None:  # type: ignore[misc]  # Ray Serve awaits it
        """Start the engine process and wait until it is ready; raise QwenVLError if it ends before."""
        start_logging(settings.log_level)
        self._client = ProcessEngineClient(model_settings(settings, LOGGER.info))
        self._last_healthy = time.monotonic()
        await self._client.start()
        name = serve.get_replica_context().replica_id.unique_id
        self._member = Member(name, "engine", settings, self._report)
        self._member.start()

    async def generate(
        self, request: EngineRequest, n_skip: int, prefix: str, attempt: int
    ) -> AsyncIterator[Chunk]:
        """Stream the completion of a request; cancelling the call cancels the request.

        Args:
            n_skip: number of leading tokens to omit, which an earlier attempt has already sent.
            prefix, attempt: read by PrefixRouter.

        Raises:
            EngineUnavailable: the engine process is not ready, or ended while computing the request.
            QwenVLError: the request failed.
        """
        stream = self._client.submit(request)
        try:
            async for tokens in stream:
                new = tokens[n_skip:]
                n_skip -= min(n_skip, len(tokens))
                if new:
                    yield Chunk(new, stream.n_cached)
            ended = stream.ended
            assert ended is not None
            yield Chunk([], ended.n_cached, ended.reason)
        finally:
            stream.cancel()

    def check_health(self) -> None:
        """Raise RuntimeError if the engine process has not been ready for a minute; called by Ray Serve."""
        now = time.monotonic()
        if self._client.ready:
            self._last_healthy = now
        elif now - self._last_healthy > _UNHEALTHY_SECONDS:
            raise RuntimeError("the engine process cannot be started again")

    async def __del__(self) -> None:
        """End the engine process. Ray Serve awaits this method when the replica stops."""
        await self._client.stop()

    def _report(self) -> Report:
        return Report(self._client.ready, list(engine_metrics(self._client)))
