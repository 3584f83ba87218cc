"""The completions of a request: the queue, the images, the choices."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, replace
from typing import Optional

from paddlemix_qwenvl_plugin.runtime.options import GenerationOptions
from paddlemix_qwenvl_plugin.serve.engine_api import EngineRequest
from paddlemix_qwenvl_plugin.serve.openai.choice import ChoiceRun, Deadline, Event
from paddlemix_qwenvl_plugin.serve.openai.images import load_images
from paddlemix_qwenvl_plugin.serve.openai.merge import merge
from paddlemix_qwenvl_plugin.serve.openai.prompt import ReadyPrompt
from paddlemix_qwenvl_plugin.serve.request_info import RequestInfo
from paddlemix_qwenvl_plugin.serve.service import Service


@dataclass(frozen=True)
class Asked:
    """What a request asks of the engine.

    Attributes:
        n: completions of each prompt.
        n_logprobs: see EngineRequest.
    """

    prompts: Sequence[ReadyPrompt]
    stop_token_ids: Sequence[int]
    options: GenerationOptions
    n: int = 1
    stop_strings: Sequence[str] = ()
    n_logprobs: Optional[int] = None


class Completion:
    """The completions of a request, from its place in the queue to its last token."""

    def __init__(self, service: Service, asked: Asked, info: RequestInfo) -> None:
        """`info` has the key whose share of the slots is taken, and is told the usage in the end."""
        self._service = service
        self._asked = asked
        self._info = info
        self._runs: list[ChoiceRun] = []
        self._deadline = Deadline(service.settings.running_timeout)

    @property
    def n_choices(self) -> int:
        return self._asked.n * len(self._asked.prompts)

    @property
    def n_prompt_tokens(self) -> int:
        """Tokens of the prompts, each counted once however many choices it has."""
        return sum(len(prompt.token_ids) for prompt in self._asked.prompts)

    @property
    def n_completion_tokens(self) -> int:
        """Tokens of all choices so far."""
        return sum(run.n_tokens for run in self._runs)

    @property
    def n_cached_tokens(self) -> int:
        """Tokens of the prompts that the first choice of each found in the prefix cache."""
        return sum(run.n_cached for run in self._runs[:: self._asked.n])

    async def events(self) -> AsyncGenerator[Event, None]:
        """Wait for slots, load the images and generate. Closing this cancels what is left at the engine's next step.

        Images are loaded within the slots: a request that the queue refuses costs no more than its bytes.

        Raises:
            ApiError, QwenVLError: the queue is full, an image cannot be loaded, the engine failed, or the time for a
                request was up: what was said until then is not passed off as a whole completion.
        """
        async with self._service.admission.slots(self.n_choices, self._info.key):
            timer = asyncio.get_running_loop().call_later(self._deadline.seconds, self._time_out)
            try:
                for prompt in self._asked.prompts:
                    await self._prepare(prompt)
                choices = [run.events(self._info) for run in self._runs]
                events = choices[0] if len(choices) == 1 else merge(choices)
                try:
                    async for event in events:
                        yield event
                finally:
                    await events.aclose()
            finally:
                timer.cancel()
                for run in self._runs:
                    run.cancel()
                self._info.prompt_tokens = self.n_prompt_tokens
                self._info.completion_tokens = self.n_completion_tokens
                self._info.cached_tokens = self.n_cached_tokens

    async def _prepare(self, prompt: ReadyPrompt) -> None:
        """Load the images of a prompt and prepare its choices."""
        asked, service = self._asked, self._service
        loading = load_images(service.images, prompt.images)
        try:
            # Of a request's prompts one at most has images: the deadline begins with them.
            images = await asyncio.wait_for(loading, self._deadline.seconds)
        except asyncio.TimeoutError:
            raise self._deadline.error() from None
        request = EngineRequest(
            prompt=prompt.token_ids,
            images=[image.pixels for image in images],
            stop_token_ids=asked.stop_token_ids,
            options=asked.options.within(service.config.max_position_embeddings - len(prompt.token_ids)),
            generated=prompt.generated,
            n_logprobs=asked.n_logprobs,
        )
        size = images[-1].size if images else None
        first: Optional[ChoiceRun] = None
        for number in range(asked.n):
            own = replace(request, options=_for_choice(request.options, number))
            run = ChoiceRun(service, len(self._runs), own, asked.stop_strings, size, self._deadline, first)
            first = first or run
            self._runs.append(run)

    def _time_out(self) -> None:
        self._deadline.passed = True
        for run in self._runs:
            run.cancel()


def _for_choice(options: GenerationOptions, number: int) -> GenerationOptions:
    """The options of a choice: the first one has the request's own seed."""
    if options.seed is None or number == 0:
        return options
    return replace(options, seed=(options.seed + (number << 40)) % 2**64)
