"""Each row of the server's tables in docs/errors.md is a test of the error's status, code, param and message.

With QWENVL_TEST_UPDATE_ERRORS=1, messages that differ are rewritten in the document (tests/error_table.py).
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import NamedTuple, Optional

import pytest
from error_table import check, table_rows
from serve_error_cases import CASES, ConfigurableServer


class Row(NamedTuple):
    """Row of a table; `…` in the message matches any text that is not empty."""

    request: str
    status: int
    code: Optional[str]
    param: Optional[str]
    message: str


def read_rows() -> list[Row]:
    """The rows of all tables with the columns request, status, code, param, message."""
    rows = []
    for cells in table_rows():
        if len(cells) == 5 and cells[1].isdigit():
            request, status, *texts = cells
            code, param, message = (text.strip("`").strip() or None for text in texts)
            rows.append(Row(request, int(status), code, param, message or ""))
    return rows


def read_types() -> dict[int, tuple[str, bool]]:
    """Status -> (OpenAI's error type, whether the response has a header Retry-After), from the table of statuses."""
    types = {}
    for cells in table_rows():
        if len(cells) == 4 and cells[0].isdigit():
            types[int(cells[0])] = cells[1].strip("`"), cells[2] == "yes"
    return types


ROWS = read_rows()


@pytest.fixture(scope="module")
def loop() -> Iterator[asyncio.AbstractEventLoop]:
    loop = asyncio.new_event_loop()
    yield loop
    loop.close()


@pytest.fixture(scope="module")
def shared_server(
    loop: asyncio.AbstractEventLoop, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ConfigurableServer]:
    server = ConfigurableServer(tmp_path_factory.mktemp("serve-errors"))
    yield server
    loop.run_until_complete(server.close())


@pytest.fixture
def server(shared_server: ConfigurableServer) -> ConfigurableServer:
    shared_server.reset()
    return shared_server


def test_every_row_has_a_case_and_every_case_a_row() -> None:
    assert [row.request for row in ROWS] == list(CASES)
    assert len(ROWS) >= 60


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.request.replace("`", ""))
def test_error(row: Row, server: ConfigurableServer, loop: asyncio.AbstractEventLoop) -> None:
    response = loop.run_until_complete(asyncio.wait_for(CASES[row.request](server), 60))
    error = response.error
    assert set(error) == {"message", "type", "param", "code"}
    assert (response.status, error["code"], error["param"]) == (row.status, row.code, row.param), error
    check(row.request, row.message, error["message"])
    # Status 200: an error event of a stream.
    types = {200: ("server_error", False), **read_types()}
    assert (error["type"], "retry-after" in response.headers) == types[row.status]
    assert response.headers["x-request-id"]
    assert "\n" not in error["message"]
