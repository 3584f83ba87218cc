"""Chat session: conversation, attached images and turns."""

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
class AttachedImage:
    """Image attached to a question.

    Attributes:
        number: number of the image in the conversation, from 1.
        source: path, address or data URL.
        image: the decoded image, RGB.
    """

    number: int
    source: str
    image: Image.Image

    @property
    def name(self) -> str:
        """The source for display, without the bytes of a data URL and without a password."""
        return "data URL" if is_data_url(self.source) else without_password(self.source)


@dataclass
class Turn:
    """Question and answer.

    Attributes:
        images: (number, name) of the images attached to the question.
        segments: segments of the answer.
        drawn: file of the image with drawn boxes, if written.
    """

    images: tuple[tuple[int, str], ...]
    question: str
    answer: Answer
    segments: tuple[Segment, ...]
    drawn: Optional[Path] = None


class Session:
    """Conversation about images.

    Attributes:
        attached: images of the next question.
        turns: questions and answers so far.
        image: last image of the questions so far, to which the boxes of answers refer; None without images.
    """

    def __init__(
        self, model: Model[Any], system: str, options: GenerationOptions, adapter: Optional[str] = None
    ) -> None:
        self._model = model
        self._options = options
        self._chat: Conversation[Stream] = model.chat(system, adapter)
        self.clear()

    @property
    def system(self) -> str:
        """System message."""
        return self._chat.system

    def clear(self) -> None:
        """Remove all turns and attached images."""
        self._chat.clear()
        self.attached: list[AttachedImage] = []
        self.turns: list[Turn] = []
        self.image: Optional[AttachedImage] = None
        self._n_images = 0  # in `turns`

    def attach(self, source: str) -> AttachedImage:
        """Attach an image to the next question.

        Raises:
            UsageError, QwenVLError: the image does not exist or cannot be read.
        """
        [pixels] = self._model.load_images([source])
        attached = AttachedImage(self._n_images + len(self.attached) + 1, source, pixels)
        self.attached.append(attached)
        return attached

    def ask(self, question: str) -> Stream:
        """Ask a question with the attached images, which the model loads again from their sources.

        Raises as `Chat.ask` (runtime/chat.py); the session is then unchanged.
        """
        images = [{"image": attached.source} for attached in self.attached]
        return self._chat.ask([*images, {"text": question}], **asdict(self._options))

    def record(self, question: str, stream: Stream, segments: list[Segment]) -> Turn | None:
        """Append the turn of `ask` and return it; if the answer has no token, append nothing and return None.

        Without a token, the attached images remain for the next question.
        """
        if not stream.n_new_tokens:
            return None
        images = tuple((attached.number, attached.name) for attached in self.attached)
        turn = Turn(images, question, stream.answer, tuple(segments))
        self.turns.append(turn)
        if self.attached:
            self.image = self.attached[-1]
        self._n_images += len(self.attached)
        self.attached = []
        return turn
