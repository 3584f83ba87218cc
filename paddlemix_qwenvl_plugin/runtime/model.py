"""Interface of a model for commands, implemented by QwenVL and by the client of a remote server."""

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
    """Interface of a streamed answer; see AnswerStream."""

    def submit(self: S) -> S:
        """Queue the request before its first segment is read."""

    def stop(self) -> None:
        """End the iteration and cancel the request; a signal handler or another thread may call this at any time."""

    def close(self) -> None:
        """Cancel the request; not to be called while the iteration waits for a segment."""

    def finish(self) -> Answer:
        """Generate the remaining tokens and return the complete answer."""

    @property
    def n_prompt_tokens(self) -> int:
        """Number of tokens of the prompt; with a remote server, 0 before the end."""

    @property
    def n_new_tokens(self) -> int:
        """Number of tokens read so far; with a remote server, of received deltas before the end."""

    @property
    def answer(self) -> Answer:
        """The complete answer, or the answer so far."""


S = TypeVar("S", bound=Stream)
S_co = TypeVar("S_co", bound=Stream, covariant=True)


class Conversation(Protocol[S_co]):
    """Interface of a conversation about images; see Chat."""

    system: str

    def clear(self) -> None:
        """Remove all turns from the history."""

    def ask(self, query: Query, **options: Any) -> S_co:
        """Ask the next question and return a stream of the answer."""


class Model(Protocol[S]):
    """Interface of a model for `qwenvl chat` and `qwenvl batch`; see QwenVL."""

    @property
    def weights(self) -> list[str]:
        """Identifiers of the weights: a server's model name, or the digests of an opened model's stages and adapters.

        The digests of the stages depend on the dtypes of the weights.
        """

    @property
    def picture_label(self) -> str:
        """Text before each image in a prompt, `{}` for the image's number."""

    @property
    def adapters(self) -> tuple[str, ...]:
        """Adapter names that `Request.adapter` accepts."""

    def load(self) -> None:
        """Load the model now rather than at its first use."""

    def load_images(self, sources: Sequence[Any], folder: Optional[Path] = None) -> list[Image.Image]:
        """Load images; relative paths are resolved against `folder`."""

    def chat(self, system: str, adapter: Optional[str] = None) -> Conversation[S]:
        """Begin a conversation, with an adapter if one is named."""

    def ask(self, request: Request, folder: Optional[Path] = None) -> S:
        """Answer a request in segments; relative image paths are resolved against `folder`."""

    def wait_any(self, streams: Collection[S]) -> list[S]:
        """Generate until at least one of the submitted streams is done; return all that are done."""
