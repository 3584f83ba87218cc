"""The table of the front's cost in benchmarks/serve.py."""

from __future__ import annotations

from typing import Any

import pytest
from serve import print_front


def row(name: str, tokens: int, seconds: float, **cpu: float) -> dict[str, Any]:
    return {"load": "4 clients", "name": name, "tokens": tokens, "seconds": seconds, **cpu}


@pytest.mark.parametrize(
    ("tokens", "seconds", "cells"),
    [(90, 1.0, "90.0 | 10.0% | 2000 | 1000"), (0, 0.0, "0.0 |  |  | ")],
    ids=["answered", "every request failed"],
)
def test_front(capsys: pytest.CaptureFixture[str], tokens: int, seconds: float, cells: str) -> None:
    """`cells`: tokens/s of the server, its loss compared with the loop, us of CPU per token of server and client."""
    print_front(
        [row("loop", 100, 1.0), row("qwenvl serve", tokens, seconds, server_cpu=0.18, client_cpu=0.09)]
    )
    assert capsys.readouterr().out.splitlines()[-1] == f"| 4 clients | 100.0 | {cells} |"
