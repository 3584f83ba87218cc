"""`qwenvl chat` on a pseudo-terminal."""

from __future__ import annotations

import json
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pexpect
import pytest
from chat_helpers import PROMPT_STARTS, STREET, Terminal

from paddlemix_qwenvl_plugin import QwenVL
from paddlemix_qwenvl_plugin.util.text import without_controls

Open = Callable[..., Terminal]

SHOW_CURSOR = "\x1b[?25h"


@pytest.fixture(autouse=True)
def _street_image(tmp_path: Path) -> None:
    shutil.copyfile(STREET, tmp_path / "the street.png")


def expected_answers(vl: QwenVL, *questions: str, n_tokens: int) -> list[str]:
    """Answers of QwenVL to the questions of a conversation about the image, whose path is relative."""
    history: list = []
    for question in questions:
        parts = [{"text": question}]
        if not history:
            # The same path as in the chat, since the path is a part of the prompt.
            parts.insert(0, {"image": "the street.png"})
        answer = vl.generate(parts, chat=True, history=history, max_new_tokens=n_tokens)
        history.append((parts, answer.text))
    return [answer for _, answer in history]


def test_conversation(
    open_terminal: Open, vl: QwenVL, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    questions = ["What is it?", "Sure?", "Why?", "Really?"]
    answers = expected_answers(vl, *questions, n_tokens=20)
    terminal = open_terminal("--max_new_tokens", "20")
    assert "/help" in terminal.greeting

    output = terminal.type("/help")
    for name in ("/image PATH", "/clear", "/save FILE", "/help", "/quit"):
        assert name in output
    assert terminal.type("/frobnicate now").strip() == "/frobnicate: no such command; see /help"
    assert terminal.type("/image nothing.png").strip() == "image nothing.png does not exist"
    assert terminal.type("/save talk.md").strip() == "/save: there is no answer yet to save"

    assert terminal.type("/image 'the street.png'").strip() == "Image 1: the street.png, 960 x 640"
    # No image preview, neither kitty's nor iTerm2's, which begins with the code 1337.
    assert "\x1b_G" not in terminal.raw
    assert "1337" not in terminal.raw
    for question, answer in zip(questions, answers):
        output = terminal.type(question)
        assert without_controls(answer) in output
        assert "(cut off at --max_new_tokens" in output

    assert terminal.type("/save talk.md").strip() == "saved: talk.md"
    assert terminal.type("/save talk.json").strip() == "saved: talk.json"
    # Without Markdown's backslash escapes.
    markdown = re.sub(r"\\(.)", r"\1", (tmp_path / "talk.md").read_text("utf-8"))
    for question, answer in zip(questions, answers):
        assert f"> {question}\n\n{without_controls(answer)}\n" in markdown
    assert "![Image 1](the%20street.png)" in markdown
    saved = json.loads((tmp_path / "talk.json").read_text("utf-8"))
    assert [turn["question"] for turn in saved["turns"]] == questions
    assert [turn["images"] for turn in saved["turns"]] == [["the street.png"], [], [], []]
    assert [turn["answer"]["text"] for turn in saved["turns"]] == answers
    # The image was encoded for the first question only. On a busy machine even the lookup for a later question can take
    # long, so the shortest of the later times counts.
    first, *later = (turn["answer"]["timings"]["encode_images"] for turn in saved["turns"])
    assert min(later) < 0.001 < 0.005 < first  # seconds

    assert "cleared" in terminal.type("/clear")
    assert terminal.type("/save again.md").strip() == "/save: there is no answer yet to save"
    answer_without_history = vl.generate("What is it?", chat=True, max_new_tokens=20).text
    assert without_controls(answer_without_history) in terminal.type("What is it?")
    assert terminal.exit() == 0
    assert {path.name for path in tmp_path.iterdir()} - {"home"} == {
        "the street.png",
        "talk.md",
        "talk.json",
    }


def test_tokens_are_written_as_they_are_generated(open_terminal: Open) -> None:
    terminal = open_terminal("--max_new_tokens", "400", "--min_new_tokens", "400")
    start = time.monotonic()
    terminal.start("Tell me all.")
    # The cursor is hidden with the hint "Ctrl-C stops", and shown again with the first token.
    terminal.child.expect_exact("Ctrl-C stops")
    terminal.child.expect_exact(SHOW_CURSOR)
    first_token = time.monotonic()
    writes = 0
    text = ""
    while PROMPT_STARTS not in text:
        text += terminal.child.read_nonblocking(100_000, timeout=60)
        writes += 1
    assert first_token - start < (time.monotonic() - start) / 2
    assert writes > 10


def test_ctrl_c(open_terminal: Open, tmp_path: Path) -> None:
    terminal = open_terminal(
        "--image", "the street.png", "--max_new_tokens", "3000", "--min_new_tokens", "3000"
    )
    assert "Image 1: the street.png" in terminal.greeting
    for question in ("First?", "Second?"):
        terminal.start(question)
        terminal.child.expect("Ctrl-C stops")
        terminal.child.expect_exact(SHOW_CURSOR)  # with the first token
        terminal.child.expect(r"(?s).{100}")  # a part of the answer
        terminal.child.sendintr()
        terminal.child.sendintr()  # a second Ctrl-C must not end the program
        # The terminal may echo a Ctrl-C as ^C.
        assert terminal.until_prompt().rstrip("^C").endswith("(stopped)\n")
    # At the prompt, Ctrl-C clears the line; otherwise Ctrl-D would not end the program.
    terminal.child.send("incomplete ques")
    terminal.child.sendintr()
    assert "/quit" in terminal.until_prompt()
    terminal.type("/save talk.json")
    assert terminal.exit() == 0
    turns = json.loads((tmp_path / "talk.json").read_text("utf-8"))["turns"]
    assert [turn["question"] for turn in turns] == ["First?", "Second?"]
    for turn in turns:
        assert turn["answer"]["finish_reason"] == "cancelled"
        assert 3 < len(turn["answer"]["token_ids"]) < 3000


def test_history_of_typed_lines(open_terminal: Open, tmp_path: Path) -> None:
    first = open_terminal()
    first.type("/one")
    first.type("/two")
    first.start("/quit")
    first.child.expect(pexpect.EOF)
    (history,) = (tmp_path / "home" / "state").rglob("chat-history")
    assert history.stat().st_mode & 0o077 == 0
    second = open_terminal()
    arrow_up = "\x1b[A"
    assert second.type(arrow_up * 3).strip() == "/one: no such command; see /help"
    # A history that cannot be written does not prevent the conversation.
    history.unlink()
    history.mkdir()
    third = open_terminal()
    assert "typed lines are not kept" in third.greeting
    assert third.type("/three").strip() == "/three: no such command; see /help"
    assert third.exit() == 0


def test_preview(open_terminal: Open) -> None:
    terminal = open_terminal("--image", "the street.png", TERM="xterm-kitty")
    assert "Image 1" in terminal.greeting
    assert terminal.raw.count("\x1b_Ga=T") == 1
    assert terminal.exit() == 0
