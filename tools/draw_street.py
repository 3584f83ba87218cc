"""Draw the bundled image, recipes/images/street.png: a street with a house, a car, a tree, a dog and a sign.

Run: python tools/draw_street.py recipes/images/street.png
"""

from __future__ import annotations

import random
import sys
from pathlib import Path

from PIL import Image, ImageDraw, ImageFilter, ImageFont

WIDTH, HEIGHT = 960, 640


def main(target: Path) -> None:
    random.seed(7)
    image = Image.new("RGB", (WIDTH, HEIGHT))
    draw = ImageDraw.Draw(image)
    _sky(draw)
    _road(draw)
    _house(draw)
    _tree(draw)
    _car(draw)
    _dog(draw)
    _sign(draw)
    image.filter(ImageFilter.GaussianBlur(0.6)).save(target, optimize=True)


def _sky(draw: ImageDraw.ImageDraw) -> None:
    for y in range(HEIGHT):
        shade = y / HEIGHT
        draw.line([(0, y), (WIDTH, y)], fill=(int(120 + 100 * shade), int(175 + 60 * shade), 245))
    # Clouds and the sun.
    for x, y, size in ((150, 90, 60), (220, 70, 45), (640, 110, 70), (730, 95, 50)):
        draw.ellipse([x - size, y - size // 2, x + size, y + size // 2], fill=(250, 250, 252))
    draw.ellipse([830, 40, 910, 120], fill=(255, 214, 70))


def _road(draw: ImageDraw.ImageDraw) -> None:
    draw.rectangle([0, 430, WIDTH, 490], fill=(176, 172, 165))  # pavement
    draw.rectangle([0, 490, WIDTH, HEIGHT], fill=(82, 84, 90))
    for x in range(20, WIDTH, 140):  # lane markings
        draw.rectangle([x, 560, x + 80, 572], fill=(240, 236, 210))


def _house(draw: ImageDraw.ImageDraw) -> None:
    draw.rectangle([90, 220, 380, 432], fill=(196, 92, 70))
    for y in range(230, 432, 16):
        draw.line([(90, y), (380, y)], fill=(176, 78, 58))
    draw.polygon([(70, 222), (235, 110), (400, 222)], fill=(92, 56, 50))
    draw.rectangle([205, 330, 265, 432], fill=(70, 46, 34))
    draw.ellipse([250, 378, 258, 386], fill=(230, 200, 90))
    for x in (120, 300):
        draw.rectangle([x, 260, x + 56, 316], fill=(250, 238, 190), outline=(60, 40, 34), width=4)
        draw.line([(x + 28, 260), (x + 28, 316)], fill=(60, 40, 34), width=3)


def _tree(draw: ImageDraw.ImageDraw) -> None:
    draw.rectangle([478, 320, 506, 436], fill=(104, 72, 44))
    for _ in range(60):
        x, y, size = random.gauss(492, 45), random.gauss(265, 36), random.randint(16, 34)
        green = random.randint(105, 160)
        draw.ellipse([x - size, y - size, x + size, y + size], fill=(52, green, 62))


def _car(draw: ImageDraw.ImageDraw) -> None:
    draw.rounded_rectangle([560, 470, 850, 560], 24, fill=(38, 92, 186))
    draw.polygon([(620, 474), (660, 420), (770, 420), (812, 474)], fill=(38, 92, 186))
    draw.polygon([(636, 472), (668, 430), (708, 430), (708, 472)], fill=(196, 226, 242))
    draw.polygon([(718, 472), (718, 430), (764, 430), (794, 472)], fill=(196, 226, 242))
    for x in (630, 780):
        draw.ellipse([x - 36, 524, x + 36, 596], fill=(24, 24, 28))
        draw.ellipse([x - 16, 544, x + 16, 576], fill=(188, 190, 196))
    draw.ellipse([832, 492, 852, 516], fill=(255, 240, 170))


def _dog(draw: ImageDraw.ImageDraw) -> None:
    fur = (150, 106, 62)
    draw.ellipse([300, 470, 400, 520], fill=fur)
    draw.ellipse([382, 446, 430, 492], fill=fur)
    draw.polygon([(388, 452), (396, 428), (408, 450)], fill=(110, 74, 40))
    draw.ellipse([412, 460, 419, 467], fill=(20, 16, 14))
    draw.ellipse([424, 468, 434, 477], fill=(20, 16, 14))
    for x in (312, 330, 368, 386):
        draw.rectangle([x, 508, x + 10, 548], fill=fur)
    draw.line([(304, 488), (276, 462)], fill=fur, width=9)


def _sign(draw: ImageDraw.ImageDraw) -> None:
    draw.rectangle([884, 300, 894, 440], fill=(120, 122, 128))
    draw.rounded_rectangle([836, 236, 942, 306], 8, fill=(214, 40, 44), outline=(255, 255, 255), width=4)
    font = ImageFont.load_default(34)
    draw.text((889, 271), "STOP", font=font, anchor="mm", fill=(255, 255, 255))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
