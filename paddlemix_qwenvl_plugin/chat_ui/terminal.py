"""Terminal view of a conversation: output, image previews, Ctrl-C handling."""

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
from paddlemix_qwenvl_plugin.chat_ui.session import AttachedImage, Turn
from paddlemix_qwenvl_plugin.chat_ui.view import PlainView, box_line, fragments
from paddlemix_qwenvl_plugin.runtime.model import Stream
from paddlemix_qwenvl_plugin.runtime.segments import Segment
from paddlemix_qwenvl_plugin.util.errors import one_line

# Style of each kind of Fragment.
_STYLES = {"text": None, "ref": "bold cyan", "box": "green"}

# Maximum size of a preview, in character cells and in pixels (width, height).
_COLUMNS, _ROWS = 32, 8
_PIXELS = (512, 256)
# Maximum characters of a chunk in kitty's protocol.
_KITTY_CHUNK = 4096

# Values of TERM_PROGRAM of terminals with iTerm2's protocol, and of TERM with kitty's. `preview` reads other variables,
# too.
_ITERM_PROGRAMS = ("iTerm.app", "WezTerm", "mintty")
_KITTY_TERMS = ("xterm-kitty", "xterm-ghostty")


class TerminalView(PlainView):
    """View of a conversation on a terminal."""

    def __init__(self) -> None:
        self._console = Console()

    def text(self, text: str) -> None:
        """Print the output of a command, such as the help."""
        self._out(f"{text}\n")

    def note(self, text: str) -> None:
        """Print a note, dimmed."""
        self._out(f"{one_line(text)}\n", "dim")

    def error(self, line: str) -> None:
        """Print an error in red."""
        self._out(f"{line}\n", "red")

    def waiting(self, text: str) -> contextlib.AbstractContextManager[object]:
        """Show a spinner within the block."""
        return self._console.status(text)

    def attached(self, image: AttachedImage) -> None:
        """Print the number, name and size of an attached image, and its preview."""
        width, height = image.image.size
        self.note(f"Image {image.number}: {image.name}, {width} x {height}")
        self._console.file.write(preview(image.image, os.environ))
        self._console.file.flush()

    def stop_on_ctrl_c(self, stream: Stream) -> contextlib.AbstractContextManager[None]:
        """Let Ctrl-C stop the answer within the block."""
        return on_ctrl_c(stream.stop)

    def answer(self, stream: Stream) -> list[Segment]:
        """Print an answer as it is generated, with a number for each box; return its segments."""
        segments: list[Segment] = []

        def recorded_segments() -> Iterator[Segment]:
            for segment in stream:
                segments.append(segment)
                yield segment

        spinner = self._console.status("Ctrl-C stops")
        try:
            spinner.start()
            for text, kind in fragments(recorded_segments()):
                spinner.stop()
                self._out(text, _STYLES[kind])
        finally:
            spinner.stop()
            self._out("\n" if segments else "")
        return segments

    def answered(self, turn: Turn, image: AttachedImage | None) -> None:
        """Print the notes and boxes of an answer that has ended, and draw the boxes on its image, to a file."""
        answer = turn.answer
        if answer.finish_reason == "cancelled":
            self.note("(stopped)")
        elif answer.finish_reason == "length":
            self.note("(cut off at --max_new_tokens or the end of the context)")
        for problem in answer.problems:
            self.note(problem)
        for number, box in enumerate(answer.boxes, start=1):
            self._out(f"{box_line(number, box, answer.image_size)}\n", "green")
        if answer.boxes and image is not None:
            turn.drawn = save_drawn(image, answer.boxes)
            self.note(f"boxes drawn: {turn.drawn}")

    def _out(self, text: str, style: str | None = None) -> None:
        self._console.out(text, end="", style=style, highlight=False)


@contextlib.contextmanager
def on_ctrl_c(action: Callable[[], object]) -> Iterator[None]:
    """Call `action` on Ctrl-C within the block. Main thread only: in other threads Python raises ValueError."""
    previous_handler = signal.signal(signal.SIGINT, lambda *_: action())
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous_handler)


def raise_keyboard_interrupt() -> None:
    """Raise KeyboardInterrupt: an action for `on_ctrl_c`, the same as Python's default."""
    raise KeyboardInterrupt


def do_nothing() -> None:
    """Ignore Ctrl-C: an action for `on_ctrl_c`."""


def preview(image: Image.Image, environment: Mapping[str, str]) -> str:
    """Escape sequence that shows `image` in at most 32 columns by 8 rows; "" if the terminal does not support it.

    The terminal is identified by its environment variables, not by a query: some terminals print unknown queries.
    """
    term = environment.get("TERM", "")
    if "TMUX" in environment or term.startswith(("screen", "tmux")):
        return ""  # a multiplexer does not forward images, but its programs inherit the outer terminal's variables
    if term in _KITTY_TERMS or "KITTY_WINDOW_ID" in environment:
        return _kitty(image)
    if environment.get("TERM_PROGRAM") in _ITERM_PROGRAMS or environment.get("LC_TERMINAL") == "iTerm2":
        return _iterm(image)
    return ""


def _kitty(image: Image.Image) -> str:
    """Encode an image in the kitty graphics protocol: PNG in base64, in chunks."""
    # A cell is about twice as high as wide. With one side given, the terminal keeps the aspect ratio.
    wide = image.width * 2 * _ROWS > image.height * _COLUMNS
    size = f"c={_COLUMNS}" if wide else f"r={_ROWS}"
    data = _png(image)
    chunks = [data[i : i + _KITTY_CHUNK] for i in range(0, len(data), _KITTY_CHUNK)]
    text = ""
    for i, chunk in enumerate(chunks):
        more_chunks = int(i < len(chunks) - 1)
        # a=T: show the image; f=100: PNG; q=2: no reply, which would be read as typed input; m=1: more chunks follow.
        keys = f"a=T,f=100,q=2,{size},m={more_chunks}" if i == 0 else f"m={more_chunks}"
        text += f"\x1b_G{keys};{chunk}\x1b\\"
    return text + "\n"


def _iterm(image: Image.Image) -> str:
    """Encode an image for iTerm2's inline images protocol: PNG in base64, aspect ratio preserved."""
    size = f"width={_COLUMNS};height={_ROWS};preserveAspectRatio=1"
    return f"\x1b]1337;File=inline=1;{size}:{_png(image)}\x07\n"


def _png(image: Image.Image) -> str:
    """Encode an image, reduced to the size of a preview, as PNG in base64."""
    small = image.copy()
    small.thumbnail(_PIXELS)
    file = io.BytesIO()
    small.save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode("ascii")
