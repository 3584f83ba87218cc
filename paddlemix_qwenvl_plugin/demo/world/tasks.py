"""Random samples of the demo world, reproducible by seed."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any, Optional

from paddlemix_qwenvl_plugin.demo.world import captions, pairs, questions
from paddlemix_qwenvl_plugin.demo.world.names import LANGUAGES
from paddlemix_qwenvl_plugin.demo.world.sample import Sample, Turn
from paddlemix_qwenvl_plugin.demo.world.scene import Scene, random_scene

_Maker = Callable[[random.Random, Any, str], Optional[Turn]]

# Weights of the tasks in a draw, which is repeated if the drawn task has no question about the scene.
_ONE_IMAGE: dict[_Maker, float] = {
    questions.colour: 8,
    questions.kind: 6,
    questions.size: 5,
    questions.place: 8,
    questions.exists: 7,
    questions.count: 10,
    questions.larger: 6,
    questions.side: 8,
    captions.locate: 12,
    captions.region: 7,
    captions.caption: 9,
    captions.grounded_caption: 9,
}
_TWO_IMAGES: dict[_Maker, float] = {
    pairs.describe: 3,
    pairs.which: 3,
    pairs.more: 2,
    pairs.total: 2,
    pairs.colour: 3,
}


def held_out(number: int) -> Sample:
    """Sample `number` of the held-out set, with one turn. No training sample has the same seed."""
    return random_sample(random.Random(f"held-out {number}"))


def random_sample(rng: random.Random) -> Sample:
    """Draw a sample with one turn: one image in chat form or base form, or two images in chat form."""
    if rng.random() < 0.15:
        scenes = (random_scene(rng), random_scene(rng))
        return Sample(scenes, (pair_turn(rng, scenes),), "chat")
    scene = random_scene(rng)
    if rng.random() < 0.2:
        return Sample((scene,), (captions.base_turn(rng, scene),), "base")
    return Sample((scene,), (image_turn(rng, scene),), "chat")


def image_turn(rng: random.Random, scene: Scene) -> Turn:
    """Draw a question about one image: often a reading question if the scene has text, rarely if it has none."""
    if rng.random() < (0.45 if scene.texts else 0.02):
        return questions.read(rng, scene, rng.choice(LANGUAGES))
    return _draw(rng, _ONE_IMAGE, scene)


def pair_turn(rng: random.Random, scenes: tuple[Scene, Scene]) -> Turn:
    """Draw a question about two images."""
    return _draw(rng, _TWO_IMAGES, scenes)


def _draw(rng: random.Random, makers: dict[_Maker, float], subject: Any) -> Turn:
    while True:
        maker = rng.choices(list(makers), list(makers.values()))[0]
        turn = maker(rng, subject, rng.choice(LANGUAGES))
        if turn is not None:
            return turn
