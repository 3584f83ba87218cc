"""What front ends need of a model, whether its stages are opened here or a server has it."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any, Optional, Protocol, TypeVar

from PIL import Image

from paddlemix_qwenvl_plugin.processing.prompts import Query
from paddlemix_qwenvl_plugin.runtime.answer import Answer
from paddlemix_qwenvl_plugin.runtime.request import Request
from paddlemix_qwenvl_plugin.runtime.segments import Segment


class Stream(Iterator[Segment], Protocol):
    """An answer in segments; AnswerStream says what these do."""

    def submit(self: S) -> S: ...

    def stop(self) -> None: ...

    def close(self) -> None: ...

    def finish(self) -> Answer: ...

    @property
    def n_prompt_tokens(self) -> int: ...

    @property
    def n_new_tokens(self) -> int: ...

    @property
    def answer(self) -> Answer: ...


S = TypeVar("S", bound=Stream)
S_co = TypeVar("S_co", bound=Stream, covariant=True)


class Conversation(Protocol[S_co]):
    """A conversation about images, as Chat."""

    system: str

    def clear(self) -> None: ...

    def ask(self, query: Query, **options: Any) -> S_co: ...


class Model(Protocol[S]):
    """What QwenVL does for `chat` and `batch`."""

    @property
    def weights(self) -> list[str]:
        """What tells this model from others."""

    @property
    def picture_label(self) -> str:
        """See QwenTokenizer."""

    def load(self) -> None: ...

    def load_images(self, sources: Sequence[Any], folder: Optional[Path] = None) -> list[Image.Image]: ...

    def chat(self, system: str) -> Conversation[S]: ...

    def ask(self, request: Request, folder: Optional[Path] = None) -> S: ...

    def wait_any(self, streams: Collection[S]) -> list[S]: ...
