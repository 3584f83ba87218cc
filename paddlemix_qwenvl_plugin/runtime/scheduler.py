"""Scheduling: the requests and tokens of each step, admission, preemption."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from paddlemix_qwenvl_plugin.runtime.blocks import BlockPool
from paddlemix_qwenvl_plugin.runtime.generation import Generation, ImageInput


@dataclass(frozen=True)
class Limits:
    """Limits and capabilities of an executor.

    Attributes:
        max_running: maximum number of requests in a step.
        step_tokens: maximum number of tokens in a step; a longer prompt runs as a chunked prefill.
        n_blocks, block_tokens: blocks of the KV cache and tokens per block; one request of the model's full context
            must fit.
        prefix_cache: whether requests can share blocks.
        ahead: whether a step can be started while the previous one is still being computed.
    """

    max_running: int
    step_tokens: int
    n_blocks: int
    block_tokens: int
    prefix_cache: bool = True
    ahead: bool = False


@dataclass(frozen=True)
class Chunk:
    """The part of a step for one request: `n` pending tokens; with `picks`, the next token is picked after them.

    With `ahead`, `n` is 1: the token that the chunk at the same index of the running step picks; its id is not known
    yet.
    """

    generation: Generation
    n: int
    picks: bool
    ahead: bool = False


class Scheduler:
    """Scheduler with chunked prefill and preemption; the oldest and the shortest prompts share a step's tokens.

    Every decoding request has one token in every step. The remaining budget goes to chunks of prompts: one half to the
    oldest prompts, one half to the prompts with the fewest pending tokens, so that short prompts do not wait for long
    ones. When blocks run out, the request admitted last is preempted; its tokens, the generated ones too, then count as
    a prompt.

    Attributes:
        prompt_budget: maximum number of prompt tokens in a step with decoding requests, 1 to limits.step_tokens.
        waiting: requests to admit, in order.
        running: admitted requests, in the order of their admission.
        n_prompt_tokens: number of prompt tokens of the requests admitted so far.
        n_cached_tokens: number of these prompt tokens that were found in the prefix cache.
        n_preempted: number of preemptions.
    """

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.pool = BlockPool(limits.n_blocks)
        self.prompt_budget = limits.step_tokens
        self.waiting: deque[Generation] = deque()
        self.running: list[Generation] = []
        self.n_prompt_tokens = self.n_cached_tokens = self.n_preempted = 0
        # State of `schedule`.
        self._preempted: set[Generation] = set()
        self._full = False  # whether a waiting request did not fit: then no later one is admitted

    @property
    def idle(self) -> bool:
        """Whether no request waits or runs."""
        return not self.waiting and not self.running

    def add(self, generation: Generation) -> None:
        """Queue a request."""
        self.waiting.append(generation)

    def remove(self, generation: Generation) -> None:
        """Remove a request and free its blocks."""
        if generation in self.running:
            self.running.remove(generation)
            self._free(generation)
        elif generation in self.waiting:
            self.waiting.remove(generation)

    def image_to_encode(self) -> tuple[Generation, ImageInput] | None:
        """The next image to encode, of the first waiting request with images.

        None if no waiting request has images, if the first one with images needs no more features, or if `max_running`
        requests run.
        """
        if len(self.running) >= self.limits.max_running:
            return None
        # Only for the first such request: features take memory.
        generation = next((waiting for waiting in self.waiting if waiting.images), None)
        if generation is None:
            return None
        image = self._missing_image(generation, self._cached_blocks(generation))
        return None if image is None else (generation, image)

    def schedule(self) -> list[Chunk]:
        """Choose the chunks of the next step and allocate their blocks."""
        planned: dict[Generation, int] = {}  # tokens of each request in the step
        self._preempted.clear()
        self._full = False
        for generation in self.running.copy():
            if generation.decoding:
                self._plan(generation, 1, planned)
        budget = self.limits.step_tokens - len(planned)
        if planned:
            budget = min(budget, self.prompt_budget)
        prompts = [running for running in self.running if not running.decoding]
        prompts += (waiting for waiting in self.waiting if waiting not in self._preempted)
        if prompts and budget > 0:
            unused = self._plan_prompts(prompts, budget - budget // 2, planned)
            # The next pass, in the order of length, must not admit requests before the oldest one if that has no room.
            if not unused and not self._full:  # otherwise this pass has tried the oldest one
                self._full = not self._oldest_has_room()
            prompts.sort(key=lambda prompt: prompt.n_pending - planned.get(prompt, 0))
            self._plan_prompts(prompts, budget // 2 + unused, planned)
        return [Chunk(generation, n, n == generation.n_pending) for generation, n in planned.items()]

    def _plan_prompts(
        self, prompts: Iterable[Generation], budget: int, planned: dict[Generation, int]
    ) -> int:
        """Spend a token budget on prompts in the given order, admitting waiting ones; return the unused budget."""
        for generation in prompts:
            if budget <= 0:
                break
            if generation in self._preempted:
                continue
            if generation not in self.running:
                if self._full:
                    continue  # overtaking would starve the request that did not fit
                cached = self._cached_blocks(generation)
                if self._missing_image(generation, cached):
                    continue  # not encoded yet; requests without missing images may overtake this one
                if not self._has_room(generation, cached):
                    self._full = True
                    continue
                self._admit(generation, cached)
            n_planned = planned.get(generation, 0)
            n_more = min(budget, generation.n_pending - n_planned)
            if n_more and self._plan(generation, n_planned + n_more, planned):
                budget -= n_more
        return budget

    def schedule_ahead(self, chunks: Sequence[Chunk]) -> list[Chunk]:
        """Chunks of the decode step after a running step.

        Empty unless the executor can start steps ahead, no request waits, and the running step picks a token for every
        running request. Also empty if one of the requests has ended or reaches its maximum length with the picked
        token, or if too few blocks are free. A request that ends with a stop token in the running step is computed in
        vain.
        """
        if not self.limits.ahead or self.waiting or len(chunks) != len(self.running):
            return []
        needed = 0
        for chunk in chunks:
            generation = chunk.generation
            is_last_token = len(generation.tokens) + 1 >= generation.options.max_new_tokens
            if is_last_token or not chunk.picks or generation.finished:
                return []
            needed += self._n_blocks(generation.n_total + 1) - len(generation.blocks)
        if needed > self.pool.n_free:
            return []
        for chunk in chunks:
            # The tokens of the running step are not in `n_computed` yet.
            self._plan(chunk.generation, chunk.generation.n_total + 1 - chunk.generation.n_computed, {})
        return [Chunk(chunk.generation, 1, True, ahead=True) for chunk in chunks]

    def done(self, chunk: Chunk) -> None:
        """Record that a chunk was computed and register its full blocks; call this before its picked token is added."""
        generation = chunk.generation
        n_full_before = generation.n_computed // self.limits.block_tokens
        generation.n_computed += chunk.n
        n_full = generation.n_computed // self.limits.block_tokens
        if self.limits.prefix_cache and n_full > n_full_before:
            keys = generation.block_keys(n_full, self.limits.block_tokens)
            for i in range(n_full_before, n_full):
                self.pool.register(generation.blocks[i], keys[i])

    def preempt_all(self) -> None:
        """Preempt every running request, as after an interrupted step."""
        while self.running:
            self._preempt(self.running[-1])

    def _cached_blocks(self, generation: Generation) -> list[int]:
        """Cached blocks for the beginning of a request, without its last token: computing that one gives the logits."""
        if not self.limits.prefix_cache:
            return []
        n_blocks = (generation.n_total - 1) // self.limits.block_tokens
        return self.pool.find(generation.block_keys(n_blocks, self.limits.block_tokens))

    def _missing_image(self, generation: Generation, cached: Sequence[int]) -> ImageInput | None:
        """The first image without features that the cached blocks do not cover; None if there is none."""
        n_cached = len(cached) * self.limits.block_tokens
        for image in generation.images:
            if image.features is None and image.slots[1] > n_cached:
                return image
        return None

    def _oldest_has_room(self) -> bool:
        """Whether the oldest request that waits only for admission has room; True if there is none."""
        for generation in self.waiting:
            cached = self._cached_blocks(generation)
            if generation not in self._preempted and not self._missing_image(generation, cached):
                return self._has_room(generation, cached)
        return True

    def _has_room(self, generation: Generation, cached: Sequence[int]) -> bool:
        """Whether a waiting request fits and leaves the running requests the blocks for their next tokens.

        True if no request runs, since the pool holds at least one full context (Limits).
        """
        if not self.running:
            return True
        if len(self.running) >= self.limits.max_running:
            return False
        n_reserved = sum(
            max(1, self._n_blocks(running.n_total) - len(running.blocks)) for running in self.running
        )
        # Cached blocks without users count as free; the request takes these, too.
        n_available = self.pool.n_free - self.pool.n_unused(cached) - n_reserved
        return self._n_blocks(generation.n_total) - len(cached) <= n_available

    def _admit(self, generation: Generation, cached: list[int]) -> None:
        """Move a waiting request to the running requests, with its cached blocks."""
        self.pool.share(cached)
        self.waiting.remove(generation)
        self.running.append(generation)
        generation.blocks = cached
        generation.n_computed = len(cached) * self.limits.block_tokens
        if generation.n_cached is None:
            generation.n_cached = generation.n_computed
            self.n_prompt_tokens += len(generation.prompt)
            self.n_cached_tokens += generation.n_cached

    def _plan(self, generation: Generation, n: int, planned: dict[Generation, int]) -> int:
        """Plan `n` tokens of a request in the step and allocate their blocks.

        If blocks run out, the requests admitted last are preempted, possibly this one. Returns the number of planned
        tokens: n, or 0 if this request was preempted by now.
        """
        if generation in self._preempted:
            return 0
        needed = self._n_blocks(generation.n_computed + n)
        while len(generation.blocks) < needed:
            block = self.pool.allocate()
            if block is not None:
                generation.blocks.append(block)
                continue
            admitted_last = self.running[-1]
            planned.pop(admitted_last, None)
            self._preempt(admitted_last)
            if admitted_last is generation:
                return 0
        planned[generation] = n
        return n

    def _preempt(self, generation: Generation) -> None:
        self.n_preempted += 1
        self.running.remove(generation)
        self._preempted.add(generation)
        self._free(generation)
        self.waiting.appendleft(generation)

    def _free(self, generation: Generation) -> None:
        self.pool.release(generation.blocks)
        generation.reset()

    def _n_blocks(self, n_tokens: int) -> int:
        return -(-n_tokens // self.limits.block_tokens)


def images_of(generation: Generation, start: int, end: int) -> Iterator[tuple[ImageInput, int, int]]:
    """Yield each image with slots in tokens [start, end), and the range [first, last) of these slots."""
    for image in generation.images:
        first, last = max(start, image.slots[0]), min(end, image.slots[1])
        if first < last:
            yield image, first, last
