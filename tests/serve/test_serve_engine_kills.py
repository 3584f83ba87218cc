"""Engine process and front that are killed, and an engine process that loses its GPU."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import subprocess
import sys
import time

import pytest
from engines import needs_compiler
from serve_engine_helpers import (
    TIMEOUT,
    RequestCase,
    is_running,
    read_ids,
    run_with_client,
    text_request,
    wait_until,
)

from paddlemix_qwenvl_plugin.serve import engine_client
from paddlemix_qwenvl_plugin.serve.engine_api import EngineStats, EngineUnavailable

pytestmark = [
    needs_compiler,
    pytest.mark.skipif(sys.platform != "linux", reason="reads /proc, which only Linux has"),
]


def test_killed_ten_times_under_load(stages, local_model):
    """Each request ends with the expected tokens or a one-line error; a new process serves the next requests."""
    rng = random.Random(2)
    cases = [RequestCase.make_random(local_model, rng) for _ in range(12)]
    expected = [case.expected_ids(local_model) for case in cases]
    pids, messages = [], []

    async def scenario(client):
        async def ask(i):
            try:
                assert await read_ids(client.submit(cases[i].request)) == expected[i]
            except EngineUnavailable as error:
                messages.append(str(error))

        for n in range(10):
            pids.append(client.pid)
            long_stream = client.submit(text_request(4000))
            await long_stream.__anext__()
            asking = [asyncio.ensure_future(ask(i)) for i in range(12)]
            await asyncio.sleep(0.002 * n)  # each kill meets the requests in another state
            os.kill(client.pid, signal.SIGKILL)
            with pytest.raises(EngineUnavailable, match=r"was killed \(SIGKILL\)"):
                await read_ids(long_stream)
            await asyncio.gather(*asking)
            assert client.stats == EngineStats()
            await wait_until(lambda: client.ready)
            assert client.restarts == n + 1
        await asyncio.gather(*(ask(i) for i in range(12)))
        pids.append(client.pid)

    run_with_client(stages, scenario)
    assert messages
    assert all("\n" not in message for message in messages)
    assert len(set(pids)) == 11
    assert not any(map(is_running, pids))


def test_failed_restart_is_repeated(stages, monkeypatch):
    """Restarts are tried until one succeeds; meanwhile requests are refused with the error of the last restart."""
    monkeypatch.setattr(engine_client, "_FIRST_PAUSE_SECONDS", 0.01)
    moved = stages[1].parent.with_name("moved")

    async def scenario(client):
        stages[1].parent.rename(moved)
        try:
            os.kill(client.pid, signal.SIGKILL)
            await wait_until(lambda: "cannot be started again" in submit_error(client))
            assert "text" in submit_error(client)  # the path of the missing stage
            assert not client.ready
        finally:
            moved.rename(stages[1].parent)
        await wait_until(lambda: client.ready)
        assert len(await read_ids(client.submit(text_request(5)))) == 5

    run_with_client(stages, scenario)


def submit_error(client):
    """The message with which a client refuses requests; empty if it is ready."""
    if client.ready:
        return ""
    with pytest.raises(EngineUnavailable) as raised:
        client.submit(text_request())
    return str(raised.value)


# A front in place of `qwenvl serve`. It prints the id of the engine process when the engine process is in the state
# that the third argument names: "opening" the model, "idle", or "running" requests.
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


@pytest.mark.parametrize("state", ["opening", "idle", "running"])
def test_engine_process_exits_when_the_front_is_killed(stages, state):
    front = subprocess.Popen([sys.executable, "-c", _FRONT, *map(str, stages), state], stdout=subprocess.PIPE)
    assert front.stdout is not None
    try:
        pid = int(front.stdout.readline())
        assert is_running(pid)
    finally:
        front.kill()
        front.wait()
        front.stdout.close()
    end = time.monotonic() + TIMEOUT
    while is_running(pid):
        assert time.monotonic() < end
        time.sleep(0.02)


def test_engine_process_that_loses_its_gpu_is_replaced(stages, tmp_path):
    """After a failed step the process checks its device; if the device is lost, the process exits."""
    (tmp_path / "sitecustomize.py").write_text(_LOST_GPU)
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
        monkeypatch.setenv("LOST_GPU", str(tmp_path / "lost"))

        async def scenario(client):
            (tmp_path / "lost").touch()
            with pytest.raises(Exception, match="computing on the GPU") as raised:
                await read_ids(client.submit(text_request(5)))
            assert not isinstance(raised.value, EngineUnavailable)
            await wait_until(lambda: client.restarts == 1)
            (tmp_path / "lost").unlink()
            await wait_until(lambda: client.ready)
            assert len(await read_ids(client.submit(text_request(5)))) == 5

        run_with_client(stages, scenario)


# sitecustomize.py, which Python runs at the start of the engine process. While the file that the environment variable
# LOST_GPU names exists, steps and the check of the device fail. For this, it replaces methods of EngineExecutor when
# the engine process imports serve/messages.py.
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
                def replacement(*arguments):
                    if os.path.exists(os.environ["LOST_GPU"]):
                        raise QwenVLError("computing on the GPU: it is lost")
                    return function(*arguments)

                return replacement

            EngineExecutor.start = failing(EngineExecutor.start)
            EngineExecutor.check_device = failing(EngineExecutor.check_device)
            return None

    sys.meta_path.insert(0, Finder())
"""
