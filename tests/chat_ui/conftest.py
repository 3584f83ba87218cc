"""The whole program around a scripted model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import executors
import pytest
from chat_helpers import Terminal

from paddlemix_qwenvl_plugin import QwenVL


@pytest.fixture(scope="session")
def vl(tiny_exported: Path) -> QwenVL:
    return QwenVL.from_exported(tiny_exported / "vision" / "vision", tiny_exported / "text" / "qwen")


@pytest.fixture
def say(vl: QwenVL, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Function that sets the text of all following answers."""

    def say(text: str) -> None:
        executors.say(vl, monkeypatch, [*vl.tokenizer.encode(text), vl.tokenizer.im_end_id])

    return say


@pytest.fixture
def open_terminal(tiny_exported: Path, tmp_path: Path) -> Iterator[Callable[..., Terminal]]:
    """Function that opens a chat on a pseudo-terminal, with arguments and environment variables."""
    opened = []

    def open_one(*arguments: str, **variables: str) -> Terminal:
        opened.append(Terminal(tiny_exported, tmp_path, *arguments, **variables))
        return opened[-1]

    yield open_one
    for terminal in opened:
        terminal.child.close(force=True)
