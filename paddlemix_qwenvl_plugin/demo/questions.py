"""Bundled questions: samples of the demo world from fixed seeds, with their images as files."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Optional

from paddlemix_qwenvl_plugin.demo.world import captions, pairs, questions
from paddlemix_qwenvl_plugin.demo.world.sample import Sample, Turn
from paddlemix_qwenvl_plugin.demo.world.scene import random_scene

IMAGES = Path(__file__).resolve().parent / "images"


@dataclass(frozen=True)
class Question:
    """One-turn sample with a name and a title."""

    name: str
    title: str
    sample: Sample

    @property
    def turn(self) -> Turn:
        """The sample's only turn."""
        return self.sample.turns[0]

    @property
    def images(self) -> list[Path]:
        """PNG files of the scenes, drawn by tools/draw_demo_images.py.

        Shipped as files, so the pixels do not depend on Pillow's font.
        """
        n_images = len(self.sample.scenes)
        if n_images == 1:
            return [IMAGES / f"{self.name}.png"]
        return [IMAGES / f"{self.name}-{number}.png" for number in range(1, n_images + 1)]


def _question(
    name: str,
    title: str,
    make_turn: Callable[[random.Random, Any, str], Optional[Turn]],
    seed: str,
    language: str = "en",
    n_images: int = 1,
    form: Literal["chat", "base"] = "chat",
) -> Question:
    rng = random.Random(seed)
    scenes = tuple(random_scene(rng) for _ in range(n_images))
    turn = make_turn(rng, scenes if n_images > 1 else scenes[0], language)
    if turn is None:
        raise AssertionError(f"{seed}: the scene allows no question of this kind")
    return Question(name, title, Sample(scenes, (turn,), form))


# The seeds were chosen by the look of the images, before any completion was generated.
# No training seed begins with "demo".
QUESTIONS = (
    _question("caption", "A caption", captions.caption, "demo caption 98"),
    _question("grounded", "A caption with boxes", captions.grounded_caption, "demo grounded 66", form="base"),
    _question("locate", "Find a thing", captions.locate, "demo locate 91"),
    _question("relation", "A question", questions.side, "demo relation 109"),
    _question("count", "Counting", questions.count, "demo count 16"),
    _question("read", "Reading", questions.read, "demo read 78"),
    _question("pair", "Two images", pairs.which, "demo pair 38", n_images=2),
    _question("chinese", "In Chinese", captions.grounded_caption, "demo zh 32", language="zh"),
)
