"""Training conversations: several questions about the same images."""

from __future__ import annotations

import random

from paddlemix_qwenvl_plugin.demo.world.sample import Turn
from paddlemix_qwenvl_plugin.demo.world.scene import Scene
from paddlemix_qwenvl_plugin.demo.world.tasks import image_turn, pair_turn

_CAPTIONS = ("caption", "grounded caption")
_WHOLE = (*_CAPTIONS, "reading")  # these describe the complete image, so once per conversation suffices


def conversation(rng: random.Random, scenes: tuple[Scene, ...], n_turns: int) -> tuple[Turn, ...]:
    """Draw different questions about one or two images; captions mostly come last, since they answer the others."""
    turns: dict[str, Turn] = {}
    for _ in range(n_turns):
        turn = pair_turn(rng, (scenes[0], scenes[1])) if len(scenes) > 1 else image_turn(rng, scenes[0])
        turns.setdefault(turn.task if turn.task in _WHOLE else turn.question, turn)
    chosen = list(turns.values())
    if rng.random() < 0.8:
        chosen.sort(key=lambda turn: turn.task in _CAPTIONS)
    return tuple(chosen)
