"""Running the completions of a request on the engine."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple, Optional

from paddlemix_qwenvl_plugin.runtime.options import GenerationOptions
from paddlemix_qwenvl_plugin.serve.engine_api import EngineRequest, Token, TokenStream
from paddlemix_qwenvl_plugin.serve.errors import ApiError
from paddlemix_qwenvl_plugin.serve.openai.completion_text import CompletionText, Delta
from paddlemix_qwenvl_plugin.serve.openai.images import load_images
from paddlemix_qwenvl_plugin.serve.openai.merge import merge
from paddlemix_qwenvl_plugin.serve.openai.prompt import ReadyPrompt
from paddlemix_qwenvl_plugin.serve.service import Service
from paddlemix_qwenvl_plugin.util.errors import QwenVLError


@dataclass(frozen=True)
class Asked:
    """What a request asks of the engine.

    Attributes:
        n: completions of each prompt.
        n_logprobs: see EngineRequest.
        key: the API key, for its share of the slots.
    """

    prompts: Sequence[ReadyPrompt]
    stop_token_ids: Sequence[int]
    options: GenerationOptions
    n: int = 1
    stop_strings: Sequence[str] = ()
    n_logprobs: Optional[int] = None
    key: Optional[str] = None


class Event(NamedTuple):
    """What is new in a choice; the last one of a choice has its finish reason.

    Attributes:
        image_size: (width, height) in pixels of the image that the boxes refer to.
    """

    choice: int
    delta: Delta
    finish_reason: Optional[Literal["stop", "length"]]
    image_size: Optional[tuple[int, int]]


class Completion:
    """The completions of a request, from its place in the queue to its last token.

    Attributes:
        n_completion_tokens, n_cached_tokens: for the usage, so far.
    """

    def __init__(self, service: Service, asked: Asked) -> None:
        self._service = service
        self._asked = asked
        self._streams: list[TokenStream] = []
        self._timed_out = False
        self.n_completion_tokens = 0
        self.n_cached_tokens = 0

    @property
    def n_choices(self) -> int:
        return self._asked.n * len(self._asked.prompts)

    @property
    def n_prompt_tokens(self) -> int:
        return sum(len(prompt.token_ids) for prompt in self._asked.prompts)

    async def events(self) -> AsyncGenerator[Event, None]:
        """Wait for slots, load the images and generate. Closing this cancels what is left at the engine's next step.

        Images are loaded within the slots: a request that the queue refuses costs no more than its bytes.

        Raises:
            ApiError, QwenVLError: the queue is full, an image cannot be loaded, the engine failed, or the time for a
                request was up: what was said until then is not passed off as a whole completion.
        """
        service, asked = self._service, self._asked
        async with service.admission.slots(self.n_choices, asked.key):
            timer = asyncio.get_running_loop().call_later(service.settings.running_timeout, self._time_out)
            try:
                choices: list[AsyncGenerator[Event, None]] = []
                for number, prompt in enumerate(asked.prompts):
                    choices += await self._choices(prompt, number * asked.n)
                events = choices[0] if len(choices) == 1 else merge(choices)
                try:
                    async for event in events:
                        yield event
                finally:
                    await events.aclose()
            finally:
                timer.cancel()
                for stream in self._streams:
                    stream.cancel()

    async def _choices(self, prompt: ReadyPrompt, first_index: int) -> list[AsyncGenerator[Event, None]]:
        """The choices of a prompt. Their images are loaded; nothing is submitted before they are iterated."""
        asked, service = self._asked, self._service
        images = await load_images(service.images, prompt.images)
        size = images[-1].size if images else None
        request = EngineRequest(
            prompt=prompt.token_ids,
            images=[image.pixels for image in images],
            stop_token_ids=asked.stop_token_ids,
            options=asked.options.within(service.config.max_position_embeddings - len(prompt.token_ids)),
            generated=prompt.generated,
            n_logprobs=asked.n_logprobs,
        )
        # The others find the prompt in the prefix cache when the first one has computed it.
        computed = asyncio.Event()
        return [
            self._choice(
                first_index + i,
                replace(request, options=_for_choice(request.options, i)),
                size,
                i > 0,
                computed,
            )
            for i in range(asked.n)
        ]

    async def _choice(
        self,
        index: int,
        request: EngineRequest,
        image_size: Optional[tuple[int, int]],
        waits: bool,
        computed: asyncio.Event,
    ) -> AsyncGenerator[Event, None]:
        if waits:
            await computed.wait()
        try:
            self._check_time()
            stream = self._service.engine.submit(request)
            self._streams.append(stream)
            text = CompletionText(
                self._service.tokenizer,
                request.stop_token_ids,
                self._asked.stop_strings,
                request.n_logprobs is not None,
            )
            tokens = stream.__aiter__()
            async for new in tokens:
                computed.set()
                delta = text.add(new)
                if text.stopped:
                    stream.cancel()
                    break
                if delta:
                    yield Event(index, delta, None, image_size)
            rest = text.finish()
            self.n_completion_tokens += text.n_tokens
            if text.stopped:
                rest = _joined(delta, rest)
            yield Event(index, rest, "stop" if text.stopped else self._reason(stream), image_size)
            if text.stopped:
                await _drain(tokens)
            if not waits and stream.ended is not None:
                self.n_cached_tokens += stream.ended.n_cached
        finally:
            computed.set()

    def _reason(self, stream: TokenStream) -> Literal["stop", "length"]:
        """Why a stream ended that nobody here ended."""
        reason = stream.ended.reason if stream.ended is not None else "cancelled"
        if reason == "cancelled":
            self._check_time()
            raise ApiError(503, "The server has ended this request.", "server_error", code="cancelled")
        return reason

    def _time_out(self) -> None:
        self._timed_out = True
        for stream in self._streams:
            stream.cancel()

    def _check_time(self) -> None:
        if self._timed_out:
            # Asking again would take as long: clients that try again by themselves should not.
            raise ApiError(
                504,
                f"The completion took more than {self._service.settings.running_timeout:g} seconds; "
                "ask for fewer tokens.",
                "server_error",
                code="timeout",
                headers={"x-should-retry": "false"},
            )


def _for_choice(options: GenerationOptions, index: int) -> GenerationOptions:
    """The options of a choice: the first one has the request's own seed."""
    if options.seed is None or index == 0:
        return options
    return replace(options, seed=(options.seed + (index << 40)) % 2**64)


def _joined(first: Delta, second: Delta) -> Delta:
    return Delta(first.text + second.text, first.boxes + second.boxes, first.tokens + second.tokens)


async def _drain(tokens: AsyncIterator[list[Token]]) -> None:
    """Let a cancelled stream end, for what it says of its prompt."""
    with suppress(QwenVLError):  # the completion is whole
        async for _ in tokens:
            pass
