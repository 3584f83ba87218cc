"""Load of concurrent clients: most read their answers, some disconnect, some send invalid requests."""

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

logging.getLogger("httpx").setLevel(logging.WARNING)  # a line for each request

# Longer than an answer takes on a busy machine.
PATIENCE = 300.0


@dataclass
class Reply:
    """Reply: texts and finish reasons of all choices, or an error object."""

    status: int
    texts: list[str] = field(default_factory=list)
    reasons: list[Optional[str]] = field(default_factory=list)
    error: Optional[dict[str, Any]] = None
    whole: bool = False

    def answers(self, question: Question) -> bool:
        """Whether the reply equals QwenVL's own answer."""
        return self.whole and (self.texts, self.reasons) == (question.texts, question.reasons)


@dataclass
class Tally:
    """Counts of the clients' results.

    Attributes:
        wrong: lines about replies that are neither the answer nor an error that `forgiving` load may get.
    """

    answered: int = 0
    errors: Counter[str] = field(default_factory=Counter)
    hung_up: int = 0
    invalid: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)

    @property
    def requests(self) -> int:
        return self.answered + sum(self.errors.values()) + self.hung_up + sum(self.invalid.values())


class Load:
    """Clients of a server.

    Attributes:
        tally: what they saw so far.
    """

    def __init__(
        self,
        url: str,
        questions: Sequence[Question],
        seed: int = 1,
        polite: bool = False,
        forgiving: bool = False,
    ) -> None:
        """Create the clients.

        Args:
            polite: no client disconnects early or sends invalid requests.
            forgiving: do not count an OpenAI error with status 503 or 504, or in a stream, as a wrong answer.
        """
        self.tally = Tally()
        self._url = url
        self._questions = questions
        self._rng = random.Random(seed)
        self._polite = polite
        self._forgiving = forgiving

    async def run(self, n_clients: int, go_on: Callable[[], bool]) -> None:
        """Run the clients, each with one request after another, while `go_on` returns true."""
        await asyncio.gather(*(self._client(go_on) for _ in range(n_clients)))

    async def _client(self, go_on: Callable[[], bool]) -> None:
        # No certificates: reading those of the system takes longer than a request.
        async with httpx.AsyncClient(base_url=self._url, timeout=PATIENCE, verify=False) as http:
            while go_on():
                chance = 1.0 if self._polite else self._rng.random()
                if chance < 0.1:
                    await self._hang_up(http)
                elif chance < 0.2:
                    await self._send_invalid(http)
                else:
                    await self._ask(http)

    async def _ask(self, http: httpx.AsyncClient) -> None:
        question = self._rng.choice(self._questions)
        reply = await ask(http, question, stream=self._rng.random() < 0.8)
        if reply.answers(question):
            self.tally.answered += 1
        elif self._forgiving and is_failure(reply):
            assert reply.error is not None
            self.tally.errors[f"{reply.status} {reply.error['code']}"] += 1
            await asyncio.sleep(0.05)  # as a client that tries again
        else:
            said = {name: question.body[name] for name in question.body if name not in ("messages", "prompt")}
            self.tally.wrong.append(f"{said}: {reply} but alone {question.texts} {question.reasons}")

    async def _hang_up(self, http: httpx.AsyncClient) -> None:
        """Disconnect before the answer or after some events; check the events so far."""
        question = self._rng.choice(self._questions)
        if self._rng.random() < 0.3:
            task = asyncio.ensure_future(ask(http, question, stream=self._rng.random() < 0.5))
            await asyncio.sleep(self._rng.random() * 0.2)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
        else:
            reply = await ask(http, question, stream=True, n_events=self._rng.randrange(1, 20))
            pairs = zip(question.texts, reply.texts)
            if reply.error is not None and self._forgiving and is_failure(reply):
                pass
            elif reply.error is not None or not all(text.startswith(begin) for text, begin in pairs):
                self.tally.wrong.append(f"a client that hung up: {reply} but alone {question.texts}")
        self.tally.hung_up += 1

    async def _send_invalid(self, http: httpx.AsyncClient) -> None:
        invalid = self._rng.choice(INVALID_REQUESTS)
        problem = await invalid.send(http)
        if problem is not None and not (self._forgiving and problem.startswith("status 503")):
            self.tally.wrong.append(f"{invalid.name}: {problem}")
        self.tally.invalid[invalid.name] += 1


def is_failure(reply: Reply) -> bool:
    """Whether a reply is an OpenAI error for a server that could not answer."""
    if reply.error is None or set(reply.error) != {"message", "type", "param", "code"}:
        return False
    return reply.error["type"] == "server_error" and reply.status in (200, 503, 504)


async def ask(
    http: httpx.AsyncClient, question: Question, stream: bool, n_events: Optional[int] = None
) -> Reply:
    """Ask a question; with `n_events`, disconnect after that number of events."""
    if not stream:
        response = await http.post(question.path, json=question.body)
        body = response.json()
        if response.status_code != 200:
            return Reply(response.status_code, error=body["error"])
        texts = [c["message"]["content"] if "message" in c else c["text"] for c in body["choices"]]
        return Reply(200, texts, [choice["finish_reason"] for choice in body["choices"]], whole=True)
    n = question.body.get("n", 1)
    reply = Reply(200, [""] * n, [None] * n)
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
            assert not reply.whole, "an event after the last one"
            if line == "data: [DONE]":
                reply.whole = usage is not None
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
                reply.reasons[choice["index"]] = choice["finish_reason"]
            if n_events is not None:
                n_events -= 1
                if n_events == 0:
                    break
    return reply


class Pulse:
    """Client that polls a path; `late` is the longest response time in seconds, `wrong` lists the failures."""

    def __init__(self, url: str, path: str = "/health/live") -> None:
        self.n = 0
        self.late = 0.0
        self.wrong: list[str] = []
        self._url = url + path

    async def __aenter__(self) -> Pulse:
        self._task = asyncio.ensure_future(self._beat())
        return self

    async def __aexit__(self, *error: object) -> None:
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)

    async def _beat(self) -> None:
        async with httpx.AsyncClient(timeout=PATIENCE, verify=False) as http:
            while True:
                start = time.monotonic()
                try:
                    status = (await http.get(self._url)).status_code
                    if status != 200:
                        self.wrong.append(f"status {status}")
                except httpx.HTTPError as error:
                    self.wrong.append(repr(error))
                self.late = max(self.late, time.monotonic() - start)
                self.n += 1
                await asyncio.sleep(0.02)
