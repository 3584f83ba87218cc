"""SlotQueue, which grants the server's slots to requests, compared with a simple model of a queue."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any, Optional

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from paddlemix_qwenvl_plugin.serve.admission import SlotQueue
from paddlemix_qwenvl_plugin.serve.errors import ApiError

LONG = 1000.0  # seconds; a timeout that no test reaches


async def run_ready_tasks() -> None:
    """Let all tasks run until they wait; a task needs at most a few iterations of the event loop."""
    for _ in range(10):
        await asyncio.sleep(0)


class Request:
    """Request that holds n slots from their grant until `finish` is set.

    Attributes:
        running: whether the request holds its slots.
        task: its result is the error with which the request was refused, if any.
    """

    def __init__(self, queue: SlotQueue, n: int, key: Optional[str]) -> None:
        self.n, self.key = n, key
        self.running = False
        self.finish = asyncio.Event()
        self.task = asyncio.ensure_future(self._run(queue))

    async def _run(self, queue: SlotQueue) -> Optional[ApiError]:
        try:
            async with queue.slots(self.n, self.key):
                self.running = True
                await self.finish.wait()
        except ApiError as error:
            return error
        finally:
            self.running = False
        return None


class QueueModel:
    """Independent implementation of the queue's rules: running and waiting requests, in order."""

    def __init__(self, max_running: int, max_waiting: int, max_per_key: Optional[int]) -> None:
        self.max_running, self.max_waiting, self.max_per_key = max_running, max_waiting, max_per_key
        self.running: list[Request] = []
        self.waiting: list[Request] = []

    def refusal_status(self, n: int, key: Optional[str]) -> Optional[int]:
        """Status with which a new request is refused, None if it is accepted."""
        slots_of_key = sum(request.n for request in self.running + self.waiting if request.key == key)
        if n > self.max_running:
            return 400
        if key is not None and self.max_per_key is not None:
            if n > self.max_per_key:
                return 400
            if slots_of_key + n > self.max_per_key:
                return 429
        must_wait = bool(self.waiting) or self.n_free < n
        return 429 if must_wait and len(self.waiting) >= self.max_waiting else None

    @property
    def n_free(self) -> int:
        return self.max_running - sum(request.n for request in self.running)

    def grant_slots(self) -> None:
        """Start waiting requests in order while the first one has enough free slots."""
        while self.waiting and self.waiting[0].n <= self.n_free:
            self.running.append(self.waiting.pop(0))


# Action, and for "submit" the number of slots and the key, otherwise an index that selects a request.
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("submit"), st.integers(1, 4), st.sampled_from([None, "a", "b"])),
        st.tuples(st.just("finish"), st.integers(0, 20), st.none()),
        st.tuples(st.just("cancel"), st.integers(0, 20), st.none()),
        st.tuples(st.just("cancel when granted"), st.integers(0, 20), st.none()),
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
@example(  # The first waiting request needs two slots and is cancelled: the next one then starts.
    max_running=2,
    max_waiting=5,
    max_per_key=None,
    steps=[("submit", 1, None), ("submit", 2, None), ("submit", 1, None), ("cancel", 1, None)],
)
def test_queue_follows_the_model(
    max_running: int, max_waiting: int, max_per_key: Optional[int], steps: list[Any]
) -> None:
    async def run_steps() -> None:
        queue = SlotQueue(max_running, max_waiting, LONG, max_per_key)
        model = QueueModel(max_running, max_waiting, max_per_key)
        for action, number, key in steps:
            requests = model.running + model.waiting
            if action == "submit":
                expected_status = model.refusal_status(number, key)
                request = Request(queue, number, key)
                await run_ready_tasks()
                if expected_status is not None:
                    error = request.task.result()
                    assert error is not None
                    assert error.status == expected_status
                    if expected_status == 429:
                        assert (error.kind, error.code) == ("rate_limit_error", "rate_limit_exceeded")
                        assert int(error.headers["Retry-After"]) >= 1
                    continue
                model.waiting.append(request)
            elif action == "finish" and model.running:
                request = model.running.pop(number % len(model.running))
                request.finish.set()
            elif action == "cancel" and requests:
                request = requests[number % len(requests)]
                request.task.cancel()
                (model.running if request in model.running else model.waiting).remove(request)
            elif action == "cancel when granted" and model.running and model.waiting:
                # If enough slots become free, the first waiting request is cancelled after it is granted its slots and
                # before its task runs.
                finishing = model.running.pop(number % len(model.running))
                first_waiting = model.waiting.pop(0)
                finishing.finish.set()
                await asyncio.sleep(0)
                first_waiting.task.cancel()
            model.grant_slots()
            await run_ready_tasks()
            assert all(request.running for request in model.running)
            assert not any(request.running for request in model.waiting)
            assert queue.running == sum(request.n for request in model.running) <= max_running
            assert queue.waiting == len(model.waiting) <= max_waiting
        # No slot is lost: when all requests have finished, a new request gets all slots.
        for request in model.running + model.waiting:
            request.finish.set()
        await run_ready_tasks()
        assert (queue.running, queue.waiting) == (0, 0)
        async with queue.slots(max_running, None):
            assert queue.running == max_running

    asyncio.run(run_steps())


