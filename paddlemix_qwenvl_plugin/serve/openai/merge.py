"""Merging of async generators."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from typing import Generic, Optional, TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class _Put(Generic[T]):
    """An item, an error, or the end of a generator (neither)."""

    item: Optional[T] = None
    error: Optional[Exception] = None


async def merge(generators: Sequence[AsyncGenerator[T, None]]) -> AsyncGenerator[T, None]:
    """Yield the items of all generators in order of arrival; each runs at most one item ahead of the reader.

    Items must not be None. All generators are closed when one fails or the merged generator is closed.

    Raises:
        Exception: the exception of the first generator that fails.
    """
    queue: asyncio.Queue[_Put[T]] = asyncio.Queue(maxsize=1)

    async def run(generator: AsyncGenerator[T, None]) -> None:
        try:
            async for item in generator:
                await queue.put(_Put(item))
            await queue.put(_Put())
        except Exception as error:
            await queue.put(_Put(error=error))
        finally:
            await generator.aclose()

    tasks = [asyncio.ensure_future(run(generator)) for generator in generators]
    n_running = len(tasks)
    try:
        while n_running:
            put = await queue.get()
            if put.error is not None:
                raise put.error
            if put.item is None:
                n_running -= 1
            else:
                yield put.item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
