"""Fixtures for tests of `qwenvl chat`: the tiny model, scripted answers, a pseudo-terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import executors
import pytest
from chat_helpers import Terminal

from paddlemix_qwenvl_plugin import QwenVL


@pytest.fixture(scope="session")
def vl(tiny_exported: Path) -> QwenVL:
    """The tiny model, opened in this process."""
    return QwenVL.from_exported(tiny_exported / "vision" / "vision", tiny_exported / "text" / "qwen")


@pytest.fixture
def say(vl: QwenVL, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Function that makes the model give a text as every answer from then on."""

    def say(text: str) -> None:
        executors.script_completion(vl, monkeypatch, [*vl.tokenizer.encode(text), vl.tokenizer.im_end_id])

    return say


@pytest.fixture
def open_terminal(tiny_exported: Path, tmp_path: Path) -> Iterator[Callable[..., Terminal]]:
    """Function that starts `qwenvl chat` on a pseudo-terminal, with arguments and environment variables."""
    terminals = []

    def open_terminal(*arguments: str, **variables: str) -> Terminal:
        terminals.append(Terminal(tiny_exported, tmp_path, *arguments, **variables))
        return terminals[-1]

    yield open_terminal
    for terminal in terminals:
        terminal.child.close(force=True)
