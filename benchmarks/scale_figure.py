"""Line charts as SVG, on a white background."""

from __future__ import annotations

import math
from dataclasses import dataclass
from html import escape

# Size of the chart, and its margins, in pixels; the right margin contains the legend.
WIDTH, HEIGHT = 720, 320
LEFT, BOTTOM, TOP, RIGHT = 64, 44, 12, 200
# Okabe and Ito's palette for colour-blind readers, and grey.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#888888")


@dataclass
class Line:
    name: str
    points: list[tuple[float, float]]


def ticks(largest: float) -> list[float]:
    """Return round tick values from 0 up to at most the largest value, which is positive: at least five ticks."""
    decade = 10 ** math.floor(math.log10(largest))
    step = next(decade * factor for factor in (1.0, 0.5, 0.2) if largest / (decade * factor) >= 4)
    return [number * step for number in range(int(largest / step) + 1)]


def figure(lines: list[Line], x_label: str, y_label: str) -> str:
    """Draw a line chart with axes from 0, ticks and a legend; return the text of an SVG file."""
    x_max = max(x for line in lines for x, _ in line.points)
    y_max = max(1.0, *(y for line in lines for _, y in line.points))  # all values may be 0
    plot_width, plot_height = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM

    def at(x: float, y: float) -> str:
        """Return the position of a point as SVG coordinates."""
        return f"{LEFT + plot_width * x / x_max:.1f},{TOP + plot_height * (1 - y / y_max):.1f}"

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" '
        f'font-size="12" role="img" aria-label="{escape(y_label)} by {escape(x_label)}">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#ffffff"/>',
    ]
    for x in ticks(x_max):
        svg_x, _ = at(x, 0).split(",")
        parts.append(f'<text x="{svg_x}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{x:g}</text>')
    for y in ticks(y_max):
        _, svg_y = at(0, y).split(",")
        parts.append(f'<path d="M{at(0, y)}L{at(x_max, y)}" stroke="#dddddd"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{svg_y}" text-anchor="end" dy="4">{y:g}</text>')
    for number, line in enumerate(lines):
        colour = COLOURS[number % len(COLOURS)]
        points = " ".join(at(x, y) for x, y in line.points)
        parts.append(f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="2"/>')
        legend_y = TOP + 16 + 20 * number
        parts.append(
            f'<path d="M{WIDTH - RIGHT + 16} {legend_y - 4}h20" stroke="{colour}" stroke-width="2"/>'
        )
        parts.append(f'<text x="{WIDTH - RIGHT + 42}" y="{legend_y}">{escape(line.name)}</text>')
    parts.append(
        f'<text x="{LEFT + plot_width / 2}" y="{HEIGHT - 8}" text-anchor="middle">{escape(x_label)}</text>'
    )
    parts.append(
        f'<text transform="translate(14 {TOP + plot_height / 2}) rotate(-90)" text-anchor="middle">'
        f"{escape(y_label)}</text>"
    )
    return "\n".join([*parts, "</svg>", ""])
