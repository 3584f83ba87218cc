"""Fixtures for tests of OpenAI's routes: a server of the demo model under uvicorn in a thread, with clients.

The server has the routes and their error handlers, but no middleware. Its engine client, image loader and slot queue
are the test doubles of serve_openai_engine.py; the engine runs in this process.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import httpx
import openai
import pytest
import uvicorn
from fastapi import FastAPI
from serve_openai_engine import Engine, Images, NoLimits
from serve_openai_helpers import NAME, Server, wait_for

from paddlemix_qwenvl_plugin import QwenVL
from paddlemix_qwenvl_plugin.serve.demo_model import DemoStages
from paddlemix_qwenvl_plugin.serve.error_response import install_handlers
from paddlemix_qwenvl_plugin.serve.openai.routes import router
from paddlemix_qwenvl_plugin.serve.service import Service
from paddlemix_qwenvl_plugin.serve.settings import ServeSettings


@pytest.fixture(scope="session")
def shared_server(stages: DemoStages) -> Iterator[Server]:
    """Server for all tests of the session; tests use the fixture `server`, which restores it."""
    vl = QwenVL.from_exported(*stages)  # not the fixture local_model: tests replace this model's loop
    engine, images, admission = Engine(vl), Images(vl.config.visual.image_size), NoLimits()
    service = Service(
        ServeSettings(max_new_tokens=2000),  # an error in test_serve_openai_errors.py names the limit
        engine,
        vl.tokenizer,
        vl.config,
        True,  # is_chat
        NAME,
        images,
        admission,
    )
    app = FastAPI()
    app.include_router(router(service))
    install_handlers(app)

    config = uvicorn.Config(app, port=0, log_config=None, log_level="error", lifespan="off")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    wait_for(lambda: server.started)
    port = server.servers[0].sockets[0].getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=60)
    with client, httpx.Client(base_url=url, timeout=60) as http:
        yield Server(url, service, engine, images, admission, client, http)
    server.should_exit = True
    asyncio.run(engine.stop())
    thread.join(30)


@pytest.fixture
def server(shared_server: Server, caplog: pytest.LogCaptureFixture) -> Iterator[Server]:
    """The server, restored to its initial state after the test; a test fails if an error is logged while it runs."""
    service, engine, admission = shared_server.service, shared_server.engine, shared_server.admission
    loop = engine.vl._loop
    initial_service = replace(service)
    yield shared_server
    vars(service).update(vars(initial_service))
    admission.refuse_with = None
    shared_server.wait_until_idle()
    engine.vl._loop = loop
    engine.reset()
    admission.max_slots_in_use = 0
    admission.keys.clear()
    shared_server.images.loaded.clear()
    assert not [record for record in caplog.get_records("call") if record.levelname == "ERROR"]


@pytest.fixture
def change_settings(server: Server) -> Callable[..., None]:
    """Function that changes settings of the server for this test."""

    def change(**settings: Any) -> None:
        server.service.settings = server.service.settings.model_copy(update=settings)

    return change
