"""Kills of the engine process and of the front."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
import subprocess
import sys
import time

import pytest
from engines import needs_compiler
from serve_engine_helpers import PATIENCE, RequestCase, read, running, until, with_engine, words

from paddlemix_qwenvl_plugin.serve import engine_client
from paddlemix_qwenvl_plugin.serve.engine_api import EngineStats, EngineUnavailable

pytestmark = [
    needs_compiler,
    pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc, which only Linux has"),
]


def test_killed_ten_times_under_load(stages, local_model):
    """Each request ends with its answer or a one-line error, and a new process answers."""
    rng = random.Random(2)
    asked = [RequestCase.at_random(local_model, rng) for _ in range(12)]
    expected = [each.expected_ids(local_model) for each in asked]
    pids, lines = [], []

    async def use(client):
        async def ask(i):
            try:
                assert await read(client.submit(asked[i].request)) == expected[i]
            except EngineUnavailable as error:
                lines.append(str(error))

        for n in range(10):
            pids.append(client.pid)
            long = client.submit(words(4000))
            await long.__anext__()
            asking = [asyncio.ensure_future(ask(i)) for i in range(12)]
            await asyncio.sleep(0.002 * n)  # at another point of their way each time
            os.kill(client.pid, signal.SIGKILL)
            with pytest.raises(EngineUnavailable, match=r"was killed \(SIGKILL\)"):
                await read(long)
            await asyncio.gather(*asking)
            assert client.stats == EngineStats()
            await until(lambda: client.ready)
            assert client.restarts == n + 1
        await asyncio.gather(*(ask(i) for i in range(12)))
        pids.append(client.pid)

    with_engine(stages, use)
    assert lines
    assert all("\n" not in line for line in lines)
    assert len(set(pids)) == 11
    assert not any(map(running, pids))


def test_a_process_that_dies_while_it_starts_is_tried_again(stages, tmp_path, monkeypatch):
    """Restarts with backoff; meanwhile requests are refused with the process's error."""
    monkeypatch.setattr(engine_client, "_FIRST_PAUSE_SECONDS", 0.01)
    away = stages[1].parent.with_name("away")

    async def use(client):
        stages[1].parent.rename(away)
        try:
            os.kill(client.pid, signal.SIGKILL)
            await until(lambda: "cannot be started again" in refusal(client))
            assert "text" in refusal(client)
            assert not client.ready
        finally:
            away.rename(stages[1].parent)
        await until(lambda: client.ready)
        assert len(await read(client.submit(words(5)))) == 5

    with_engine(stages, use)


def refusal(client):
    if client.ready:
        return ""
    with pytest.raises(EngineUnavailable) as raised:
        client.submit(words())
    return str(raised.value)


_FRONT = """
import asyncio, sys
from pathlib import Path
from paddlemix_qwenvl_plugin import GenerationOptions
from paddlemix_qwenvl_plugin.serve.engine_api import EngineRequest, ModelSettings
from paddlemix_qwenvl_plugin.serve.engine_client import ProcessEngineClient

async def main():
    client = ProcessEngineClient(ModelSettings(Path(sys.argv[1]), Path(sys.argv[2])))
    starting = asyncio.ensure_future(client.start())
    while client.pid is None:
        await asyncio.sleep(0.01)
    if sys.argv[3] == "opening":
        print(client.pid, flush=True)
    await starting
    if sys.argv[3] == "idle":
        while not client.stats.blocks:
            await asyncio.sleep(0.01)
        print(client.pid, flush=True)
        await asyncio.sleep(1000)
    options = GenerationOptions(max_new_tokens=8000)
    streams = [client.submit(EngineRequest([i, 20, 30], [], [], options)) for i in range(64)]
    async for _ in streams[0]:
        if sys.argv[3] == "running":
            print(client.pid, flush=True)
            sys.argv[3] = ""

asyncio.run(main())
"""


@pytest.mark.parametrize("when", ["opening", "idle", "running"])
def test_no_orphan_survives_a_front_that_is_killed(stages, when):
    front = subprocess.Popen([sys.executable, "-c", _FRONT, *map(str, stages), when], stdout=subprocess.PIPE)
    assert front.stdout is not None
    try:
        pid = int(front.stdout.readline())
        assert running(pid)
    finally:
        front.kill()
        front.wait()
        front.stdout.close()
    end = time.monotonic() + PATIENCE
    while running(pid):
        assert time.monotonic() < end
        time.sleep(0.02)


def test_an_engine_without_a_device_ends(stages, tmp_path):
    """After a failed step the device is checked; if it is lost, a new process is started."""
    (tmp_path / "sitecustomize.py").write_text(_LOST_GPU)
    client = None
    with contextlib.ExitStack() as stack:
        monkeypatch = stack.enter_context(pytest.MonkeyPatch.context())
        monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
        monkeypatch.setenv("LOST_GPU", str(tmp_path / "lost"))

        async def use(started):
            nonlocal client
            client = started
            (tmp_path / "lost").touch()
            with pytest.raises(Exception, match="computing on the GPU") as raised:
                await read(client.submit(words(5)))
            assert not isinstance(raised.value, EngineUnavailable)
            await until(lambda: client.restarts == 1)
            (tmp_path / "lost").unlink()
            await until(lambda: client.ready)
            assert len(await read(client.submit(words(5)))) == 5

        with_engine(stages, use)


# Stands in for a GPU that is lost while a file is there.
_LOST_GPU = """
import os
if os.environ.get("LOST_GPU"):
    import importlib.abc, importlib.machinery, sys

    class Finder(importlib.abc.MetaPathFinder):
        def find_spec(self, name, path=None, target=None):
            if name != "paddlemix_qwenvl_plugin.serve.messages":
                return None
            from paddlemix_qwenvl_plugin.runtime.engine_executor import EngineExecutor
            from paddlemix_qwenvl_plugin.util.errors import QwenVLError

            def failing(function):
                def maybe(*arguments):
                    if os.path.exists(os.environ["LOST_GPU"]):
                        raise QwenVLError("computing on the GPU: it is lost")
                    return function(*arguments)

                return maybe

            EngineExecutor.start = failing(EngineExecutor.start)
            EngineExecutor.check_device = failing(EngineExecutor.check_device)
            return None

    sys.meta_path.insert(0, Finder())
"""
