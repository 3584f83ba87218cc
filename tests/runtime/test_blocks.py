"""The block pool, compared with a plain second implementation."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from paddlemix_qwenvl_plugin.runtime.blocks import BlockPool

KEYS = [b"a", b"b", b"c", b"d"]

# (allocate, number of blocks), (release, held sequence), (register, held sequence, key), (share, keys).
operations = st.lists(
    st.one_of(
        st.tuples(st.just("allocate"), st.integers(1, 3)),
        st.tuples(st.just("release"), st.integers(0, 9)),
        st.tuples(st.just("register"), st.integers(0, 9), st.sampled_from(KEYS)),
        st.tuples(st.just("share"), st.lists(st.sampled_from(KEYS), min_size=1, max_size=3)),
    ),
    max_size=60,
)


class PlainPool:
    """The state of a block pool as lists with an entry for each block."""

    def __init__(self, n: int) -> None:
        self.users = [0] * n
        self.key: list[bytes | None] = [None] * n
        self.released: list[tuple[int, int]] = [(-1, 0)] * n  # (time, -index in its sequence)
        self.now = 0

    def free(self) -> list[int]:
        return [block for block, users in enumerate(self.users) if users == 0]

    def find(self, keys: list[bytes]) -> list[int]:
        found = []
        for key in keys:
            if key not in self.key:
                break
            found.append(self.key.index(key))
        return found

    def may_allocate(self, block: int) -> bool:
        """Whether the pool may allocate a free block: one without a key, or, if all have keys, the one released first.

        Of blocks that were released together, the last one of the sequence goes first.
        """
        free = self.free()
        if any(self.key[candidate] is None for candidate in free):
            return self.key[block] is None
        return self.released[block] == min(self.released[candidate] for candidate in free)


@settings(max_examples=300, deadline=None)
@given(operations=operations, n_blocks=st.integers(1, 6))
def test_against_a_plain_implementation(operations, n_blocks):
    pool, plain = BlockPool(n_blocks), PlainPool(n_blocks)
    held: list[list[int]] = []
    for name, *arguments in operations:
        plain.now += 1
        if name == "allocate":
            blocks = []
            for _ in range(arguments[0]):
                free = plain.free()
                block = pool.allocate()
                if not free:
                    assert block is None
                    break
                assert block in free
                assert plain.may_allocate(block)
                plain.users[block], plain.key[block] = 1, None
                blocks.append(block)
            if blocks:
                held.append(blocks)
        elif name == "release" and held:
            blocks = held.pop(arguments[0] % len(held))
            pool.release(blocks)
            for index, block in enumerate(blocks):
                plain.users[block] -= 1
                plain.released[block] = plain.now, -index
        elif name == "register" and held:
            block = held[arguments[0] % len(held)][0]
            pool.register(block, arguments[1])
            if plain.key[block] is None and arguments[1] not in plain.key:
                plain.key[block] = arguments[1]
        elif name == "share":
            found = pool.find(arguments[0])
            assert found == plain.find(arguments[0])
            # Keys that repeat find the same block twice; a sequence has no block twice.
            if found and len(set(found)) == len(found):
                pool.share(found)
                for block in found:
                    plain.users[block] += 1
                held.append(found)
        assert pool.n_free == len(plain.free())
