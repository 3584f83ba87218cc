"""The engine process through its client, against QwenVL in this process."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import random
import shutil
import signal

import numpy as np
import pytest
from engines import needs_compiler
from serve_engine_helpers import RequestCase, read, running, settings_of, until, with_engine, words

from paddlemix_qwenvl_plugin import QwenVLError, UsageError
from paddlemix_qwenvl_plugin.serve import engine_child
from paddlemix_qwenvl_plugin.serve.engine_api import Ended, EngineUnavailable
from paddlemix_qwenvl_plugin.serve.engine_client import ProcessEngineClient

pytestmark = needs_compiler


def test_answers_are_those_alone(stages, local_model):
    """32 concurrent requests, some cancelled, one read after the end."""
    rng = random.Random(1)
    asked = [RequestCase.at_random(local_model, rng) for _ in range(32)]
    expected = [each.expected_ids(local_model) for each in asked]
    assert len({tuple(tokens) for tokens in expected}) > 20
    assert any(each.request.images for each in asked)

    async def use(client):
        streams = [client.submit(each.request) for each in asked]

        async def ask(i):
            got = []
            async for tokens in streams[i]:
                got += [token.id for token in tokens]
                if i % 5 == 4:
                    streams[i].cancel()
            return got

        answers = await asyncio.gather(*(ask(i) for i in range(1, 32)))
        answers.insert(0, await read(streams[0]))
        for i, (answer, wanted) in enumerate(zip(answers, expected)):
            assert answer == wanted[: len(answer)]
            ended = streams[i].ended
            if ended.reason == "cancelled":
                assert i % 5 == 4
            else:
                assert answer == wanted
                assert ended.reason == ("stop" if wanted[-1] in asked[i].request.stop_token_ids else "length")
            streams[i].cancel()  # too late, and no error
        await until(lambda: client.stats.steps > 0 and client.stats.running == 0)
        stats = client.stats
        assert (stats.waiting, stats.blocks_used) == (0, 0)
        assert stats.blocks > 0
        assert stats.completion_tokens == sum(map(len, answers))
        assert stats.images_encoded == 3
        assert stats.prompt_tokens <= sum(len(each.request.prompt) for each in asked)
        assert stats.cached_tokens == sum(stream.ended.n_cached for stream in streams)
        again = client.submit(asked[3].request)
        assert await read(again) == expected[3]
        assert again.ended.n_cached == (len(asked[3].request.prompt) - 1) // 32 * 32

    with_engine(stages, use)


def test_cancelling_frees_blocks(stages):
    async def use(client):
        stream = client.submit(words(4000))
        await stream.__anext__()
        await until(lambda: client.stats.running == 1)
        assert client.stats.blocks_used > 0
        stream.cancel()
        n = len(await read(stream))
        assert stream.ended == Ended("cancelled", 0)
        assert n < 4000
        await until(lambda: client.stats.running == 0)
        assert client.stats.blocks_used == 0

    with_engine(stages, use)


def test_a_request_that_cannot_be_fails_alone(stages, local_model):
    image = np.zeros([local_model.config.visual.image_size] * 2 + [3], np.uint8)
    bad = [
        (dataclasses.replace(words(), images=[image]), "images: 1, but the prompt has 0 "),
        (dataclasses.replace(words(), prompt=[5] * 9000), "no room in the context"),
        (dataclasses.replace(words(), prompt=[5, 10**6]), "ids must be 0 to"),
        (dataclasses.replace(words(), prompt=[]), "at least one token"),
        (dataclasses.replace(words(), n_logprobs=21), "n_logprobs: 21 is out of range"),
    ]

    async def use(client):
        good = client.submit(words(50))
        for request, line in bad:
            with pytest.raises(QwenVLError, match=line) as raised:
                await read(client.submit(request))
            assert not isinstance(raised.value, EngineUnavailable)
        assert len(await read(good)) == 50

    with_engine(stages, use)


def test_a_model_that_cannot_be_opened(stages, tmp_path):
    async def start(settings):
        client = ProcessEngineClient(settings)
        try:
            await client.start()
        finally:
            assert (client.ready, client.pid) == (False, None)
            with pytest.raises(EngineUnavailable):
                client.submit(words())

    missing = dataclasses.replace(settings_of(stages), first_model_path=tmp_path / "nothing")
    with pytest.raises(UsageError, match=f"{tmp_path}/nothing"):
        asyncio.run(start(missing))
    shutil.copytree(stages[1].parent, tmp_path / "text")
    (tmp_path / "text" / "qwen.pdiparams").write_bytes(b"damaged")
    damaged = dataclasses.replace(settings_of(stages), second_model_path=tmp_path / "text" / "qwen")
    with pytest.raises(QwenVLError, match=r"qwen\.pdiparams") as raised:
        asyncio.run(start(damaged))
    assert "\n" not in str(raised.value)


def test_a_process_that_cannot_start(stages):
    """The process exits without an error message, as with a missing library."""
    broken = dataclasses.replace(settings_of(stages), environment={"PYTHONHOME": "/nothing"})
    with pytest.raises(QwenVLError, match="ended with exit code 1"):
        asyncio.run(ProcessEngineClient(broken).start())


def test_ctrl_c_is_for_the_front_and_stop_takes_no_answer(stages, monkeypatch):
    """Also for a process that does not react, as during a long step."""
    monkeypatch.setattr(engine_child, "_END_SECONDS", 0.5)

    async def use(client):
        pid = client.pid
        os.kill(pid, signal.SIGINT)
        stream = client.submit(words(4000))
        assert len(await stream.__anext__()) > 0
        os.kill(pid, signal.SIGSTOP)
        await client.stop()
        assert not running(pid)
        with pytest.raises(EngineUnavailable, match="ending"):
            await read(stream)
        with pytest.raises(EngineUnavailable, match="ending"):
            client.submit(words())

    with_engine(stages, use)


def test_an_interrupted_start_leaves_no_process(stages):
    async def run():
        client = ProcessEngineClient(settings_of(stages))
        starting = asyncio.ensure_future(client.start())
        await until(lambda: client.pid is not None)
        pid = client.pid
        starting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await starting
        assert not running(pid)

        starting = asyncio.ensure_future(client.start())
        await until(lambda: client.pid is not None)
        await client.stop()
        with pytest.raises(QwenVLError):
            await starting

    asyncio.run(run())


def test_log_probabilities_come_with_their_tokens(stages, local_model):
    asked = dataclasses.replace(words(20), n_logprobs=3)
    generation = local_model.generation(asked.prompt, [], [], asked.options, n_logprobs=3)
    loop = local_model.open_loop()
    loop.submit(generation)
    while loop.step():
        pass

    async def use(client):
        beside = client.submit(words(20))
        got = [token async for tokens in client.submit(asked) for token in tokens]
        assert await read(beside) == generation.tokens
        return [(token.id, token.logprob, token.top) for token in got]

    expected = [(token, *logprobs) for token, logprobs in zip(generation.tokens, generation.logprobs)]
    assert with_engine(stages, use) == expected
    assert len(expected) == 20
