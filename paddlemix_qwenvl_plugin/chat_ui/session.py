"""A conversation with its attached pictures and what was shown of it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Optional

from PIL import Image

from paddlemix_qwenvl_plugin.runtime.answer import Answer
from paddlemix_qwenvl_plugin.runtime.model import Conversation, Model, Stream
from paddlemix_qwenvl_plugin.runtime.options import GenerationOptions
from paddlemix_qwenvl_plugin.runtime.segments import Segment
from paddlemix_qwenvl_plugin.util.sources import is_data_url, without_password


@dataclass(frozen=True)
class Picture:
    """An attached picture: its number in the conversation, where it came from, and its pixels (RGB)."""

    number: int
    source: str
    image: Image.Image

    @property
    def name(self) -> str:
        """The source without what nobody wants to read: the bytes of a data URL, a password."""
        return "data URL" if is_data_url(self.source) else without_password(self.source)


@dataclass
class Turn:
    """A question with its answer.

    Attributes:
        pictures: (number, name) of the pictures asked with it.
        segments: the answer as it was streamed.
        drawn: the picture with the boxes, if one was written.
    """

    pictures: tuple[tuple[int, str], ...]
    question: str
    answer: Answer
    segments: tuple[Segment, ...]
    drawn: Optional[Path] = None


class Session:
    """A conversation about pictures.

    Attributes:
        attached: the pictures of the next question.
        turns: what was asked and answered.
        picture: the last picture asked about, to which the boxes of an answer refer.
    """

    def __init__(self, vl: Model[Any], system: str, options: GenerationOptions) -> None:
        self._vl = vl
        self._options = options
        self._chat: Conversation[Stream] = vl.chat(system)
        self.clear()

    @property
    def system(self) -> str:
        """The system message."""
        return self._chat.system

    def clear(self) -> None:
        """Forget the conversation and the attached pictures."""
        self._chat.clear()
        self.attached: list[Picture] = []
        self.turns: list[Turn] = []
        self.picture: Optional[Picture] = None
        self._n_pictures = 0

    def attach(self, source: str) -> Picture:
        """Attach a picture to the next question.

        Raises:
            UsageError, QwenVLError: it is not there, or cannot be read.
        """
        [image] = self._vl.load_images([source])
        picture = Picture(self._n_pictures + len(self.attached) + 1, source, image)
        self.attached.append(picture)
        return picture

    def ask(self, question: str) -> Stream:
        """Ask about the attached pictures and all before. Errors as of `Chat.ask`; they leave everything as it was."""
        pictures = [{"image": picture.source} for picture in self.attached]
        return self._chat.ask([*pictures, {"text": question}], **asdict(self._options))

    def record(self, question: str, stream: Stream, segments: list[Segment]) -> Turn | None:
        """Note the turn that `ask` made; None if it was stopped before its first token, which makes no turn."""
        if not stream.n_new_tokens:
            return None
        pictures = tuple((picture.number, picture.name) for picture in self.attached)
        turn = Turn(pictures, question, stream.answer, tuple(segments))
        self.turns.append(turn)
        if self.attached:
            self.picture = self.attached[-1]
        self._n_pictures += len(self.attached)
        self.attached = []
        return turn
