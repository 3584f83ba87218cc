"""Proportions with Wilson intervals."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Rate:
    """Proportion: `hits` of `n` trials."""

    hits: int
    n: int

    @property
    def value(self) -> float:
        """The proportion, 0 to 1; NaN without trials."""
        return self.hits / self.n if self.n else math.nan

    def interval(self, z: float = 1.96) -> tuple[float, float]:
        """Wilson score interval: 95 % for z = 1.96, the normal quantile; (0, 1) without trials."""
        if not self.n:
            return 0.0, 1.0
        square = z * z / self.n
        centre = self.value + square / 2
        spread = z * math.sqrt((self.value * (1 - self.value) + square / 4) / self.n)
        return max(0.0, (centre - spread) / (1 + square)), min(1.0, (centre + spread) / (1 + square))

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready values; `value` is None without trials."""
        return {
            "hits": self.hits,
            "n": self.n,
            "value": self.value if self.n else None,
            "interval": list(self.interval()),
        }


def table(rates: Mapping[str, Rate], goals: Mapping[str, float] | None = None) -> str:
    """Format rates as lines: name, percentage, 95 % interval, hits of trials and, if set, the goal."""
    lines = []
    for name, rate in rates.items():
        low, high = rate.interval()
        line = f"{name:32} {100 * rate.value:6.2f} %  [{100 * low:.1f}, {100 * high:.1f}]  {rate.hits} of {rate.n}"
        goal = (goals or {}).get(name)
        if goal is not None and rate.n:
            line += f"  (goal {100 * goal:g} %: {'reached' if rate.value >= goal else 'missed'})"
        lines.append(line)
    return "\n".join(lines)
