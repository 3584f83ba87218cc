"""Clients of a load test, which also disconnect early and send invalid requests, at random."""

from __future__ import annotations

import asyncio
import json
import logging
import random
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Optional

import httpx
from serve_invalid_requests import INVALID_REQUESTS
from serve_questions import Question

logging.getLogger("httpx").setLevel(logging.WARNING)  # at INFO, httpx logs a line for each request

# Seconds; longer than a completion takes on a busy machine.
TIMEOUT = 300.0


@dataclass
class Reply:
    """Response of the server, streamed or not: texts and finish reasons of all choices, or an error object.

    Attributes:
        complete: whether the whole answer arrived, in a stream with the usage and `[DONE]`; false for an error.
    """

    status: int
    texts: list[str] = field(default_factory=list)
    finish_reasons: list[Optional[str]] = field(default_factory=list)
    error: Optional[dict[str, Any]] = None
    complete: bool = False

    def is_answer_to(self, question: Question) -> bool:
        """Whether the reply is complete and equals the expected answer of a question."""
        expected = (question.texts, question.finish_reasons)
        return self.complete and (self.texts, self.finish_reasons) == expected


@dataclass
class Tally:
    """Counts of the requests of all clients, by their result.

    Attributes:
        answered: number of requests with the expected answer.
        errors: number of allowed errors, by status and code.
        disconnected: number of requests whose client disconnected on purpose, early or at the end of a short response.
        invalid: number of invalid requests, by name.
        failures: descriptions of unexpected responses.
    """

    answered: int = 0
    errors: Counter[str] = field(default_factory=Counter)
    disconnected: int = 0
    invalid: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)

    @property
    def requests(self) -> int:
        """Number of all requests, except valid ones read to the end with an unexpected response."""
        return self.answered + sum(self.errors.values()) + self.disconnected + sum(self.invalid.values())


class Load:
    """Concurrent clients of a server.

    Attributes:
        tally: the results so far.
    """

    def __init__(self, url: str, questions: Sequence[Question], allow_errors: bool = False) -> None:
        """Create the clients.

        Args:
            url: URL of the server.
            questions: the clients choose from these at random.
            allow_errors: if true, an error for which `is_server_error` is true does not count as a failure, nor does
                status 503 for an invalid request.
        """
        self.tally = Tally()
        self._url = url
        self._questions = questions
        self._rng = random.Random(1)
        self._allow_errors = allow_errors

    async def run(self, n_clients: int, keep_running: Callable[[], bool]) -> None:
        """Run the clients, each with sequential requests, while `keep_running` returns true."""
        await asyncio.gather(*(self._client(keep_running) for _ in range(n_clients)))

    async def _client(self, keep_running: Callable[[], bool]) -> None:
        # Without verify=False httpx reads a file of CA certificates, which takes longer than a request.
        async with httpx.AsyncClient(base_url=self._url, timeout=TIMEOUT, verify=False) as http:
            while keep_running():
                chance = self._rng.random()
                if chance < 0.1:
                    await self._disconnect_early(http)
                elif chance < 0.2:
                    await self._send_invalid(http)
                else:
                    await self._ask(http)

    async def _ask(self, http: httpx.AsyncClient) -> None:
        question = self._rng.choice(self._questions)
        reply = await ask(http, question, stream=self._rng.random() < 0.8)
        if reply.is_answer_to(question):
            self.tally.answered += 1
        elif self._is_allowed_error(reply):
            assert reply.error is not None
            self.tally.errors[f"{reply.status} {reply.error['code']}"] += 1
            await asyncio.sleep(0.05)  # before the client tries again
        else:
            parameters = {
                name: value for name, value in question.body.items() if name not in ("messages", "prompt")
            }
            expected = f"{question.texts} {question.finish_reasons}"
            self.tally.failures.append(f"{parameters}: {reply}, expected {expected}")

    async def _disconnect_early(self, http: httpx.AsyncClient) -> None:
        """Disconnect within 0.2 s, or after 1 to 19 events of a stream; check the text of these events."""
        question = self._rng.choice(self._questions)
        if self._rng.random() < 0.3:
            task = asyncio.ensure_future(ask(http, question, stream=self._rng.random() < 0.5))
            await asyncio.sleep(self._rng.random() * 0.2)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
        else:
            reply = await ask(http, question, stream=True, n_events=self._rng.randrange(1, 20))
            pairs = zip(question.texts, reply.texts)
            as_expected = reply.error is None and all(text.startswith(begin) for text, begin in pairs)
            if not as_expected and not self._is_allowed_error(reply):
                failure = f"until the client disconnected: {reply}, expected {question.texts}"
                self.tally.failures.append(failure)
        self.tally.disconnected += 1

    async def _send_invalid(self, http: httpx.AsyncClient) -> None:
        invalid = self._rng.choice(INVALID_REQUESTS)
        problem = await invalid.send(http)
        if problem is not None and not (self._allow_errors and problem.startswith("status 503")):
            self.tally.failures.append(f"{invalid.name}: {problem}")
        self.tally.invalid[invalid.name] += 1

    def _is_allowed_error(self, reply: Reply) -> bool:
        return self._allow_errors and is_server_error(reply)


