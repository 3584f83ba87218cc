"""Every row of the server's tables in docs/errors.md is a test: the request gives that status, code and message."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import NamedTuple, Optional

import pytest
from error_table import check, table_rows
from serve_error_cases import CASES, Bench


class Row(NamedTuple):
    """Row of the table; `…` in param and message matches any text."""

    what: str
    status: int
    code: Optional[str]
    param: Optional[str]
    message: str


def rows() -> list[Row]:
    found = []
    for row in table_rows():
        if len(row) == 5 and row[1].isdigit():
            what, status, *texts = row
            code, param, message = (text.strip("`").strip() or None for text in texts)
            found.append(Row(what, int(status), code, param, message or ""))
    return found


def kinds() -> dict[int, tuple[str, bool]]:
    """Status -> OpenAI's type, and whether there is a Retry-After."""
    found = {}
    for row in table_rows():
        if len(row) == 4 and row[0].isdigit():
            found[int(row[0])] = row[1].strip("`"), row[2] == "yes"
    return found


ROWS = rows()


@pytest.fixture(scope="module")
def loop() -> Iterator[asyncio.AbstractEventLoop]:
    loop = asyncio.new_event_loop()
    yield loop
    loop.close()


@pytest.fixture(scope="module")
def shared(loop: asyncio.AbstractEventLoop, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    bench = Bench(tmp_path_factory.mktemp("serve-errors"))
    yield bench
    loop.run_until_complete(bench.close())


@pytest.fixture
def bench(shared: Bench) -> Bench:
    shared.reset()
    return shared


def test_the_tables_and_the_cases_agree() -> None:
    assert [row.what for row in ROWS] == list(CASES)
    assert len(ROWS) >= 60


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.what.replace("`", ""))
def test_error(row: Row, bench: Bench, loop: asyncio.AbstractEventLoop) -> None:
    got = loop.run_until_complete(asyncio.wait_for(CASES[row.what](bench), 60))
    assert set(got.error) == {"message", "type", "param", "code"}
    kind = got.error["code"], got.error["param"]
    assert (got.status, *kind) == (row.status, row.code, row.param), got.error
    check(row.what, row.message, got.error["message"])
    # An error event in a stream has the type of the corresponding error response.
    types = {200: ("server_error", False), **kinds()}
    assert (got.error["type"], "retry-after" in got.headers) == types[row.status]
    assert got.headers["x-request-id"]
    assert "\n" not in got.error["message"]
