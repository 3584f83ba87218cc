"""Merging of async generators."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from typing import Generic, Optional, TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class _QueueItem(Generic[T]):
    """An item or an error of a generator; with neither, the end of a generator."""

    item: Optional[T] = None
    error: Optional[Exception] = None


async def merge(generators: Sequence[AsyncGenerator[T, None]]) -> AsyncGenerator[T, None]:
    """Yield the items of all generators in order of arrival, through a queue of one item; a full queue pauses them.

    Items must not be None. All generators are closed when one of them fails or the merged generator is closed.

    Raises:
        Exception: the exception of the first generator that fails.
    """
    queue: asyncio.Queue[_QueueItem[T]] = asyncio.Queue(maxsize=1)

    async def run(generator: AsyncGenerator[T, None]) -> None:
        try:
            async for item in generator:
                await queue.put(_QueueItem(item))
            await queue.put(_QueueItem())
        except Exception as error:
            await queue.put(_QueueItem(error=error))
        finally:
            await generator.aclose()

    tasks = [asyncio.ensure_future(run(generator)) for generator in generators]
    n_running = len(tasks)
    try:
        while n_running:
            queued = await queue.get()
            if queued.error is not None:
                raise queued.error
            if queued.item is None:
                n_running -= 1
            else:
                yield queued.item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
