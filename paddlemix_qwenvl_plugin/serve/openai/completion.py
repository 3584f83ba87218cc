"""Completions of a request: waiting for slots, loading of images, runs of the choices."""

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
class CompletionSpec:
    """Validated completion request: prompts, sampling parameters, stop conditions.

    Attributes:
        n: number of completions per prompt.
        n_logprobs: number of most likely tokens reported per token; None: no log probabilities.
        adapter: name of the LoRA adapter; None: the model without an adapter.
    """

    prompts: Sequence[ReadyPrompt]
    stop_token_ids: Sequence[int]
    options: GenerationOptions
    n: int = 1
    stop_strings: Sequence[str] = ()
    n_logprobs: Optional[int] = None
    adapter: Optional[str] = None


class Completion:
    """Completions of a request, from the queue to the last token."""

    def __init__(self, service: Service, spec: CompletionSpec, info: RequestInfo) -> None:
        """Prepare the completions.

        Args:
            info: contains the hash of the API key, for the limit per key; receives the token counts at the end, and
                with `log_prompts` the texts.
        """
        self._service = service
        self._spec = spec
        self._info = info
        self._runs: list[ChoiceRun] = []
        self._deadline = Deadline(service.settings.running_timeout)

    @property
    def n_choices(self) -> int:
        """Number of completions of all prompts."""
        return self._spec.n * len(self._spec.prompts)

    @property
    def n_prompt_tokens(self) -> int:
        """Number of prompt tokens; each prompt counts once, regardless of its number of choices."""
        return sum(len(prompt.token_ids) for prompt in self._spec.prompts)

    @property
    def n_completion_tokens(self) -> int:
        """Number of completion tokens of all choices so far."""
        return sum(run.n_tokens for run in self._runs)

    @property
    def n_cached_tokens(self) -> int:
        """Number of prompt tokens that the first choice of each prompt found in the prefix cache."""
        first_runs = self._runs[:: self._spec.n]  # the n runs of a prompt are consecutive
        return sum(run.n_cached for run in first_runs)

    async def events(self) -> AsyncGenerator[Event, None]:
        """Wait for slots, load the images, run the choices and yield their events. Closing cancels the remaining runs.

        Images are loaded only once the slots are held, so that a request that the queue refuses loads none.

        Raises:
            ApiError, QwenVLError: the slots are refused (Admission.slots), an image cannot be loaded, the engine
                failed, or the request timed out. A partial completion is never reported as complete.
        """
        async with self._service.admission.slots(self.n_choices, self._info.key):
            timer = asyncio.get_running_loop().call_later(self._deadline.seconds, self._time_out)
            try:
                if self._service.settings.log_prompts:
                    self._info.prompts = [self._text(prompt) for prompt in self._spec.prompts]
                    self._info.completions = [""] * self.n_choices
                for prompt in self._spec.prompts:
                    await self._prepare(prompt)
                choices = [run.events(self._info) for run in self._runs]
                events = choices[0] if len(choices) == 1 else merge(choices)
                try:
                    async for event in events:
                        if self._info.completions is not None:
                            self._info.completions[event.choice] += event.delta.text
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
        """Load the images of a prompt and create its runs."""
        spec, service = self._spec, self._service
        loading = load_images(service.images, prompt.images)
        try:
            # No time has been used before: a prompt with images is the only prompt of its request.
            images = await asyncio.wait_for(loading, self._deadline.seconds)
        except asyncio.TimeoutError:
            raise self._deadline.error(
                ", before its images were loaded; send fewer or smaller images"
            ) from None
        request = EngineRequest(
            prompt=prompt.token_ids,
            images=[image.pixels for image in images],
            stop_token_ids=spec.stop_token_ids,
            options=spec.options.within(service.config.max_position_embeddings - len(prompt.token_ids)),
            generated=prompt.generated,  # ranges of earlier answers in the prompt
            n_logprobs=spec.n_logprobs,
            adapter=spec.adapter,
        )
        size = images[-1].size if images else None  # boxes refer to the last image
        # The other choices are submitted after the first choice's first token, so that they find the prompt
        # in the prefix cache.
        first_run: Optional[ChoiceRun] = None
        for number in range(spec.n):
            seeded = replace(request, options=_with_choice_seed(request.options, number))
            run = ChoiceRun(
                service, len(self._runs), seeded, spec.stop_strings, size, self._deadline, after=first_run
            )
            first_run = first_run or run
            self._runs.append(run)

    def _text(self, prompt: ReadyPrompt) -> str:
        """Decode a prompt for the log, without the image slots."""
        tokenizer = self._service.tokenizer
        return tokenizer.decode(token for token in prompt.token_ids if token != tokenizer.img_pad_id)

    def _time_out(self) -> None:
        """Cancel all runs: the deadline has passed."""
        self._deadline.passed = True
        for run in self._runs:
            run.cancel()


def _with_choice_seed(options: GenerationOptions, number: int) -> GenerationOptions:
    """Options of a prompt's choice: the first choice has the request's seed, other choices have derived seeds."""
    if options.seed is None or number == 0:
        return options
    # A large step, so that requests with consecutive seeds have no seed in common.
    return replace(options, seed=(options.seed + (number << 40)) % 2**64)
