"""Output files of a conversation: transcripts and images with drawn boxes."""

from __future__ import annotations

import itertools
import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

from paddlemix_qwenvl_plugin.chat_ui.session import AttachedImage, Session, Turn
from paddlemix_qwenvl_plugin.chat_ui.view import Fragment, box_line, fragments
from paddlemix_qwenvl_plugin.processing.boxes import Box
from paddlemix_qwenvl_plugin.processing.drawing import draw_boxes
from paddlemix_qwenvl_plugin.util.errors import UsageError
from paddlemix_qwenvl_plugin.util.files import write_beside, write_text
from paddlemix_qwenvl_plugin.util.sources import is_address


class Transcripts:
    """Writer of transcripts. It overwrites only files that it has written itself."""

    def __init__(self) -> None:
        self._written_files: set[Path] = set()

    def save(self, session: Session, target: Path) -> None:
        """Write the conversation as Markdown or JSON, by the suffix of `target`.

        Raises:
            UsageError: the suffix is not .md or .json, `target` exists and is not from this writer, its folder does not
                exist, or there is no answer yet.
            OSError: the file cannot be written.
        """
        serialize = {".md": as_markdown, ".json": as_json}.get(target.suffix.lower())
        if serialize is None:
            raise UsageError(f"/save {target}: name it .md or .json")
        if not session.turns:
            raise UsageError("/save: there is no answer yet to save")
        if not target.parent.is_dir():
            raise UsageError(f"{target.parent}: no such folder")
        if os.path.lexists(target) and target.absolute() not in self._written_files:
            raise UsageError(f"{target}: exists already; name a new file")
        text = serialize(session, target.parent)
        write_text(target, text)
        self._written_files.add(target.absolute())


def as_json(session: Session, _folder: Path) -> str:
    """Serialize the system message and the turns as JSON; an `answer` has the fields of `qwenvl predict --json`.

    `_folder` is not used: as_markdown has the same parameters.
    """
    turns = [
        {
            "images": [name for _, name in turn.images],
            "question": turn.question,
            "answer": turn.answer.as_dict(),
            "drawn": str(turn.drawn) if turn.drawn else None,
        }
        for turn in session.turns
    ]
    data: dict[str, Any] = {"system": session.system, "turns": turns}
    return json.dumps(data, ensure_ascii=False, indent=1) + "\n"


def as_markdown(session: Session, folder: Path) -> str:
    """Serialize the system message and the turns as Markdown, similar to the terminal's output.

    Links to images are relative to `folder`.
    """
    blocks = ["# Chat", f"System: {_escaped(session.system)}"]
    for number, turn in enumerate(session.turns, start=1):
        blocks += [f"## Question {number}", *_turn_blocks(turn, folder)]
    return "\n\n".join(blocks) + "\n"


def _turn_blocks(turn: Turn, folder: Path) -> Iterator[str]:
    """Yield the Markdown blocks of a turn: attached images, question, answer, list of boxes, image with boxes."""
    for number, name in turn.images:
        yield f"Image {number}" if name == "data URL" else f"![Image {number}]({_link(name, folder)})"
    yield "\n".join(f"> {line}" for line in _escaped(turn.question).splitlines())
    answer = "".join(map(_fragment_markdown, fragments(turn.segments)))
    stopped = " *(stopped)*" if turn.answer.finish_reason == "cancelled" else ""
    yield f"{answer}{stopped}"
    size = turn.answer.image_size
    boxes = [f"- {_escaped(box_line(n, box, size))}" for n, box in enumerate(turn.answer.boxes, start=1)]
    if boxes:
        yield "\n".join(boxes)
    if turn.drawn:
        yield f"![The boxes]({_link(str(turn.drawn), folder)})"


def _fragment_markdown(fragment: Fragment) -> str:
    if fragment.kind == "box":
        return fragment.text  # numbers such as [1]
    if fragment.kind == "ref":
        return f"**{_escaped(fragment.text.strip())}**"
    return _escaped(fragment.text)


def _escaped(text: str) -> str:
    """Escape Markdown syntax: special characters, and a # that begins a line."""
    text = re.sub(r"([\\`*_<>\[\]|])", r"\\\1", text)
    return re.sub(r"^(\s*)#", r"\1\\#", text, flags=re.MULTILINE)


def _link(name: str, folder: Path) -> str:
    """Percent-encode an address, or a path made relative to `folder`, as the target of a Markdown link."""
    if is_address(name):
        return quote(name, safe="/:?&=%#,;+~@")
    try:
        name = os.path.relpath(name, folder)
    except ValueError:  # on Windows, a path on another drive
        name = str(Path(name).absolute())
    return quote(Path(name).as_posix())


def save_drawn(attached: AttachedImage, boxes: Sequence[Box]) -> Path:
    """Draw `boxes`, numbered as in the answer, on the image; return the path of a new PNG file in the working folder.

    Raises:
        OSError: the file cannot be written.
    """
    numbered = [
        replace(box, ref=f"{number} {box.ref or ''}".strip()) for number, box in enumerate(boxes, start=1)
    ]
    drawn = draw_boxes(attached.image, numbered)
    for number in itertools.count(1):
        target = Path(f"{_stem(attached)}-boxes-{number}.png")
        try:
            target.touch(exist_ok=False)  # reserves the name against other chats in this folder
        except FileExistsError:
            continue
        try:
            write_beside(target, drawn.save)
        except BaseException:
            target.unlink()
            raise
        return target
    raise AssertionError("unreachable")


def _stem(attached: AttachedImage) -> str:
    """File name of an image without its suffix, at most 60 characters; "image" if it is empty.

    Each run of characters other than word characters, . and - becomes one _.
    """
    name = urlsplit(attached.name).path if is_address(attached.name) else attached.name
    return re.sub(r"[^\w.-]+", "_", Path(name).stem)[:60] or "image"
