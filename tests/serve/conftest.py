"""Fixtures for all server tests: the exported demo model, the same model without a server, a server process."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from serve_process import ServerProcess

from paddlemix_qwenvl_plugin import QwenVL
from paddlemix_qwenvl_plugin.engine.build import cache_folder
from paddlemix_qwenvl_plugin.serve.demo_model import DemoStages, demo_stages


@pytest.fixture(scope="session")
def demo_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Cache folder (QWENVL_CACHE_DIR) for the exported demo model.

    A link to the user's compiled engine avoids another compilation.
    """
    folder = tmp_path_factory.mktemp("serve-cache")
    compiled_engine = cache_folder()
    compiled_engine.mkdir(parents=True, exist_ok=True)
    (folder / "engine").symlink_to(compiled_engine, target_is_directory=True)
    return folder


@pytest.fixture(scope="session")
def stages(demo_cache: Path) -> DemoStages:
    """The exported stages of the demo model."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QWENVL_CACHE_DIR", str(demo_cache))
        return demo_stages(print)


@pytest.fixture(scope="session")
def local_model(stages: DemoStages) -> QwenVL:
    """The demo model, opened in this process: the reference for the completions of a server."""
    model = QwenVL.from_exported(*stages)
    model.load()
    return model


@pytest.fixture
def serve_demo(demo_cache: Path, stages: DemoStages) -> Iterator[Callable[..., ServerProcess]]:
    """Function that starts `qwenvl serve --demo` with flags on a free port; the process is killed after the test."""
    servers: list[ServerProcess] = []

    def start(*flags: object) -> ServerProcess:
        flags = ("--demo", "--port", 0, *flags)
        servers.append(ServerProcess(flags, environment={"QWENVL_CACHE_DIR": str(demo_cache)}))
        return servers[-1]

    yield start
    for server in servers:
        server.close()