def is_server_error(reply: Reply) -> bool:
    """Whether a reply is an error of type "server_error": with status 503 or 504, or in a stream (status 200)."""
    if reply.error is None or set(reply.error) != {"message", "type", "param", "code"}:
        return False
    return reply.error["type"] == "server_error" and reply.status in (200, 503, 504)


async def ask(
    http: httpx.AsyncClient, question: Question, stream: bool, n_events: Optional[int] = None
) -> Reply:
    """Send the request of a question; a stream is closed after `n_events` events, if this number is given."""
    if not stream:
        response = await http.post(question.path, json=question.body)
        body = response.json()
        if response.status_code != 200:
            return Reply(response.status_code, error=body["error"])
        choices = body["choices"]
        texts = [
            choice["message"]["content"] if "message" in choice else choice["text"] for choice in choices
        ]
        return Reply(200, texts, [choice["finish_reason"] for choice in choices], complete=True)
    n_choices = question.body.get("n", 1)
    reply = Reply(200, [""] * n_choices, [None] * n_choices)
    body = {**question.body, "stream": True, "stream_options": {"include_usage": True}}
    async with http.stream("POST", question.path, json=body) as response:
        reply.status = response.status_code
        if response.status_code != 200:
            reply.error = json.loads(await response.aread())["error"]
            return reply
        usage = None
        async for line in response.aiter_lines():
            if not line:
                continue
            assert line.startswith("data: "), line
            assert not reply.complete, "an event after [DONE]"
            if line == "data: [DONE]":
                reply.complete = usage is not None
                continue
            event = json.loads(line[len("data: ") :])
            if "error" in event:
                reply.error = event["error"]
                continue
            assert reply.error is None, "an event after an error"
            usage = event["usage"]
            for choice in event["choices"]:
                text = choice["text"] if "text" in choice else choice["delta"].get("content", "")
                reply.texts[choice["index"]] += text
                reply.finish_reasons[choice["index"]] = choice["finish_reason"]
            if n_events is not None:
                n_events -= 1
                if n_events == 0:
                    break
    return reply


class HealthPoller:
    """Client that requests /health/live again and again, with pauses of 20 ms, while the context is open.

    Attributes:
        max_seconds: the longest response time so far, in seconds.
        failures: descriptions of failed requests.
    """

    def __init__(self, url: str) -> None:
        self.max_seconds = 0.0
        self.failures: list[str] = []
        self._url = f"{url}/health/live"

    async def __aenter__(self) -> HealthPoller:
        self._task = asyncio.ensure_future(self._poll())
        return self

    async def __aexit__(self, *error: object) -> None:
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)

    async def _poll(self) -> None:
        async with httpx.AsyncClient(timeout=TIMEOUT, verify=False) as http:
            while True:
                start = time.monotonic()
                try:
                    status = (await http.get(self._url)).status_code
                    if status != 200:
                        self.failures.append(f"status {status}")
                except httpx.HTTPError as error:
                    self.failures.append(repr(error))
                self.max_seconds = max(self.max_seconds, time.monotonic() - start)
                await asyncio.sleep(0.02)
