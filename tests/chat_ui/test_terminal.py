"""The chat on a pseudo-terminal."""

from __future__ import annotations

import json
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pexpect
import pytest
from chat_helpers import STREET, Terminal

from paddlemix_qwenvl_plugin import QwenVL
from paddlemix_qwenvl_plugin.util.text import without_controls

Open = Callable[..., Terminal]


@pytest.fixture(autouse=True)
def _image(tmp_path: Path) -> None:
    shutil.copyfile(STREET, tmp_path / "the street.png")


def expected(vl: QwenVL, folder: Path, *questions: str, n_tokens: int) -> list[str]:
    """Answers to questions about the image, each computed from the whole conversation so far."""
    history: list = []
    for question in questions:
        parts = [{"text": question}]
        if not history:
            # By the name that was typed, for the name is a part of the prompt.
            parts.insert(0, {"image": "the street.png"})
        answer = vl.generate(parts, chat=True, history=history, max_new_tokens=n_tokens)
        history.append((parts, answer.text))
    return [answer for _, answer in history]


def test_a_session(open_terminal: Open, vl: QwenVL, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    questions = ["What is it?", "Sure?", "Why?", "Really?"]
    answers = expected(vl, tmp_path, *questions, n_tokens=20)
    terminal = open_terminal("--max_new_tokens", "20")
    assert "/help" in terminal.greeting

    shown = terminal.type("/help")
    for name in ("/image PATH", "/clear", "/save FILE", "/help", "/quit"):
        assert name in shown
    assert terminal.type("/frobnicate now").strip() == "/frobnicate: no such command; see /help"
    assert terminal.type("/image nothing.png").strip() == "image nothing.png does not exist"
    assert terminal.type("/save talk.md").strip() == "/save: there is no answer yet to save"

    assert terminal.type("/image 'the street.png'").strip() == "Image 1: the street.png, 960 x 640"
    assert "\x1b_G" not in terminal.raw
    assert "1337" not in terminal.raw
    for question, answer in zip(questions, answers):
        shown = terminal.type(question)
        assert without_controls(answer) in shown
        assert "(cut off at --max_new_tokens" in shown

    assert terminal.type("/save talk.md").strip() == "saved: talk.md"
    assert terminal.type("/save talk.json").strip() == "saved: talk.json"
    markdown = re.sub(r"\\(.)", r"\1", (tmp_path / "talk.md").read_text("utf-8"))
    for question, answer in zip(questions, answers):
        assert f"> {question}\n\n{without_controls(answer)}\n" in markdown
    assert "![Image 1](the%20street.png)" in markdown
    saved = json.loads((tmp_path / "talk.json").read_text("utf-8"))
    assert [turn["question"] for turn in saved["turns"]] == questions
    assert [turn["images"] for turn in saved["turns"]] == [["the street.png"], [], [], []]
    assert [turn["answer"]["text"] for turn in saved["turns"]] == answers
    # The image was encoded for the first question, and not even looked up for the others (the quickest: the
    # machine may be busy).
    first, *others = (turn["answer"]["timings"]["encode_images"] for turn in saved["turns"])
    assert min(others) < 0.001 < 0.005 < first

    assert "cleared" in terminal.type("/clear")
    assert terminal.type("/save again.md").strip() == "/save: there is no answer yet to save"
    fresh = vl.generate("What is it?", chat=True, max_new_tokens=20).text
    assert without_controls(fresh) in terminal.type("What is it?")
    assert terminal.leave() == 0
    assert {path.name for path in tmp_path.iterdir()} - {"home"} == {
        "the street.png",
        "talk.md",
        "talk.json",
    }


def test_tokens_come_as_they_are_made(open_terminal: Open) -> None:
    terminal = open_terminal("--max_new_tokens", "400", "--min_new_tokens", "400")
    start = time.monotonic()
    terminal.start("Tell me all.")
    # The cursor comes back with the first words.
    terminal.child.expect_exact("Ctrl-C stops")
    terminal.child.expect_exact("\x1b[?25h")
    first_word = time.monotonic()
    writes = 0
    text = ""
    while "\x1b[?2004h" not in text:
        text += terminal.child.read_nonblocking(100_000, timeout=60)
        writes += 1
    assert first_word - start < (time.monotonic() - start) / 2
    assert writes > 10


def test_ctrl_c(open_terminal: Open, tmp_path: Path) -> None:
    terminal = open_terminal(
        "--image", "the street.png", "--max_new_tokens", "3000", "--min_new_tokens", "3000"
    )
    assert "Image 1: the street.png" in terminal.greeting
    for question in ("First?", "Second?"):
        terminal.start(question)
        terminal.child.expect("Ctrl-C stops")
        terminal.child.expect_exact("\x1b[?25h")  # the first words
        terminal.child.expect(r"(?s).{100}")
        terminal.child.sendintr()
        terminal.child.sendintr()  # impatient: must not end the program
        assert terminal.until_prompt().rstrip("^C").endswith("(stopped)\n")
    # At the prompt it clears the line: else Ctrl-D would not leave.
    terminal.child.send("half a ques")
    terminal.child.sendintr()
    assert "/quit" in terminal.until_prompt()
    terminal.type("/save talk.json")
    assert terminal.leave() == 0
    turns = json.loads((tmp_path / "talk.json").read_text("utf-8"))["turns"]
    assert [turn["question"] for turn in turns] == ["First?", "Second?"]
    for turn in turns:
        assert turn["answer"]["finish_reason"] == "cancelled"
        assert 3 < len(turn["answer"]["token_ids"]) < 3000


def test_typed_lines_are_kept(open_terminal: Open, tmp_path: Path) -> None:
    first = open_terminal()
    first.type("/one")
    first.type("/two")
    first.start("/quit")
    first.child.expect(pexpect.EOF)
    (history,) = (tmp_path / "home" / "state").rglob("chat-history")
    assert history.stat().st_mode & 0o077 == 0
    second = open_terminal()
    up = "\x1b[A"
    assert second.type(up * 3).strip() == "/one: no such command; see /help"
    # A history that cannot be written does not prevent the conversation.
    history.unlink()
    history.mkdir()
    third = open_terminal()
    assert "typed lines are not kept" in third.greeting
    assert third.type("/three").strip() == "/three: no such command; see /help"
    assert third.leave() == 0


def test_preview(open_terminal: Open) -> None:
    terminal = open_terminal("--image", "the street.png", TERM="xterm-kitty")
    assert "Image 1" in terminal.greeting
    assert terminal.raw.count("\x1b_Ga=T") == 1
    assert terminal.leave() == 0
