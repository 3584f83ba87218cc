"""Scene rendering with Pillow."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageDraw

from paddlemix_qwenvl_plugin.demo.world.lettering import font, stroke
from paddlemix_qwenvl_plugin.demo.world.scene import Scene, Thing

SIDE = 256


def draw(scene: Scene, side: int = SIDE) -> Image.Image:
    """Render a scene as an RGB image of `side` x `side` pixels; reproducible with the same version of Pillow."""
    upper, lower = scene.background
    ramp = np.linspace(0.0, 1.0, side)[:, None]
    rows = np.asarray(upper) * (1 - ramp) + np.asarray(lower) * ramp
    image = Image.fromarray(np.repeat(rows.astype(np.uint8)[:, None, :], side, axis=1))
    drawing = ImageDraw.Draw(image)
    scale = side / 1000  # the scene's coordinates are in thousandths
    for thing in scene.things:
        if thing.text:
            _draw_text(image, thing, scale)
        else:
            drawing.polygon([(x * scale, y * scale) for x, y in thing.corners], fill=thing.rgb)
    return _with_noise(image, scene) if scene.noise else image


def _draw_text(image: Image.Image, thing: Thing, scale: float) -> None:
    pixels = max(1, round(thing.extent * scale))
    typeface, bold = font(pixels), stroke(pixels)
    left, top, right, bottom = typeface.getbbox(thing.text, stroke_width=bold)
    margin = 2  # pixels, for smooth edges after the rotation
    mask = Image.new("L", (right - left + 2 * margin, bottom - top + 2 * margin))
    ImageDraw.Draw(mask).text(
        (margin - left, margin - top), thing.text, font=typeface, fill=255, stroke_width=bold
    )
    # Pillow rotates counter-clockwise, Thing.corners clockwise (y points down).
    turned = mask.rotate(-thing.angle, Image.Resampling.BICUBIC, expand=True)
    x, y = (round(value * scale - extent / 2) for value, extent in zip(thing.centre, turned.size))
    image.paste(thing.rgb, (x, y), turned)


def _with_noise(image: Image.Image, scene: Scene) -> Image.Image:
    pixels = np.asarray(image).astype(np.int16)
    random = np.random.Generator(np.random.PCG64(scene.seed))
    pixels += random.integers(-scene.noise, scene.noise, pixels.shape, np.int8, endpoint=True)
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))
