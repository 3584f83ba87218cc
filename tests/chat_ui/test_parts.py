"""Functions of the chat: parsing of lines and paths, fragments of answers, image previews."""

from __future__ import annotations

import base64
import io
import re
from pathlib import Path

import pytest
from PIL import Image

from paddlemix_qwenvl_plugin.chat_ui.conversation import parse, path_of
from paddlemix_qwenvl_plugin.chat_ui.terminal import preview
from paddlemix_qwenvl_plugin.chat_ui.view import Fragment, box_line, fragments
from paddlemix_qwenvl_plugin.processing.boxes import Box
from paddlemix_qwenvl_plugin.runtime.segments import Segment

HOUSE = Box("box", ((73, 172), (417, 676)), "a red house")
QUAD = Box("quad", ((0, 0), (500, 10), (490, 1000), (5, 990)))


@pytest.mark.parametrize(
    ("line", "parsed"),  # a command is (name, argument), a question is a string
    [
        ("/image a b.png ", ("image", "a b.png")),
        ("/image\ta.png", ("image", "a.png")),
        ("/quit", ("quit", "")),
        ("/", ("", "")),
        ("  What? ", "What?"),
        (" /etc/hosts is what?", "/etc/hosts is what?"),
        ("\n", ""),
    ],
)
def test_parse(line: str, parsed: object) -> None:
    assert parse(line) == parsed


def test_path_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.chdir(tmp_path)
    # Typed argument -> path.
    paths = {
        "a b.png": "a b.png",
        '"a b.png"': "a b.png",
        "'bob''s.png'": "bob''s.png",
        "bob's.png": "bob's.png",
        r"a\ b\(1\).png": "a b(1).png",
        "~/a b.png": "/home/me/a b.png",
        '"~/a.png"': "/home/me/a.png",
        "http://host//a\\ b.png": "http://host//a\\ b.png",
        "data:image/png;base64,AA//": "data:image/png;base64,AA//",
        '"': '"',
    }
    assert {argument: path_of(argument) for argument in paths} == paths
    # The name of an existing file is taken as it is.
    existing = ["'quoted'", r"back\slash", "~"]
    for name in existing:
        Path(name).touch()
    assert [path_of(name) for name in existing] == existing


def test_fragments() -> None:
    segments = [
        Segment("There is "),
        Segment("<ref>a red house</ref>", ref="a red house"),
        Segment("<box>(73,172),(417,676)</box>", boxes=(HOUSE,)),
        Segment("<box>(0,0),(1,1)</box>", boxes=(HOUSE,)),
        Segment(" and "),
        Segment("<quad>…</quad>", boxes=(QUAD,)),
        Segment("<box>(1,2)</box>"),
        Segment("<ref> </ref>"),
        Segment("\x1b[31m\x07\r\x9b狗\u3000\n\t!"),
    ]
    assert list(fragments(segments)) == [
        Fragment("There is ", "text"),
        Fragment("a red house", "ref"),
        Fragment(" [1]", "box"),
        Fragment(" [2]", "box"),
        Fragment(" and ", "text"),
        Fragment("[3]", "box"),
        Fragment("<box>(1,2)</box>", "text"),
        Fragment("<ref> </ref>", "text"),
        Fragment("\\x1b[31m\\x07\\x0d\\x9b狗\u3000\n\t!", "text"),
    ]


def test_fragments_are_generated_without_waiting_for_later_segments() -> None:
    def endless():
        while True:
            yield Segment("word ")

    assert next(fragments(endless())) == Fragment("word ", "text")


def test_box_lines() -> None:
    assert box_line(1, HOUSE, (960, 640)) == "[1] a red house: (70, 110), (400, 433)"
    assert box_line(2, HOUSE, None) == "[2] a red house: (73, 172), (417, 676) (thousandths)"
    assert box_line(3, QUAD, (100, 200)) == "[3]: (0, 0), (50, 2), (49, 200), (0, 198)"
    assert box_line(4, Box("box", ((0, 0), (1, 1)), "a\n\x1b[2Jb"), None).startswith("[4] a \\x1b[2Jb: ")


# Environments of terminals with kitty's graphics protocol, with iTerm2's, and of those that get no preview: without
# image support, or in tmux or screen.
KITTY = [{"TERM": "xterm-kitty"}, {"TERM": "xterm-ghostty"}, {"TERM": "xterm", "KITTY_WINDOW_ID": "1"}]
ITERM = [
    {"TERM": "xterm-256color", "TERM_PROGRAM": "iTerm.app"},
    {"TERM_PROGRAM": "WezTerm"},
    {"LC_TERMINAL": "iTerm2"},
]
NO_IMAGES = [
    {},
    {"TERM": "xterm-256color"},
    {"TERM": "xterm-256color", "TERM_PROGRAM": "Apple_Terminal"},
    {"TERM": "screen-256color", "TERM_PROGRAM": "iTerm.app"},
    {"TERM": "xterm-kitty", "TMUX": "/tmp/tmux"},
    {"TERM": "tmux-256color", "LC_TERMINAL": "iTerm2"},
]


def noise(width: int, height: int) -> Image.Image:
    return Image.effect_noise((width, height), 90).convert("RGB")


@pytest.mark.parametrize("environment", KITTY)
# The preview is limited to 32 columns or 8 rows, whichever the aspect ratio of the image reaches first.
@pytest.mark.parametrize(("size", "limit"), [((900, 300), "c=32"), ((300, 900), "r=8"), ((1, 1), "r=8")])
def test_kitty(environment: dict[str, str], size: tuple[int, int], limit: str) -> None:
    """The chunks have the protocol's format; together they are a small PNG with the image's aspect ratio."""
    text = preview(noise(*size), environment)
    commands = re.findall(r"\x1b_G([^;]*);([A-Za-z0-9+/=]*)\x1b\\", text)
    assert re.sub(r"\x1b_G[^\x1b]*\x1b\\", "", text) == "\n"
    keys = [dict(item.split("=") for item in key_list.split(",")) for key_list, _ in commands]
    name, value = limit.split("=")
    assert keys[0] == {"a": "T", "f": "100", "q": "2", name: value, "m": keys[0]["m"]}
    assert all(list(chunk_keys) == ["m"] for chunk_keys in keys[1:])
    # m is 1 if another chunk follows.
    assert [chunk_keys["m"] for chunk_keys in keys] == ["1"] * (len(keys) - 1) + ["0"]
    assert all(len(data) % 4 == 0 and len(data) <= 4096 for _, data in commands)
    png = Image.open(io.BytesIO(base64.b64decode("".join(data for _, data in commands))))
    assert png.format == "PNG"
    assert max(png.size) <= 512
    assert png.width / png.height == pytest.approx(size[0] / size[1], rel=0.02)
    assert len(commands) > 1 or size == (1, 1)


@pytest.mark.parametrize("environment", ITERM)
def test_iterm(environment: dict[str, str]) -> None:
    text = preview(noise(900, 300), environment)
    match = re.fullmatch(r"\x1b\]1337;File=([^:]*):([A-Za-z0-9+/=]*)\x07\n", text)
    assert match is not None
    keys = dict(item.split("=") for item in match.group(1).split(";"))
    assert keys == {"inline": "1", "width": "32", "height": "8", "preserveAspectRatio": "1"}
    assert Image.open(io.BytesIO(base64.b64decode(match.group(2)))).size == (512, 171)


@pytest.mark.parametrize("environment", NO_IMAGES)
def test_no_preview(environment: dict[str, str]) -> None:
    assert preview(noise(90, 90), environment) == ""
