"""Training conversations: several questions about the same images."""

from __future__ import annotations

import random

from paddlemix_qwenvl_plugin.demo.world.sample import Turn
from paddlemix_qwenvl_plugin.demo.world.scene import Scene
from paddlemix_qwenvl_plugin.demo.world.tasks import image_turn, pair_turn

_CAPTIONS = ("caption", "grounded caption")
_ONCE = (*_CAPTIONS, "reading")  # tasks about the complete image, which a conversation contains at most once


def conversation(rng: random.Random, scenes: tuple[Scene, ...], n_turns: int) -> tuple[Turn, ...]:
    """Draw at most n_turns different questions about one or two images.

    Captions are mostly the last turns, because they contain the answers to other questions.
    """
    turns: dict[str, Turn] = {}
    for _ in range(n_turns):
        turn = pair_turn(rng, (scenes[0], scenes[1])) if len(scenes) > 1 else image_turn(rng, scenes[0])
        turns.setdefault(turn.task if turn.task in _ONCE else turn.question, turn)
    result = list(turns.values())
    if rng.random() < 0.8:
        result.sort(key=lambda turn: turn.task in _CAPTIONS)
    return tuple(result)
