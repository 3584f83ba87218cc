"""Which requests run in the next step, and how many of their tokens."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
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
    """First come, first served, in steps under a budget of tokens.

    Every decoding request runs its token in every step. What is left of the budget goes to prompts, in chunks. When
    blocks run out, the youngest request gives its blocks back and waits to be computed again.

    Attributes:
        prompt_budget: prompt tokens of a step beside which others decode, 1 to limits.step_tokens.
    """

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.pool = BlockPool(limits.n_blocks)
        self.prompt_budget = limits.step_tokens
        self.waiting: deque[Generation] = deque()
        self.running: list[Generation] = []  # the oldest first
        self._preempted: set[Generation] = set()  # while the next step is being chosen

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

    def image_to_encode(self) -> ImageInput | None:
        """An image that the next request to be admitted needs, and whose features are not known."""
        if not self.waiting or len(self.running) >= self.limits.max_running:
            return None
        generation = self.waiting[0]
        n_found = len(self._found(generation)) * self.limits.block_tokens
        for image in generation.images:
            if image.features is None and image.slots[1] > n_found:
                return image
        return None

    def schedule(self) -> list[Chunk]:
        """Choose the next step, and allocate its blocks."""
        planned: dict[Generation, int] = {}
        self._preempted.clear()
        prompts = []
        for generation in self.running.copy():
            if generation.decoding:
                self._plan(generation, 1, planned)
            else:
                prompts.append(generation)
        budget = self.limits.step_tokens - len(planned)
        if planned:
            budget = min(budget, self.prompt_budget)
        for generation in prompts:
            budget -= self._plan(generation, min(budget, generation.n_pending), planned)
        while budget > 0 and self.waiting and len(self.running) < self.limits.max_running:
            generation = self.waiting[0]
            if not self._admit(generation):
                break
            budget -= self._plan(generation, min(budget, generation.n_pending), planned)
        return [Chunk(each, n, n == each.n_pending) for each, n in planned.items()]

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

    def _admit(self, generation: Generation) -> bool:
        """Move the first waiting request to the running ones, unless an image is missing or blocks are scarce."""
        found = self._found(generation)
        n_found = len(found) * self.limits.block_tokens
        if any(image.features is None and image.slots[1] > n_found for image in generation.images):
            return False
        self.pool.share(found)
        # Room for all of it, and a block for each of the others, or they would take its blocks back at once.
        spare = self.pool.n_free - len(self.running)
        if self.running and self._n_blocks(generation.n_total) - len(found) > spare:
            self.pool.release(found)
            return False
        self.waiting.popleft()
        self.running.append(generation)
        self._preempted.discard(generation)
        generation.blocks = found
        generation.n_computed = generation.n_cached = n_found
        return True

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
