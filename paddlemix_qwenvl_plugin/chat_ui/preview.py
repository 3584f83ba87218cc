"""A small preview of a picture, in the terminals that can show one."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping

from PIL import Image

_COLUMNS, _ROWS = 32, 8
_PIXELS = (512, 256)
_KITTY_CHUNK = 4096

_ITERM = ("iTerm.app", "WezTerm", "mintty")
_KITTY_TERMS = ("xterm-kitty", "xterm-ghostty")


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
