"""Conversations with a scripted model: boxes, images, transcripts, errors."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from chat_helpers import STREET, plain
from PIL import Image

from paddlemix_qwenvl_plugin import GenerationOptions, QwenVL
from paddlemix_qwenvl_plugin.chat_ui.conversation import Conversation, converse
from paddlemix_qwenvl_plugin.chat_ui.session import Session
from paddlemix_qwenvl_plugin.chat_ui.terminal import TerminalView

# Boxes of two objects, Markdown's special characters, and a malformed box.
ANSWER = (
    "<ref>A red house</ref><box>(73,172),(417,676)</box> stands by <ref>two dogs</ref>"
    "<box>(500,500),(600,600)</box><box>(0,0),(1000,1000)</box>; 5 * 3 < 2 <box>(1,2)</box>."
)

Say = Callable[[str], None]
Talk = Callable[..., str]


def press_ctrl_c() -> None:
    os.kill(os.getpid(), signal.SIGINT)


@pytest.fixture
def session(vl: QwenVL) -> Session:
    return Session(vl, "Be brief.", GenerationOptions(max_new_tokens=200))


@pytest.fixture
def talk(
    session: Session, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Talk:
    """Function that types lines and then Ctrl-D, and returns the output.

    An exception in place of a line stands for a key: KeyboardInterrupt for Ctrl-C, EOFError for Ctrl-D.
    """
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TERM", "dumb")
    shutil.copyfile(STREET, "street.png")
    terminal = TerminalView()
    conversation = Conversation(session, terminal)

    def talk(*lines: str | type[BaseException]) -> str:
        remaining = iter([*lines, EOFError])

        def read_line() -> str:
            line = next(remaining)
            if isinstance(line, str):
                return line
            raise line

        converse(conversation, terminal, read_line)
        return capsys.readouterr().out

    return talk


def test_boxes(talk: Talk, say: Say) -> None:
    say(ANSWER)
    Path("street-boxes-1.png").write_text("other file")
    output = talk("/image street.png", "Where?", "And now?")
    answer = "A red house [1] stands by two dogs [2] [3]; 5 * 3 < 2 <box>(1,2)</box>."
    assert output.count(f"{answer}\n") == 2
    boxes = "[1] A red house: (70, 110), (400, 433)\n[2] two dogs: (480, 320), (576, 384)\n"
    assert output.count(f"{boxes}[3] two dogs: (0, 0), (960, 640)\n") == 2
    assert output.count("is malformed: '(1,2)'\n") == 2
    # The file that exists already is not overwritten.
    assert "boxes drawn: street-boxes-2.png" in output
    assert "boxes drawn: street-boxes-3.png" in output
    assert Path("street-boxes-1.png").read_text() == "other file"
    assert {path.name for path in Path().iterdir()} == {
        "street.png",
        *(f"street-boxes-{n}.png" for n in (1, 2, 3)),
    }
    before = np.asarray(Image.open("street.png").convert("RGB"), np.int16)
    after = np.asarray(Image.open("street-boxes-2.png"), np.int16)
    assert after.shape == before.shape
    changed = np.abs(after - before).sum(-1) > 0
    assert changed[110:433, 70].mean() > 0.95  # the left edge of the house
    assert changed[420:, 20:50].mean() < 0.2  # beside the house, where only box 3 has an edge


def test_boxes_without_an_image(talk: Talk, say: Say) -> None:
    say("<box>(1,2),(3,4)</box>")
    output = talk("Where?")
    assert "\n[1]: (1, 2), (3, 4) (thousandths)\n" in output
    assert "drawn" not in output
    assert {path.name for path in Path().iterdir()} == {"street.png"}


def test_boxes_refer_to_the_last_image(talk: Talk, say: Say) -> None:
    Image.new("RGB", (100, 50)).save("a small one.png")
    say("<box>(0,0),(1000,1000)</box>")
    output = talk("/image street.png", "/image a small one.png", "Where?")
    assert "Image 2: a small one.png, 100 x 50" in output
    assert "[1]: (0, 0), (100, 50)\n" in output
    assert Image.open("a_small_one-boxes-1.png").size == (100, 50)
    assert "Image 3: " in talk("/image street.png")


def test_colours(
    session: Session,
    say: Say,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    say("See <ref>[red]the house[/red]</ref><box>(1,2),(3,4)</box>!\x1b[5m")
    terminal = TerminalView()
    conversation = Conversation(session, terminal)
    conversation.run("Where?")
    raw = capsys.readouterr().out
    assert "See \x1b[1;36m[red]the house[/red]\x1b[0m\x1b[32m [1]\x1b[0m!\\x1b[5m\n" in raw
    assert "See [red]the house[/red] [1]!\\x1b[5m" in plain(raw)


def test_transcripts(talk: Talk, say: Say) -> None:
    say(ANSWER)
    Path("notes").mkdir()
    output = talk(
        "/image street.png", "What is *it*?\n# Really", "/save notes/talk.md", "/save notes/talk.JSON"
    )
    assert "saved: notes/talk.md" in output
    assert (Path("notes") / "talk.md").read_text("utf-8") == (
        "# Chat\n\nSystem: Be brief.\n\n## Question 1\n\n![Image 1](../street.png)\n\n"
        "> What is \\*it\\*?\n> \\# Really\n\n"
        "**A red house** [1] stands by **two dogs** [2] [3]; 5 \\* 3 \\< 2 \\<box\\>(1,2)\\</box\\>.\n\n"
        "- \\[1\\] A red house: (70, 110), (400, 433)\n"
        "- \\[2\\] two dogs: (480, 320), (576, 384)\n"
        "- \\[3\\] two dogs: (0, 0), (960, 640)\n\n"
        "![The boxes](../street-boxes-1.png)\n"
    )
    saved = json.loads((Path("notes") / "talk.JSON").read_text("utf-8"))
    assert saved["system"] == "Be brief."
    (turn,) = saved["turns"]
    assert turn["images"] == ["street.png"]
    assert turn["drawn"] == "street-boxes-1.png"
    assert turn["answer"]["text"] == ANSWER
    assert turn["answer"]["boxes"][0]["pixels"][0] == pytest.approx([70.08, 110.08])


def test_save_overwrites_only_files_of_this_conversation(talk: Talk, say: Say) -> None:
    say("Yes.")
    Path("other.md").write_text("other file")
    output = talk("One?", "/save other.md", "/save talk.md", "Two?", "/save talk.md")
    assert "other.md: exists already; name a new file\n" in output
    assert Path("other.md").read_text() == "other file"
    assert "Two?" in Path("talk.md").read_text()


def test_full_disk_keeps_the_earlier_transcript(
    talk: Talk, say: Say, monkeypatch: pytest.MonkeyPatch
) -> None:
    say("Yes.")
    talk("One?", "/save talk.md")
    before = Path("talk.md").read_text()

    def write_on_full_disk(path: Path, text: str, encoding: str) -> None:
        path.write_bytes(text.encode(encoding)[:10])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", write_on_full_disk)
    assert "talk.md: No space left on device\n" in talk("Two?", "/save talk.md", "Three?")
    assert Path("talk.md").read_text() == before
    assert {path.name for path in Path().iterdir()} == {"street.png", "talk.md"}


def test_errors_leave_the_conversation_unchanged(talk: Talk, say: Say, session: Session) -> None:
    say("Yes.")
    Image.new("1", (9000, 9000)).save("huge.png")
    Path("broken.png").write_bytes(STREET.read_bytes()[:5000])
    output = talk("/image street.png", "One?")
    assert len(session.turns) == 1
    for line, error in {
        "/image huge.png": "image huge.png is 9000 x 9000 pixels, more than the limit of 64000000 pixels",
        "/image broken.png": "image broken.png is damaged or cut short: ",
        "/image .": "image . is a directory",
        "/image http://127.0.0.1/a.png": "image http://127.0.0.1/a.png: downloading is off, ",
        "/image": "/image: name an image",
        "/save": "/save: name a file, .md or .json",
        "/save talk.txt": "/save talk.txt: name it .md or .json",
        "/save nowhere/talk.md": "nowhere: no such folder",
        "/clear all": "/clear: takes no argument",
        "What is <img>huge.png</img>?": "query: text of part 1 of the query must not contain <img>",
    }.items():
        output = talk(line)
        assert output.startswith(error)
        assert output.count("\n") == 1
    assert len(session.turns) == 1
    assert session.attached == []
    assert "Yes." in talk("Two?")
    assert [turn.question for turn in session.turns] == ["One?", "Two?"]


def test_error_during_an_answer_discards_the_question(
    talk: Talk, say: Say, vl: QwenVL, session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    say("Yes, and so on.")
    talk("One?")
    successful_steps = iter(range(3))
    executor = vl._loop._executor
    start = executor.start

    def start_and_fail_later(chunks: Any) -> Any:
        if next(successful_steps, None) is None:
            raise MemoryError
        return start(chunks)

    monkeypatch.setattr(executor, "start", start_and_fail_later)
    output = talk("/image street.png", "Two?")
    assert output.startswith("Image 1: street.png, 960 x 640\n")
    assert output.endswith("\nout of memory\n")
    monkeypatch.undo()
    assert [turn.question for turn in session.turns] == ["One?"]
    assert [image.source for image in session.attached] == ["street.png"]
    assert len(session._chat.history) == 1


def test_ctrl_c_before_the_first_token_discards_the_question(
    talk: Talk, say: Say, vl: QwenVL, session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    say("Yes.")
    talk("/image street.png")
    executor = vl._loop._executor
    encode = executor.encode_image

    def encode_with_ctrl_c(pixels: Any) -> Any:
        press_ctrl_c()
        return encode(pixels)

    with monkeypatch.context() as patch:
        patch.setattr(executor, "encode_image", encode_with_ctrl_c)
        assert "the question is discarded" in talk("One?")
    assert session.turns == []
    assert len(session.attached) == 1
    assert "Yes." in talk("One?")
    assert session.attached == []


def test_ctrl_c_stops_a_command(talk: Talk, vl: QwenVL, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vl, "load_images", lambda sources: press_ctrl_c())
    assert talk("/image street.png", "/image") == "(stopped)\n/image: name an image\n"


def test_ctrl_c_at_the_prompt(talk: Talk) -> None:
    assert talk(KeyboardInterrupt, "/frob", KeyboardInterrupt).count("/quit or Ctrl-D") == 2


def test_ctrl_c_between_lines_does_nothing(
    session: Session, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = iter(["", "/quit"])

    def read_line() -> str:
        line = next(lines)
        if line == "":
            press_ctrl_c()
        return line

    terminal = TerminalView()
    converse(Conversation(session, terminal), terminal, read_line)
    assert capsys.readouterr().out == ""


def test_removing_attached_images(talk: Talk, session: Session) -> None:
    talk("/image street.png", "/image street.png", "/image")  # without a path, /image removes them
    assert session.attached == []
    assert "Image 1: " in talk("/image street.png")
    talk("/clear")
    assert session.attached == []
