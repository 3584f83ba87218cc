"""The engine process through its client, compared with a QwenVL in the process of the test."""

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
from serve_engine_helpers import (
    RequestCase,
    is_running,
    model_settings,
    read_ids,
    run_with_client,
    text_request,
    wait_until,
)

from paddlemix_qwenvl_plugin import QwenVLError, UsageError
from paddlemix_qwenvl_plugin.serve import engine_child
from paddlemix_qwenvl_plugin.serve.engine_api import Ended, EngineUnavailable
from paddlemix_qwenvl_plugin.serve.engine_client import ProcessEngineClient

pytestmark = needs_compiler


def test_concurrent_completions_equal_those_of_qwenvl(stages, local_model):
    """32 concurrent requests; every fifth is cancelled after its first tokens."""
    rng = random.Random(1)
    cases = [RequestCase.make_random(local_model, rng) for _ in range(32)]
    expected = [case.expected_ids(local_model) for case in cases]
    assert len({tuple(ids) for ids in expected}) > 20
    assert any(case.request.images for case in cases)

    def is_cancelled(i):
        return i % 5 == 4

    async def scenario(client):
        streams = [client.submit(case.request) for case in cases]

        async def read_stream(i):
            ids = []
            async for tokens in streams[i]:
                ids += [token.id for token in tokens]
                if is_cancelled(i):
                    streams[i].cancel()
            return ids

        completions = await asyncio.gather(*(read_stream(i) for i in range(1, 32)))
        # The first stream is read when all others have ended.
        completions.insert(0, await read_ids(streams[0]))
        for i, (ids, expected_ids) in enumerate(zip(completions, expected)):
            assert ids == expected_ids[: len(ids)]
            ended = streams[i].ended
            if ended.reason == "cancelled":
                assert is_cancelled(i)
            else:
                assert ids == expected_ids
                stopped = expected_ids[-1] in cases[i].request.stop_token_ids
                assert ended.reason == ("stop" if stopped else "length")
            streams[i].cancel()  # a cancellation after the end raises no error
        await wait_until(lambda: client.stats.steps > 0 and client.stats.running == 0)
        stats = client.stats
        assert (stats.waiting, stats.blocks_used) == (0, 0)
        assert stats.blocks > 0
        assert stats.completion_tokens == sum(map(len, completions))
        assert stats.images_encoded == 3  # the random requests have three different images
        assert stats.prompt_tokens <= sum(len(case.request.prompt) for case in cases)
        assert stats.cached_tokens == sum(stream.ended.n_cached for stream in streams)
        repeated = client.submit(cases[3].request)
        assert await read_ids(repeated) == expected[3]
        # All full blocks of 32 tokens are cached, except that the last token of a prompt is always computed.
        assert repeated.ended.n_cached == (len(cases[3].request.prompt) - 1) // 32 * 32

    run_with_client(stages, scenario)


def test_cancellation_frees_blocks(stages):
    async def scenario(client):
        stream = client.submit(text_request(4000))
        await stream.__anext__()
        await wait_until(lambda: client.stats.running == 1)
        assert client.stats.blocks_used > 0
        stream.cancel()
        n_tokens = len(await read_ids(stream))
        assert stream.ended == Ended("cancelled", 0)
        assert n_tokens < 4000
        await wait_until(lambda: client.stats.running == 0)
        assert client.stats.blocks_used == 0

    run_with_client(stages, scenario)


def test_invalid_request_fails_without_effect_on_others(stages, local_model):
    image = np.zeros([local_model.config.visual.image_size] * 2 + [3], np.uint8)
    # Request and part of its error message.
    invalid = [
        (dataclasses.replace(text_request(), images=[image]), "images: 1, but the prompt has 0 "),
        (dataclasses.replace(text_request(), prompt=[5] * 9000), "no room in the context"),
        (dataclasses.replace(text_request(), prompt=[5, 10**6]), "ids must be 0 to"),
        (dataclasses.replace(text_request(), prompt=[]), "at least one token"),
        (dataclasses.replace(text_request(), n_logprobs=21), "n_logprobs: 21 is out of range"),
    ]

    async def scenario(client):
        valid_stream = client.submit(text_request(50))
        for request, message in invalid:
            with pytest.raises(QwenVLError, match=message) as raised:
                await read_ids(client.submit(request))
            assert not isinstance(raised.value, EngineUnavailable)
        assert len(await read_ids(valid_stream)) == 50

    run_with_client(stages, scenario)