def test_waiting_timeout_lets_later_requests_start() -> None:
    async def scenario() -> None:
        queue = SlotQueue(2, 5, 0.2)  # two slots, at most five waiting requests, a timeout of 0.2 s
        first = Request(queue, 1, None)
        await run_ready_tasks()
        two_slots = Request(queue, 2, None)  # waits until both slots are free
        await run_ready_tasks()
        one_slot = asyncio.ensure_future(queue.slots(1, None).__aenter__())
        await run_ready_tasks()
        assert queue.waiting == 2
        error = await asyncio.wait_for(two_slots.task, 60)
        assert error is not None
        assert (error.status, error.code) == (503, "waiting_timeout")
        await asyncio.wait_for(one_slot, 60)
        first.finish.set()
        await first.task

    asyncio.run(scenario())


def test_close_refuses_new_requests_but_not_waiting_ones() -> None:
    async def scenario() -> None:
        queue = SlotQueue(1, 5, LONG)
        first, second, third = (Request(queue, 1, "a") for _ in range(3))
        await run_ready_tasks()
        queue.close()
        new = Request(queue, 1, None)
        await run_ready_tasks()
        error = new.task.result()
        assert error is not None
        assert (error.status, error.code, error.headers) == (503, "shutting_down", {"Retry-After": "1"})
        first.finish.set()
        await run_ready_tasks()
        assert second.running
        queue.refuse_waiting()
        await run_ready_tasks()
        assert third.task.result().status == 503
        assert second.running
        second.finish.set()
        await run_ready_tasks()
        assert (queue.running, queue.waiting) == (0, 0)

    asyncio.run(scenario())


def test_retry_after_grows_with_the_queue(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    clock = SimpleNamespace(monotonic=lambda: now[0])
    monkeypatch.setattr("paddlemix_qwenvl_plugin.serve.admission.time", clock)

    async def retry_after(n_waiting: int) -> int:
        queue = SlotQueue(2, n_waiting, LONG)
        for _ in range(100):  # requests of ten seconds, so that the queue estimates this duration
            async with queue.slots(1, None):
                now[0] += 10
        error = await refusal_of_full_queue(queue, 2 + n_waiting)
        return int(error.headers["Retry-After"])

    # Two slots, ten seconds per request: without waiting requests, a slot is free in at most 10 s; with eight, in 50 s.
    assert asyncio.run(retry_after(0)) == pytest.approx(10, abs=1)
    assert asyncio.run(retry_after(8)) == pytest.approx(50, abs=1)


async def refusal_of_full_queue(queue: SlotQueue, capacity: int) -> ApiError:
    """Fill a queue with this number of requests, and return the error of the next request."""
    requests = [Request(queue, 1, None) for _ in range(capacity)]
    await run_ready_tasks()
    with pytest.raises(ApiError) as caught:
        await queue.slots(1, None).__aenter__()
    for request in requests:
        request.task.cancel()
    await run_ready_tasks()
    return caught.value


@pytest.mark.parametrize(
    ("max_waiting", "message"),
    [
        (0, "All slots are in use, and this server queues no requests; try again later"),
        (2, "2 requests are waiting, the server's maximum; try again later"),
    ],
)
def test_message_of_a_full_queue(max_waiting: int, message: str) -> None:
    async def refusal() -> ApiError:
        return await refusal_of_full_queue(SlotQueue(1, max_waiting, LONG), 1 + max_waiting)

    assert str(asyncio.run(refusal())) == message


def test_waiting_times_are_reported() -> None:
    waits: list[float] = []

    async def scenario() -> None:
        queue = SlotQueue(1, 5, LONG, observe_wait=waits.append)
        async with queue.slots(1, None):
            pass
        requests = [Request(queue, 1, None) for _ in range(2)]
        await run_ready_tasks()
        for request in requests:
            request.finish.set()
            await run_ready_tasks()

    asyncio.run(scenario())
    assert len(waits) == 3
