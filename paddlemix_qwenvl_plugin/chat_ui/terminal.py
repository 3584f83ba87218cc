"""A conversation on a terminal: what is shown, previews of pictures, and what Ctrl-C does."""

from __future__ import annotations

import base64
import contextlib
import io
import os
import signal
from collections.abc import Callable, Iterator, Mapping

from PIL import Image
from rich.console import Console

from paddlemix_qwenvl_plugin.chat_ui.files import save_drawn
from paddlemix_qwenvl_plugin.chat_ui.session import Picture, Turn
from paddlemix_qwenvl_plugin.chat_ui.view import Plain, box_line, fragments
from paddlemix_qwenvl_plugin.runtime.model import Stream
from paddlemix_qwenvl_plugin.runtime.segments import Segment
from paddlemix_qwenvl_plugin.util.errors import one_line

_STYLES = {"text": None, "ref": "bold cyan", "box": "green"}

# A preview's cells, its pixels, and the terminals that can show one.
_COLUMNS, _ROWS = 32, 8
_PIXELS = (512, 256)
_KITTY_CHUNK = 4096

_ITERM = ("iTerm.app", "WezTerm", "mintty")
_KITTY_TERMS = ("xterm-kitty", "xterm-ghostty")


class Terminal(Plain):
    """A person's terminal: each method as in Plain."""

    def __init__(self) -> None:
        self._console = Console()

    def text(self, text: str) -> None:
        self._out(f"{text}\n")

    def note(self, text: str) -> None:
        self._out(f"{one_line(text)}\n", "dim")

    def error(self, line: str) -> None:
        self._out(f"{line}\n", "red")

    def waiting(self, text: str) -> contextlib.AbstractContextManager[object]:
        """Show that the program is at work."""
        return self._console.status(text)

    def attached(self, picture: Picture) -> None:
        width, height = picture.image.size
        self.note(f"Picture {picture.number}: {picture.name}, {width} x {height}")
        self._console.file.write(preview(picture.image, os.environ))
        self._console.file.flush()

    def stopping(self, stream: Stream) -> contextlib.AbstractContextManager[None]:
        return on_ctrl_c(stream.stop)

    def answer(self, stream: Stream) -> list[Segment]:
        segments: list[Segment] = []

        def noted() -> Iterator[Segment]:
            for segment in stream:
                segments.append(segment)
                yield segment

        waiting = self._console.status("Ctrl-C stops")
        try:
            waiting.start()
            for text, kind in fragments(noted()):
                waiting.stop()
                self._out(text, _STYLES[kind])
        finally:
            waiting.stop()
            self._out("\n" if segments else "")
        return segments

    def answered(self, turn: Turn, picture: Picture | None) -> None:
        answer = turn.answer
        if answer.finish_reason == "cancelled":
            self.note("(stopped)")
        elif answer.finish_reason == "length":
            self.note("(cut off at --max_new_tokens, or where the context is full)")
        for problem in answer.problems:
            self.note(problem)
        for number, box in enumerate(answer.boxes, start=1):
            self._out(f"{box_line(number, box, answer.image_size)}\n", "green")
        if answer.boxes and picture is not None:
            turn.drawn = save_drawn(picture, answer.boxes)
            self.note(f"boxes drawn: {turn.drawn}")

    def _out(self, text: str, style: str | None = None) -> None:
        self._console.out(text, end="", style=style, highlight=False)


@contextlib.contextmanager
def on_ctrl_c(call: Callable[[], object]) -> Iterator[None]:
    """Have Ctrl-C call this. Outside of the main thread there are no signals, and this is an error."""
    before = signal.signal(signal.SIGINT, lambda *_: call())
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def interrupt() -> None:
    """Break off what is being done."""
    raise KeyboardInterrupt


def nothing() -> None:
    """Let it pass."""


def preview(image: Image.Image, environment: Mapping[str, str]) -> str:
    """What makes the terminal of this environment show `image`, at most 32 columns by 8 rows; "" where it cannot.

    Terminals are told by their own variables: a terminal that is asked, and does not know the question, may print it.
    """
    term = environment.get("TERM", "")
    if "TMUX" in environment or term.startswith(("screen", "tmux")):
        return ""  # they do not hand pictures on, and keep the variables of the terminal outside
    if term in _KITTY_TERMS or "KITTY_WINDOW_ID" in environment:
        return _kitty(image)
    if environment.get("TERM_PROGRAM") in _ITERM or environment.get("LC_TERMINAL") == "iTerm2":
        return _iterm(image)
    return ""


def _kitty(image: Image.Image) -> str:
    """The kitty graphics protocol: PNG in base64, in chunks."""
    # A cell is about twice as high as it is wide. With one side given, the other follows from the picture.
    wide = image.width * 2 * _ROWS > image.height * _COLUMNS
    side = f"c={_COLUMNS}" if wide else f"r={_ROWS}"
    data = _png(image)
    chunks = [data[i : i + _KITTY_CHUNK] for i in range(0, len(data), _KITTY_CHUNK)]
    text = ""
    for i, chunk in enumerate(chunks):
        more = int(i < len(chunks) - 1)
        # q=2: no reply, which would be read as if it had been typed.
        keys = f"a=T,f=100,q=2,{side},m={more}" if i == 0 else f"m={more}"
        text += f"\x1b_G{keys};{chunk}\x1b\\"
    return text + "\n"


def _iterm(image: Image.Image) -> str:
    """iTerm2's inline images: PNG in base64, the picture's ratio kept."""
    size = f"width={_COLUMNS};height={_ROWS};preserveAspectRatio=1"
    return f"\x1b]1337;File=inline=1;{size}:{_png(image)}\x07\n"


def _png(image: Image.Image) -> str:
    small = image.copy()
    small.thumbnail(_PIXELS)
    file = io.BytesIO()
    small.save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode("ascii")
