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
from paddlemix_qwenvl_plugin.chat_ui.terminal import Terminal

ANSWER = (
    "<ref>A red house</ref><box>(73,172),(417,676)</box> stands by <ref>two dogs</ref>"
    "<box>(500,500),(600,600)</box><box>(0,0),(1000,1000)</box>; 5 * 3 < 2 <box>(1,2)</box>."
)


Say = Callable[[str], None]
Talk = Callable[..., str]


def signal_ctrl_c() -> None:
    os.kill(os.getpid(), signal.SIGINT)


@pytest.fixture
def session(vl: QwenVL) -> Session:
    return Session(vl, "Be brief.", GenerationOptions(max_new_tokens=200))


@pytest.fixture
def talk(
    session: Session, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Talk:
    """Function that types lines, then Ctrl-D, and returns the output; a line may be an exception, as of a key."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TERM", "dumb")
    shutil.copyfile(STREET, "street.png")
    terminal = Terminal()
    conversation = Conversation(session, terminal)

    def talk(*lines: str | type[BaseException]) -> str:
        typed = iter([*lines, EOFError])

        def read() -> str:
            line = next(typed)
            if isinstance(line, str):
                return line
            raise line

        converse(conversation, terminal, read)
        return capsys.readouterr().out

    return talk


def test_boxes(talk: Talk, say: Say) -> None:
    say(ANSWER)
    Path("street-boxes-1.png").write_text("mine")
    shown = talk("/image street.png", "Where?", "And now?")
    said = "A red house [1] stands by two dogs [2] [3]; 5 * 3 < 2 <box>(1,2)</box>."
    assert shown.count(f"{said}\n") == 2
    boxes = "[1] A red house: (70, 110), (400, 433)\n[2] two dogs: (480, 320), (576, 384)\n"
    assert shown.count(f"{boxes}[3] two dogs: (0, 0), (960, 640)\n") == 2
    assert shown.count("is malformed: '(1,2)'\n") == 2
    assert "boxes drawn: street-boxes-2.png" in shown
    assert "boxes drawn: street-boxes-3.png" in shown
    assert Path("street-boxes-1.png").read_text() == "mine"
    assert {path.name for path in Path().iterdir()} == {
        "street.png",
        *(f"street-boxes-{n}.png" for n in (1, 2, 3)),
    }
    before = np.asarray(Image.open("street.png").convert("RGB"), np.int16)
    after = np.asarray(Image.open("street-boxes-2.png"), np.int16)
    assert after.shape == before.shape
    changed = np.abs(after - before).sum(-1) > 0
    assert changed[110:433, 70].mean() > 0.95  # the left edge of the house
    assert changed[420:, 20:50].mean() < 0.2  # beside it, nothing


def test_boxes_without_an_image(talk: Talk, say: Say) -> None:
    say("<box>(1,2),(3,4)</box>")
    shown = talk("Where?")
    assert "\n[1]: (1, 2), (3, 4) (thousandths)\n" in shown
    assert "drawn" not in shown
    assert {path.name for path in Path().iterdir()} == {"street.png"}


def test_boxes_are_of_the_last_image(talk: Talk, say: Say) -> None:
    Image.new("RGB", (100, 50)).save("a small one.png")
    say("<box>(0,0),(1000,1000)</box>")
    shown = talk("/image street.png", "/image a small one.png", "Where?")
    assert "Image 2: a small one.png, 100 x 50" in shown
    assert "[1]: (0, 0), (100, 50)\n" in shown
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
    terminal = Terminal()
    conversation = Conversation(session, terminal)
    conversation.run("Where?")
    raw = capsys.readouterr().out
    assert "See \x1b[1;36m[red]the house[/red]\x1b[0m\x1b[32m [1]\x1b[0m!\\x1b[5m\n" in raw
    assert "See [red]the house[/red] [1]!\\x1b[5m" in plain(raw)


def test_transcripts(talk: Talk, say: Say) -> None:
    say(ANSWER)
    Path("notes").mkdir()
    shown = talk(
        "/image street.png", "What is *it*?\n# Really", "/save notes/talk.md", "/save notes/talk.JSON"
    )
    assert "saved: notes/talk.md" in shown
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


def test_a_transcript_replaces_only_its_own(talk: Talk, say: Say) -> None:
    say("Yes.")
    Path("mine.md").write_text("mine")
    shown = talk("One?", "/save mine.md", "/save talk.md", "Two?", "/save talk.md")
    assert "mine.md: exists already; name a new file\n" in shown
    assert Path("mine.md").read_text() == "mine"
    assert "Two?" in Path("talk.md").read_text()


def test_a_full_disk_leaves_the_older_transcript(
    talk: Talk, say: Say, monkeypatch: pytest.MonkeyPatch
) -> None:
    say("Yes.")
    talk("One?", "/save talk.md")
    before = Path("talk.md").read_text()

    def full(path: Path, text: str, encoding: str) -> None:
        path.write_bytes(text.encode(encoding)[:10])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    assert "talk.md: No space left on device\n" in talk("Two?", "/save talk.md", "Three?")
    assert Path("talk.md").read_text() == before
    assert {path.name for path in Path().iterdir()} == {"street.png", "talk.md"}


def test_errors_leave_the_conversation_unchanged(talk: Talk, say: Say, session: Session) -> None:
    say("Yes.")
    Image.new("1", (9000, 9000)).save("huge.png")
    Path("broken.png").write_bytes(STREET.read_bytes()[:5000])
    shown = talk("/image street.png", "One?")
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
        shown = talk(line)
        assert shown.startswith(error)
        assert shown.count("\n") == 1
    assert len(session.turns) == 1
    assert session.attached == []
    assert "Yes." in talk("Two?")
    assert [turn.question for turn in session.turns] == ["One?", "Two?"]


def test_an_error_in_the_middle_of_an_answer(
    talk: Talk, say: Say, vl: QwenVL, session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    say("Yes, and so on.")
    talk("One?")

    def fail(*_: object) -> list[int]:
        raise MemoryError

    steps = iter(range(3))
    executor = vl._loop._executor
    start = executor.start
    monkeypatch.setattr(
        executor, "start", lambda chunks: fail() if next(steps, None) is None else start(chunks)
    )
    shown = talk("/image street.png", "Two?")
    assert shown.startswith("Image 1: street.png, 960 x 640\n")
    assert shown.endswith("\nout of memory\n")
    monkeypatch.undo()
    assert [turn.question for turn in session.turns] == ["One?"]
    assert [image.source for image in session.attached] == ["street.png"]
    assert len(session._chat.history) == 1


def test_ctrl_c_before_the_first_word(
    talk: Talk, say: Say, vl: QwenVL, session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    say("Yes.")
    talk("/image street.png")
    executor = vl._loop._executor
    encode = executor.encode_image

    def interrupted_encode(pixels: Any) -> Any:
        signal_ctrl_c()
        return encode(pixels)

    with monkeypatch.context() as patch:
        patch.setattr(executor, "encode_image", interrupted_encode)
        assert "the question is discarded" in talk("One?")
    assert session.turns == []
    assert len(session.attached) == 1
    assert "Yes." in talk("One?")
    assert session.attached == []


def test_ctrl_c_breaks_off_a_command(talk: Talk, vl: QwenVL, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vl, "load_images", lambda sources: signal_ctrl_c())
    assert talk("/image street.png", "/image") == "(stopped)\n/image: name an image\n"


def test_ctrl_c_at_the_prompt(talk: Talk) -> None:
    assert talk(KeyboardInterrupt, "/frob", KeyboardInterrupt).count("/quit or Ctrl-D") == 2


def test_ctrl_c_between_lines_does_nothing(
    session: Session, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = iter(["", "/quit"])

    def read() -> str:
        line = next(lines)
        if not line:
            signal_ctrl_c()
        return line

    terminal = Terminal()
    converse(Conversation(session, terminal), terminal, read)
    assert capsys.readouterr().out == ""


def test_removing_attached_images(talk: Talk, session: Session) -> None:
    talk("/image street.png", "/image street.png", "/image")
    assert session.attached == []
    assert "Image 1: " in talk("/image street.png")
    talk("/clear")
    assert session.attached == []
