"""The blocks of a KV cache: who uses which, and which hold a prefix that a later prompt may share."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence


class BlockPool:
    """A reference-counted allocator with a prefix cache.

    A full block can be registered under a key, the digest of everything that its keys and values depend on. A block
    that nobody uses any more keeps its content and its key until the pool needs it: the least recently used goes first.
    """

    def __init__(self, n_blocks: int) -> None:
        self.n_blocks = n_blocks
        self._users = [0] * n_blocks
        self._keys: list[bytes | None] = [None] * n_blocks
        self._registered: dict[bytes, int] = {}
        # Blocks without users; the first is the next to be taken.
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(n_blocks))

    @property
    def n_free(self) -> int:
        """Blocks that nobody uses, cached ones included."""
        return len(self._free)

    def n_unused(self, blocks: Iterable[int]) -> int:
        """How many of these blocks nobody uses."""
        return sum(block in self._free for block in blocks)

    def find(self, keys: Sequence[bytes]) -> list[int]:
        """The blocks of the longest beginning of `keys` that is registered."""
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
        """A block with one user and undefined content; None if all are in use."""
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
        """Take a user away from each block of a sequence, given in order.

        The end of a sequence is of use to fewer prompts than its beginning, so it goes first.
        """
        for block in reversed(blocks):
            self._users[block] -= 1
            if self._users[block] == 0:
                self._free[block] = None
                if self._keys[block] is None:
                    self._free.move_to_end(block, last=False)

    def register(self, block: int, key: bytes) -> None:
        """Let `find` give this full block for `key`, unless another block holds the same."""
        if key not in self._registered and self._keys[block] is None:
            self._registered[key] = block
            self._keys[block] = key
