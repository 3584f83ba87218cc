"""Scene description: objects and their geometry. Lengths are in thousandths of the image's side."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from functools import cached_property
from typing import Optional

from paddlemix_qwenvl_plugin.demo.world.lettering import text_corners
from paddlemix_qwenvl_plugin.demo.world.names import BACKGROUNDS, COLOURS, RGB, SHAPES, TEXT_COLOURS, WORDS
from paddlemix_qwenvl_plugin.demo.world.outlines import Points, outline

Box = tuple[int, int, int, int]
Colour = tuple[int, int, int]

BOX_STEP = 10
"""Rounding step of box coordinates, in thousandths: about one of the 128 pixels of the demo model's input."""

_CELL = 1000 / 3
_RADII = {"small": (75, 92), "large": (128, 155)}
_MARGIN = 12  # minimum distance between objects' bounds; half of it to the image's edge
_MAX_TEXT_WIDTH = 880


@dataclass(frozen=True)
class Thing:
    """A shape or a text.

    `kind`: a shape's name or "text"; `cell`: index in the 3 x 3 grid in reading order, for a text the middle cell of
    its row; `size`: "small" or "large", empty for a text; `angle`: rotation in degrees, clockwise.
    """

    kind: str
    colour: str
    rgb: Colour
    cell: int
    centre: tuple[float, float]
    size: str
    extent: float
    """Radius of a shape, font size of a text."""
    angle: float
    text: str = ""

    @cached_property
    def corners(self) -> Points:
        """Polygon of a shape, or corners of the bounding rectangle of a text."""
        x, y = self.centre
        points = (
            text_corners(self.text, self.extent)
            if self.text
            else [(px * self.extent, py * self.extent) for px, py in outline(self.kind)]
        )
        cos, sin = math.cos(math.radians(self.angle)), math.sin(math.radians(self.angle))
        return [(x + px * cos - py * sin, y + px * sin + py * cos) for px, py in points]

    @cached_property
    def bounds(self) -> tuple[float, float, float, float]:
        """Bounding box: left, top, right, bottom."""
        xs, ys = zip(*self.corners)
        return min(xs), min(ys), max(xs), max(ys)

    @property
    def box(self) -> Box:
        """`bounds` rounded to BOX_STEP and clipped to the image, as the model writes them."""
        left, top, right, bottom = (
            min(1000, max(0, round(value / BOX_STEP) * BOX_STEP)) for value in self.bounds
        )
        return left, top, right, bottom


@dataclass(frozen=True)
class Scene:
    """Objects in reading order on a background, a vertical gradient between two pale colours."""

    things: tuple[Thing, ...]
    background: tuple[Colour, Colour]
    noise: int
    """Largest change of an 8-bit colour value by the noise."""
    seed: int
    """Seed of the noise."""

    @property
    def shapes(self) -> tuple[Thing, ...]:
        """Objects that are shapes."""
        return tuple(thing for thing in self.things if not thing.text)

    @property
    def texts(self) -> tuple[Thing, ...]:
        """Objects that are texts."""
        return tuple(thing for thing in self.things if thing.text)


def random_scene(rng: random.Random) -> Scene:
    """Draw a scene: one to four shapes, one to three shapes with one text, or one or two texts."""
    while True:
        scene = _try_scene(rng)
        if scene is not None:
            return scene


def _try_scene(rng: random.Random) -> Optional[Scene]:
    # Numbers of shapes and texts, and the weights of these choices in percent.
    n_shapes, n_texts = rng.choices(
        ((rng.randint(1, 4), 0), (rng.randint(1, 3), 1), (0, 1), (0, 2)), (45, 35, 6, 14)
    )[0]
    rows = rng.sample(range(3), n_texts)
    free_cells = [cell for cell in range(9) if cell // 3 not in rows]
    # Few kinds and colours make objects alike, so that counting and distinguishing them matter.
    kinds = rng.sample(list(SHAPES), rng.choice((1, 2, 3, 7)))
    colours = rng.sample(list(COLOURS), rng.choice((1, 2, 3, 8)))
    things: list[Thing] = []
    for row in rows:
        things.append(_random_text(rng, row))
    for cell in rng.sample(free_cells, n_shapes):
        things.append(_random_shape(rng, rng.choice(kinds), rng.choice(colours), cell))
    if any(not _inside(thing) for thing in things) or any(
        _near(a, b) for i, a in enumerate(things) for b in things[:i]
    ):
        return None
    upper = rng.choice(BACKGROUNDS)
    lower = rng.choice((upper, rng.choice(BACKGROUNDS)))
    ordered = tuple(sorted(things, key=lambda thing: thing.cell))
    return Scene(ordered, (upper, lower), rng.choice((0, 4, 8)), rng.getrandbits(32))


def _random_shape(rng: random.Random, kind: str, colour: str, cell: int) -> Thing:
    size = rng.choice(("small", "large"))
    radius = rng.uniform(*_RADII[size])
    centre = tuple(
        min(max((index + 0.5) * _CELL + rng.uniform(-60, 60), radius + _MARGIN), 1000 - radius - _MARGIN)
        for index in (cell % 3, cell // 3)
    )
    angle = rng.uniform(-12, 12)
    return Thing(kind, colour, _shade(rng, colour), cell, (centre[0], centre[1]), size, radius, angle)


def _random_text(rng: random.Random, row: int) -> Thing:
    text = random_text(rng)
    font_size = rng.uniform(180, 235)
    xs, ys = zip(*text_corners(text, font_size))
    width, height = max(xs) - min(xs), max(ys) - min(ys)
    scale = min(1.0, _MAX_TEXT_WIDTH / width)
    font_size, width, height = font_size * scale, width * scale, height * scale
    x = rng.uniform(width / 2 + 30, 970 - width / 2)
    y = min(max((row + 0.5) * _CELL + rng.uniform(-50, 50), height / 2 + 50), 950 - height / 2)
    colour = rng.choice(TEXT_COLOURS)
    cell = 3 * row + 1
    return Thing("text", colour, _shade(rng, colour), cell, (x, y), "", font_size, rng.uniform(-4, 4), text)


def random_text(rng: random.Random) -> str:
    """Choose a random word of names.WORDS, or a text of 2 to 5 digits."""
    if rng.random() < 0.55:
        return rng.choice(WORDS)
    return "".join(rng.choice("0123456789") for _ in range(rng.randint(2, 5)))


def _shade(rng: random.Random, colour: str) -> Colour:
    red, green, blue = (min(255, max(0, value + rng.randint(-12, 12))) for value in RGB[colour])
    return red, green, blue


def _inside(thing: Thing) -> bool:
    left, top, right, bottom = thing.bounds
    return min(left, top) >= _MARGIN / 2 and max(right, bottom) <= 1000 - _MARGIN / 2


def _near(a: Thing, b: Thing) -> bool:
    return (
        a.bounds[0] < b.bounds[2] + _MARGIN
        and b.bounds[0] < a.bounds[2] + _MARGIN
        and a.bounds[1] < b.bounds[3] + _MARGIN
        and b.bounds[1] < a.bounds[3] + _MARGIN
    )
