"""The queue in front of the engine, against a simple model."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any, Optional

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from paddlemix_qwenvl_plugin.serve.admission import SlotQueue
from paddlemix_qwenvl_plugin.serve.errors import ApiError

LONG = 1000.0


async def settle() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


class Customer:
    """Request that holds its slots until `leave` is set."""

    def __init__(self, queue: SlotQueue, n: int, key: Optional[str]) -> None:
        self.n, self.key = n, key
        self.inside = False
        self.leave = asyncio.Event()
        self.task = asyncio.ensure_future(self._visit(queue))

    async def _visit(self, queue: SlotQueue) -> Optional[ApiError]:
        try:
            async with queue.slots(self.n, self.key):
                self.inside = True
                await self.leave.wait()
        except ApiError as error:
            return error
        finally:
            self.inside = False
        return None


class Ledger:
    """Independent model of the queue: customers inside and waiting, in order."""

    def __init__(self, max_running: int, max_waiting: int, max_per_key: Optional[int]) -> None:
        self.max_running, self.max_waiting, self.max_per_key = max_running, max_waiting, max_per_key
        self.inside: list[Customer] = []
        self.waiting: list[Customer] = []

    def status_of(self, n: int, key: Optional[str]) -> Optional[int]:
        """Status with which a new customer is refused, if any."""
        share = sum(c.n for c in self.inside + self.waiting if c.key == key)
        if n > self.max_running:
            return 400
        if key is not None and self.max_per_key is not None:
            if n > self.max_per_key:
                return 400
            if share + n > self.max_per_key:
                return 429
        must_wait = bool(self.waiting) or self.free < n
        return 429 if must_wait and len(self.waiting) >= self.max_waiting else None

    @property
    def free(self) -> int:
        return self.max_running - sum(c.n for c in self.inside)

    def serve(self) -> None:
        while self.waiting and self.waiting[0].n <= self.free:
            self.inside.append(self.waiting.pop(0))


STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("come"), st.integers(1, 4), st.sampled_from([None, "a", "b"])),
        st.tuples(st.just("leave"), st.integers(0, 20), st.none()),
        st.tuples(st.just("cancel"), st.integers(0, 20), st.none()),
        st.tuples(st.just("cancel at once"), st.integers(0, 20), st.none()),
    ),
    max_size=40,
)


@settings(max_examples=300, deadline=None)
@given(
    max_running=st.integers(1, 4),
    max_waiting=st.integers(0, 5),
    max_per_key=st.one_of(st.none(), st.integers(1, 4)),
    steps=STEPS,
)
@example(  # the head of the queue, which needs two slots, is cancelled: the next one waited only for it
    max_running=2,
    max_waiting=5,
    max_per_key=None,
    steps=[("come", 1, None), ("come", 2, None), ("come", 1, None), ("cancel", 1, None)],
)
def test_the_queue_matches_the_ledger(
    max_running: int, max_waiting: int, max_per_key: Optional[int], steps: list[Any]
) -> None:
    async def play() -> None:
        queue = SlotQueue(max_running, max_waiting, LONG, max_per_key)
        ledger = Ledger(max_running, max_waiting, max_per_key)
        for what, number, key in steps:
            customers = ledger.inside + ledger.waiting
            if what == "come":
                expected = ledger.status_of(number, key)
                customer = Customer(queue, number, key)
                await settle()
                if expected is not None:
                    error = customer.task.result()
                    assert error is not None
                    assert error.status == expected
                    if expected == 429:
                        assert (error.kind, error.code) == ("rate_limit_error", "rate_limit_exceeded")
                        assert int(error.headers["Retry-After"]) >= 1
                    continue
                ledger.waiting.append(customer)
            elif what == "leave" and ledger.inside:
                customer = ledger.inside.pop(number % len(ledger.inside))
                customer.leave.set()
            elif what == "cancel" and customers:
                customer = customers[number % len(customers)]
                customer.task.cancel()
                (ledger.inside if customer in ledger.inside else ledger.waiting).remove(customer)
            elif what == "cancel at once" and ledger.inside and ledger.waiting:
                # In the moment between the grant of its slots and its own next step, the head of the queue is ended.
                going = ledger.inside.pop(number % len(ledger.inside))
                head = ledger.waiting.pop(0)
                going.leave.set()
                await asyncio.sleep(0)
                head.task.cancel()
            ledger.serve()
            await settle()
            assert [c.inside for c in ledger.inside] == [True] * len(ledger.inside)
            assert not any(c.inside for c in ledger.waiting)
            assert queue.running == sum(c.n for c in ledger.inside) <= max_running
            assert queue.waiting == len(ledger.waiting) <= max_waiting
        # No slot is lost: when all have gone, one gets all.
        for customer in ledger.inside + ledger.waiting:
            customer.leave.set()
        await settle()
        assert (queue.running, queue.waiting) == (0, 0)
        async with queue.slots(max_running, None):
            assert queue.running == max_running

    asyncio.run(play())


def test_who_waits_too_long_is_refused_and_those_behind_go_on() -> None:
    async def play() -> None:
        queue = SlotQueue(2, 5, 0.2)
        first = Customer(queue, 1, None)
        await settle()
        wide = Customer(queue, 2, None)  # waits for both
        await settle()
        narrow = asyncio.ensure_future(queue.slots(1, None).__aenter__())
        await settle()
        assert queue.waiting == 2
        error = await asyncio.wait_for(wide.task, 60)
        assert error is not None
        assert (error.status, error.code) == (503, "waiting_timeout")
        await asyncio.wait_for(narrow, 60)
        first.leave.set()
        await first.task

    asyncio.run(play())


def test_after_close_waiting_requests_go_on_and_new_ones_are_refused() -> None:
    async def play() -> None:
        queue = SlotQueue(1, 5, LONG)
        inside, waiting, refused = (Customer(queue, 1, "a") for _ in range(3))
        await settle()
        queue.close()
        late = Customer(queue, 1, None)
        await settle()
        error = late.task.result()
        assert error is not None
        assert (error.status, error.code, error.headers) == (503, "shutting_down", {"Retry-After": "1"})
        inside.leave.set()
        await settle()
        assert waiting.inside
        queue.refuse_waiting()
        await settle()
        assert refused.task.result().status == 503
        assert waiting.inside
        waiting.leave.set()
        await settle()
        assert (queue.running, queue.waiting) == (0, 0)

    asyncio.run(play())


def test_retry_after_grows_with_the_queue(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    clock = SimpleNamespace(monotonic=lambda: now[0])
    monkeypatch.setattr("paddlemix_qwenvl_plugin.serve.admission.time", clock)

    async def retry_after(waiting: int) -> int:
        queue = SlotQueue(2, waiting, LONG)
        for _ in range(100):  # each takes ten seconds
            async with queue.slots(1, None):
                now[0] += 10
        customers = [Customer(queue, 1, None) for _ in range(2 + waiting)]
        await settle()
        with pytest.raises(ApiError) as caught:
            await queue.slots(1, None).__aenter__()
        for customer in customers:
            customer.task.cancel()
        await settle()
        return int(caught.value.headers["Retry-After"])

    # Two slots, ten seconds each: with an empty queue, one is free in at most ten seconds; with eight, in fifty.
    assert asyncio.run(retry_after(0)) == pytest.approx(10, abs=1)
    assert asyncio.run(retry_after(8)) == pytest.approx(50, abs=1)


@pytest.mark.parametrize(
    ("max_waiting", "message"),
    [
        (0, "All slots are in use, and this server queues no requests; try again later"),
        (2, "2 requests are waiting, the server's maximum; try again later"),
    ],
)
def test_the_message_of_a_full_queue(max_waiting: int, message: str) -> None:
    async def refused() -> ApiError:
        queue = SlotQueue(1, max_waiting, LONG)
        customers = [Customer(queue, 1, None) for _ in range(1 + max_waiting)]
        await settle()
        with pytest.raises(ApiError) as caught:
            await queue.slots(1, None).__aenter__()
        for customer in customers:
            customer.task.cancel()
        await settle()
        return caught.value

    assert str(asyncio.run(refused())) == message


def test_the_wait_is_measured() -> None:
    waits: list[float] = []

    async def play() -> None:
        queue = SlotQueue(1, 5, LONG, observe_wait=waits.append)
        async with queue.slots(1, None):
            pass
        customers = [Customer(queue, 1, None) for _ in range(2)]
        await settle()
        for customer in customers:
            customer.leave.set()
            await settle()

    asyncio.run(play())
    assert len(waits) == 3
    assert waits[0] >= 0
