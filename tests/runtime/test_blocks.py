"""The block pool against a naive model."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from paddlemix_qwenvl_plugin.runtime.blocks import BlockPool

KEYS = [b"a", b"b", b"c", b"d"]

operations = st.lists(
    st.one_of(
        st.tuples(st.just("allocate"), st.integers(1, 3)),
        st.tuples(st.just("release"), st.integers(0, 9)),
        st.tuples(st.just("register"), st.integers(0, 9), st.sampled_from(KEYS)),
        st.tuples(st.just("share"), st.lists(st.sampled_from(KEYS), min_size=1, max_size=3)),
    ),
    max_size=60,
)


class Slow:
    """The state of a pool as plain lists."""

    def __init__(self, n: int) -> None:
        self.users = [0] * n
        self.key: list[bytes | None] = [None] * n
        self.released: list[tuple[int, int]] = [(-1, 0)] * n  # time, and closeness to the end of its sequence
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

    def may_take(self, block: int) -> bool:
        """A block without a key if any, else the least recently released one."""
        free = self.free()
        if any(self.key[other] is None for other in free):
            return self.key[block] is None
        return self.released[block] == min(self.released[other] for other in free)


@settings(max_examples=300, deadline=None)
@given(operations=operations, n_blocks=st.integers(1, 6))
def test_against_a_slow_model(operations, n_blocks):
    pool, slow = BlockPool(n_blocks), Slow(n_blocks)
    held: list[list[int]] = []
    for name, *arguments in operations:
        slow.now += 1
        if name == "allocate":
            blocks = []
            for _ in range(arguments[0]):
                free = slow.free()
                block = pool.allocate()
                if not free:
                    assert block is None
                    break
                assert block in free
                assert slow.may_take(block)
                slow.users[block], slow.key[block] = 1, None
                blocks.append(block)
            if blocks:
                held.append(blocks)
        elif name == "release" and held:
            blocks = held.pop(arguments[0] % len(held))
            pool.release(blocks)
            for place, block in enumerate(blocks):
                slow.users[block] -= 1
                slow.released[block] = slow.now, -place
        elif name == "register" and held:
            block = held[arguments[0] % len(held)][0]
            pool.register(block, arguments[1])
            if slow.key[block] is None and arguments[1] not in slow.key:
                slow.key[block] = arguments[1]
        elif name == "share":
            found = pool.find(arguments[0])
            assert found == slow.find(arguments[0])
            if found and len(set(found)) == len(found):
                pool.share(found)
                for block in found:
                    slow.users[block] += 1
                held.append(found)
        assert pool.n_free == len(slow.free())
