"""Allocation of KV cache blocks, with reference counts and a prefix cache."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence


class BlockPool:
    """Reference-counted allocator of KV cache blocks with a prefix cache.

    A full block can be registered under a key: a digest of everything that determines its attention keys and values.
    A block without users keeps its content and key until it is allocated again. Of these blocks, those without a key
    are allocated first, then the least recently used.
    """

    def __init__(self, n_blocks: int) -> None:
        self.n_blocks = n_blocks
        self._users = [0] * n_blocks
        self._keys: list[bytes | None] = [None] * n_blocks
        self._registered: dict[bytes, int] = {}
        # Blocks without users; the first is allocated next.
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(n_blocks))

    @property
    def n_free(self) -> int:
        """Number of blocks without users, cached ones included."""
        return len(self._free)

    def n_unused(self, blocks: Iterable[int]) -> int:
        """Number of the given blocks that have no users."""
        return sum(block in self._free for block in blocks)

    def find(self, keys: Sequence[bytes]) -> list[int]:
        """Find the blocks of the longest registered prefix of `keys`."""
        found = []
        for key in keys:
            block = self._registered.get(key)
            if block is None:
                break
            found.append(block)
        return found

    def share(self, blocks: Iterable[int]) -> None:
        """Add a user to each block."""
        for block in blocks:
            self._users[block] += 1
            self._free.pop(block, None)

    def allocate(self) -> int | None:
        """Allocate a block with one user and undefined content; None if all are in use."""
        if not self._free:
            return None
        block, _ = self._free.popitem(last=False)
        key = self._keys[block]
        if key is not None:
            del self._registered[key]
            self._keys[block] = None
        self._users[block] = 1
        return block

    def release(self, blocks: Sequence[int]) -> None:
        """Remove a user from each block of a sequence, given in order.

        Fewer prompts share the end of a sequence than its beginning, so its last blocks are allocated again first.
        """
        for block in reversed(blocks):
            self._users[block] -= 1
            if self._users[block] == 0:
                self._free[block] = None
                if self._keys[block] is None:
                    self._free.move_to_end(block, last=False)

    def register(self, block: int, key: bytes) -> None:
        """Register a full block under `key` for `find`, unless the key or the block is registered already."""
        if key not in self._registered and self._keys[block] is None:
            self._registered[key] = block
            self._keys[block] = key
