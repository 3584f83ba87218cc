"""How to pick tokens and when to stop."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Optional

from paddlemix_qwenvl_plugin.util.errors import UsageError


@dataclass(frozen=True)
class GenerationOptions:
    """Options of a generation; they hold for every row of a batch.

    Greedy unless `temperature`, `top_p` or `top_k` is given. The order is upstream's: end tokens are held back before
    `min_new_tokens`, penalties, temperature, then the top-k and top-p cuts. Penalties count generated tokens only.

    Raises:
        UsageError: a value out of its range; the line names the option.
    """

    max_new_tokens: int = 512
    min_new_tokens: int = 0
    temperature: Optional[float] = None
    top_p: Optional[float] = None
    top_k: Optional[int] = None
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    seed: Optional[int] = None
    """Every row draws from its own generator with this seed, so that a row of a batch gives the tokens that it
    gives alone. None: fresh randomness."""

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            whole = field.name in ("max_new_tokens", "min_new_tokens", "top_k", "seed")
            if value is not None and (
                isinstance(value, bool) or not isinstance(value, int if whole else (int, float))
            ):
                raise UsageError(f"{field.name}: {value!r} is not a{' whole' if whole else ''} number")
        _check(self.max_new_tokens >= 1, "max_new_tokens", self.max_new_tokens, "at least 1")
        _check(self.min_new_tokens >= 0, "min_new_tokens", self.min_new_tokens, "at least 0")
        _check(
            self.min_new_tokens <= self.max_new_tokens,
            "min_new_tokens",
            self.min_new_tokens,
            f"at most max_new_tokens ({self.max_new_tokens})",
        )
        _check(
            self.temperature is None or 0 <= self.temperature <= 100,
            "temperature",
            self.temperature,
            "0 to 100",
        )
        _check(self.top_p is None or 0 <= self.top_p <= 1, "top_p", self.top_p, "0 to 1")
        _check(self.top_k is None or self.top_k >= 1, "top_k", self.top_k, "at least 1")
        _check(
            0 < self.repetition_penalty <= 100,
            "repetition_penalty",
            self.repetition_penalty,
            "over 0, up to 100",
        )
        _check(abs(self.frequency_penalty) <= 100, "frequency_penalty", self.frequency_penalty, "-100 to 100")
        _check(abs(self.presence_penalty) <= 100, "presence_penalty", self.presence_penalty, "-100 to 100")
        _check(self.seed is None or self.seed >= 0, "seed", self.seed, "at least 0")

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> GenerationOptions:
        """From keyword arguments; an unknown name is a UsageError."""
        known = {field.name for field in fields(cls)}
        for name in values:
            if name not in known:
                raise UsageError(f"{name}: unknown option; known are {', '.join(sorted(known))}")
        return cls(**values)

    def within(self, room: int) -> GenerationOptions:
        """These options with at most `room` new tokens."""
        if self.max_new_tokens <= room:
            return self
        return replace(self, max_new_tokens=room, min_new_tokens=min(self.min_new_tokens, room))

    @property
    def greedy(self) -> bool:
        asked = (self.temperature, self.top_p, self.top_k)
        return asked == (None, None, None) or self.temperature == 0 or self.top_p == 0 or self.top_k == 1


def _check(condition: bool, name: str, value: object, allowed: str) -> None:
    if not condition:
        raise UsageError(f"{name}: {value} is out of range; it must be {allowed}")
