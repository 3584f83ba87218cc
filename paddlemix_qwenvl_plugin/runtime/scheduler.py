"""Which requests run in the next step, and how many of their tokens."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from paddlemix_qwenvl_plugin.runtime.blocks import BlockPool
from paddlemix_qwenvl_plugin.runtime.generation import Generation, ImageInput


@dataclass(frozen=True)
class Limits:
    """What an executor can do, and how steps are cut.

    Attributes:
        max_running: requests in one step.
        step_tokens: tokens in one step; a longer prompt is run in chunks.
        n_blocks, block_tokens: of the KV cache. It must hold one request of the model's whole context.
        prefix_cache: whether blocks can be shared between requests.
        ahead: whether a step can be started while the one before it is computed.
    """

    max_running: int
    step_tokens: int
    n_blocks: int
    block_tokens: int
    prefix_cache: bool = True
    ahead: bool = False


@dataclass(frozen=True)
class Chunk:
    """`n` pending tokens of a request in a step; with `picks` the last of them gives the next token.

    With `ahead` it is one token, the one that the step before picks in the same place, and which is not known yet.
    """

    generation: Generation
    n: int
    picks: bool
    ahead: bool = False


class Scheduler:
    """First come, first served, in steps under a budget of tokens; short prompts do not wait for long ones to end.

    Every decoding request runs its token in every step. What is left of the budget goes to prompts, in chunks: one half
    to the oldest ones, the other to those with the fewest tokens left. When blocks run out, the request that was
    admitted last gives its blocks back and waits to be computed again.

    Attributes:
        prompt_budget: prompt tokens of a step beside which others decode, 1 to limits.step_tokens.
        running: in the order of their admission.
        n_prompt_tokens, n_cached_tokens: of the requests admitted so far, and how many were in the prefix cache.
        n_preempted: how often a request gave its blocks back.
    """

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.pool = BlockPool(limits.n_blocks)
        self.prompt_budget = limits.step_tokens
        self.waiting: deque[Generation] = deque()
        self.running: list[Generation] = []
        self.n_prompt_tokens = self.n_cached_tokens = self.n_preempted = 0
        # While the next step is being chosen.
        self._preempted: set[Generation] = set()
        self._full = False  # one that waits has no room

    @property
    def idle(self) -> bool:
        return not self.waiting and not self.running

    def add(self, generation: Generation) -> None:
        """Queue a request."""
        self.waiting.append(generation)

    def remove(self, generation: Generation) -> None:
        """Forget a request and free its blocks."""
        if generation in self.running:
            self.running.remove(generation)
            self._free(generation)
        elif generation in self.waiting:
            self.waiting.remove(generation)

    def image_to_encode(self) -> tuple[Generation, ImageInput] | None:
        """An image whose features the next request with images needs and does not have."""
        if len(self.running) >= self.limits.max_running:
            return None
        # Of one request alone: features take memory.
        generation = next((each for each in self.waiting if each.images), None)
        if generation is None:
            return None
        image = self._missing_image(generation, self._found(generation))
        return None if image is None else (generation, image)

    def schedule(self) -> list[Chunk]:
        """Choose the next step, and allocate its blocks."""
        planned: dict[Generation, int] = {}
        self._preempted.clear()
        self._full = False
        for generation in self.running.copy():
            if generation.decoding:
                self._plan(generation, 1, planned)
        budget = self.limits.step_tokens - len(planned)
        if planned:
            budget = min(budget, self.prompt_budget)
        prompts = [each for each in self.running if not each.decoding]
        prompts += (each for each in self.waiting if each not in self._preempted)
        if prompts and budget > 0:
            left = self._plan_prompts(prompts, budget - budget // 2, planned)
            prompts.sort(key=lambda each: each.n_pending - planned.get(each, 0))
            self._plan_prompts(prompts, budget // 2 + left, planned)
        return [Chunk(each, n, n == each.n_pending) for each, n in planned.items()]

    def _plan_prompts(
        self, prompts: Iterable[Generation], budget: int, planned: dict[Generation, int]
    ) -> int:
        """Spend a budget of tokens on prompts in this order, admitting those that wait; what is left of it."""
        for generation in prompts:
            if budget <= 0:
                break
            if generation in self._preempted:
                continue
            if generation not in self.running:
                if self._full:
                    continue  # overtaken again and again, that one would never have room
                found = self._found(generation)
                if self._missing_image(generation, found):
                    continue  # those without images need not wait for it
                if not self._has_room(generation, found):
                    self._full = True
                    continue
                self._admit(generation, found)
            before = planned.get(generation, 0)
            n = min(budget, generation.n_pending - before)
            if n and self._plan(generation, before + n, planned):
                budget -= n
        return budget

    def schedule_ahead(self, chunks: Sequence[Chunk]) -> list[Chunk]:
        """The step behind one that is being computed, if the same requests all go on and nothing else waits."""
        if not self.limits.ahead or self.waiting or len(chunks) != len(self.running):
            return []
        needed = 0
        for chunk in chunks:
            generation = chunk.generation
            last = len(generation.tokens) + 1 >= generation.options.max_new_tokens
            if last or not chunk.picks or generation.finished:
                return []
            needed += self._n_blocks(generation.n_total + 1) - len(generation.blocks)
        if needed > self.pool.n_free:
            return []
        for chunk in chunks:
            self._plan(chunk.generation, chunk.generation.n_total + 1 - chunk.generation.n_computed, {})
        return [Chunk(chunk.generation, 1, True, ahead=True) for chunk in chunks]

    def done(self, chunk: Chunk) -> None:
        """Note that a chunk's tokens were computed; the token that it gave has not been added yet."""
        generation = chunk.generation
        before = generation.n_computed // self.limits.block_tokens
        generation.n_computed += chunk.n
        n_full = generation.n_computed // self.limits.block_tokens
        if self.limits.prefix_cache and n_full > before:
            keys = generation.block_keys(n_full, self.limits.block_tokens)
            for i in range(before, n_full):
                self.pool.register(generation.blocks[i], keys[i])

    def preempt_all(self) -> None:
        """Have every running request computed again, as after a step that was broken off."""
        while self.running:
            self._preempt(self.running[-1])

    def _found(self, generation: Generation) -> list[int]:
        """Blocks in the cache for the beginning of a request; its last token is always computed."""
        if not self.limits.prefix_cache:
            return []
        n_blocks = (generation.n_total - 1) // self.limits.block_tokens
        return self.pool.find(generation.block_keys(n_blocks, self.limits.block_tokens))

    def _missing_image(self, generation: Generation, found: Sequence[int]) -> ImageInput | None:
        """The first image without features of those that the blocks found do not cover."""
        n_found = len(found) * self.limits.block_tokens
        for image in generation.images:
            if image.features is None and image.slots[1] > n_found:
                return image
        return None

    def _has_room(self, generation: Generation, found: Sequence[int]) -> bool:
        """Whether a request that waits can run without taking blocks that the running ones are about to need."""
        if not self.running:
            return True
        if len(self.running) >= self.limits.max_running:
            return False
        others = sum(max(1, self._n_blocks(each.n_total) - len(each.blocks)) for each in self.running)
        spare = self.pool.n_free - self.pool.n_unused(found) - others
        return self._n_blocks(generation.n_total) - len(found) <= spare

    def _admit(self, generation: Generation, found: list[int]) -> None:
        """Move a waiting request to the running ones, with the blocks that were found for it."""
        self.pool.share(found)
        self.waiting.remove(generation)
        self.running.append(generation)
        generation.blocks = found
        generation.n_computed = len(found) * self.limits.block_tokens
        if generation.n_cached is None:
            generation.n_cached = generation.n_computed
            self.n_prompt_tokens += len(generation.prompt)
            self.n_cached_tokens += generation.n_cached

    def _plan(self, generation: Generation, n: int, planned: dict[Generation, int]) -> int:
        """Allocate blocks for n more tokens, taking the youngest requests' if need be; n, or 0 if it is preempted."""
        if n <= 0 or generation in self._preempted:
            return 0
        needed = self._n_blocks(generation.n_computed + n)
        while len(generation.blocks) < needed:
            block = self.pool.allocate()
            if block is not None:
                generation.blocks.append(block)
                continue
            youngest = self.running[-1]
            planned.pop(youngest, None)
            self._preempt(youngest)
            if youngest is generation:
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
    """The images with slots among tokens [start, end), each with the part of its slots that lies there."""
    for image in generation.images:
        first, last = max(start, image.slots[0]), min(end, image.slots[1])
        if first < last:
            yield image, first, last
