"""Mock S3 server for the cluster tests, and the condition under which tests marked `kills` run."""

from __future__ import annotations

import logging
import os
import uuid
from collections.abc import Iterator

import pytest


@pytest.fixture(scope="session")
def s3() -> Iterator[None]:
    """Run a mock S3 server; environment variables make this process and its child processes use it for `s3://`."""
    server = pytest.importorskip("moto.server", reason="moto is missing; pip install 'moto[server]' s3fs")
    pytest.importorskip("s3fs", reason="s3fs is missing; pip install s3fs")
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    running = server.ThreadedMotoServer("127.0.0.1", 0)
    running.start()
    address, port = running.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", f"http://{address}:{port}")
        patch.setenv("AWS_ACCESS_KEY_ID", "tests")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "tests")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        yield
    running.stop()


@pytest.fixture
def bucket(s3: None) -> str:
    """URL of an empty bucket."""
    from fsspec import filesystem

    name = f"qwenvl-{uuid.uuid4().hex[:12]}"
    filesystem("s3").mkdir(name)
    return f"s3://{name}"


@pytest.hookimpl(tryfirst=True)  # before the fixtures: a skipped test must not start a cluster
def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("kills") and not os.environ.get("QWENVL_TEST_CLUSTER_KILLS"):
        pytest.skip(
            "kills parts of a Ray cluster, which needs a machine without other work; set QWENVL_TEST_CLUSTER_KILLS=1"
        )
