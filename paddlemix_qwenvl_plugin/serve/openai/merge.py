"""Several async generators as one."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from typing import Generic, Optional, TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class _Put(Generic[T]):
    """An item, an error, or, without both, an end."""

    item: Optional[T] = None
    error: Optional[Exception] = None


async def merge(generators: Sequence[AsyncGenerator[T, None]]) -> AsyncGenerator[T, None]:
    """The items of all, none of them None, as they come; each is run at most one item ahead of the reader.

    Raises:
        Exception: of the first that fails; the others are closed then, as when this is closed.
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
