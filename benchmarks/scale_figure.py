"""Line charts as SVG, on a white background."""

from __future__ import annotations

import math
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT, LEFT, BOTTOM, TOP, RIGHT = 720, 320, 64, 44, 12, 200
COLOURS = (
    "#0072b2",
    "#d55e00",
    "#009e73",
    "#cc79a7",
    "#888888",
)  # Okabe and Ito's palette for colour-blind readers, and grey


@dataclass
class Line:
    name: str
    points: list[tuple[float, float]]


def ticks(largest: float) -> list[float]:
    """Return round tick values from 0 to the largest value, at least five."""
    step = 10 ** math.floor(math.log10(largest or 1))
    step = next(step * part for part in (1.0, 0.5, 0.2, 0.1) if largest / (step * part) >= 4)
    return [number * step for number in range(int(largest / step) + 1)]


def figure(lines: list[Line], x_label: str, y_label: str) -> str:
    """Draw lines as the text of an SVG file."""
    x_most = max(x for line in lines for x, _ in line.points)
    y_most = max(1.0, *(y for line in lines for _, y in line.points))
    wide, high = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM

    def at(x: float, y: float) -> str:
        return f"{LEFT + wide * x / x_most:.1f},{TOP + high * (1 - y / y_most):.1f}"

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" '
        f'font-size="12" role="img" aria-label="{escape(y_label)} by {escape(x_label)}">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#ffffff"/>',
    ]
    for x in ticks(x_most):
        here = at(x, 0).split(",")
        parts.append(f'<text x="{here[0]}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{x:g}</text>')
    for y in ticks(y_most):
        height = at(0, y).split(",")[1]
        parts.append(f'<path d="M{at(0, y)}L{at(x_most, y)}" stroke="#dddddd"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{height}" text-anchor="end" dy="4">{y:g}</text>')
    for number, line in enumerate(lines):
        colour = COLOURS[number % len(COLOURS)]
        path = " ".join(at(x, y) for x, y in line.points)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        height = TOP + 16 + 20 * number
        parts.append(f'<path d="M{WIDTH - RIGHT + 16} {height - 4}h20" stroke="{colour}" stroke-width="2"/>')
        parts.append(f'<text x="{WIDTH - RIGHT + 42}" y="{height}">{escape(line.name)}</text>')
    parts.append(
        f'<text x="{LEFT + wide / 2}" y="{HEIGHT - 8}" text-anchor="middle">{escape(x_label)}</text>'
    )
    parts.append(
        f'<text transform="translate(14 {TOP + high / 2}) rotate(-90)" text-anchor="middle">{escape(y_label)}</text>'
    )
    return "\n".join([*parts, "</svg>", ""])