def test_missing_or_damaged_model(stages, tmp_path):
    async def start(settings):
        client = ProcessEngineClient(settings)
        try:
            await client.start()
        finally:
            assert (client.ready, client.pid) == (False, None)
            with pytest.raises(EngineUnavailable):
                client.submit(text_request())

    missing = dataclasses.replace(model_settings(stages), first_model_path=tmp_path / "nothing")
    with pytest.raises(UsageError, match=f"{tmp_path}/nothing"):
        asyncio.run(start(missing))
    shutil.copytree(stages[1].parent, tmp_path / "text")
    (tmp_path / "text" / "qwen.pdiparams").write_bytes(b"damaged")
    damaged = dataclasses.replace(model_settings(stages), second_model_path=tmp_path / "text" / "qwen")
    with pytest.raises(QwenVLError, match=r"qwen\.pdiparams") as raised:
        asyncio.run(start(damaged))
    assert "\n" not in str(raised.value)


def test_process_that_exits_at_its_start(stages):
    """Python itself does not start, as if a library were missing, and the process sends no error message."""
    broken = dataclasses.replace(model_settings(stages), environment={"PYTHONHOME": "/nothing"})
    with pytest.raises(QwenVLError, match="ended with exit code 1"):
        asyncio.run(ProcessEngineClient(broken).start())


def test_process_ignores_sigint_and_stop_does_not_wait_for_a_reply(stages, monkeypatch):
    """SIGINT does not end the engine process: at Ctrl-C the front decides when it ends.

    `stop` kills a process that does not react, as during a long step; here it is suspended.
    """
    monkeypatch.setattr(engine_child, "_END_SECONDS", 0.5)

    async def scenario(client):
        pid = client.pid
        os.kill(pid, signal.SIGINT)
        stream = client.submit(text_request(4000))
        assert len(await stream.__anext__()) > 0
        os.kill(pid, signal.SIGSTOP)
        await client.stop()
        assert not is_running(pid)
        with pytest.raises(EngineUnavailable, match="ending"):
            await read_ids(stream)
        with pytest.raises(EngineUnavailable, match="ending"):
            client.submit(text_request())

    run_with_client(stages, scenario)


def test_interrupted_start_leaves_no_process(stages):
    async def interrupt_start():
        client = ProcessEngineClient(model_settings(stages))
        starting = asyncio.ensure_future(client.start())
        await wait_until(lambda: client.pid is not None)
        pid = client.pid
        starting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await starting
        assert not is_running(pid)

        starting = asyncio.ensure_future(client.start())
        await wait_until(lambda: client.pid is not None)
        pid = client.pid
        await client.stop()
        assert not is_running(pid)
        with pytest.raises(QwenVLError):
            await starting

    asyncio.run(interrupt_start())


def test_stop_immediately_after_start_leaves_no_process(stages):
    """`stop` cancels the supervisor before it has begun to run."""

    async def start_and_stop():
        client = ProcessEngineClient(model_settings(stages))
        await client.start()
        pid = client.pid
        await client.stop()
        assert not is_running(pid)
        assert client.pid is None

    asyncio.run(start_and_stop())


def test_log_probabilities_equal_those_of_qwenvl(stages, local_model):
    request = dataclasses.replace(text_request(20), n_logprobs=3)
    generation = local_model.generation(request.prompt, [], [], request.options, n_logprobs=3)
    loop = local_model.open_loop()
    loop.submit(generation)
    while loop.step():
        pass

    async def scenario(client):
        stream_without_logprobs = client.submit(text_request(20))
        tokens = [token async for new_tokens in client.submit(request) for token in new_tokens]
        assert await read_ids(stream_without_logprobs) == generation.tokens
        return [(token.id, token.logprob, token.top) for token in tokens]

    expected = [(token, *logprobs) for token, logprobs in zip(generation.tokens, generation.logprobs)]
    assert run_with_client(stages, scenario) == expected
    assert len(expected) == 20
