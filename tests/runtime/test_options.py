"""Generation options: accepted values, and the error messages for all other values."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import FrozenInstanceError, asdict, replace
from typing import Any

import pytest

from paddlemix_qwenvl_plugin import GenerationOptions, UsageError

# Option -> (whether a value is accepted, the range in the error message).
RANGES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "max_new_tokens": (lambda n: n >= 1, "at least 1"),
    "min_new_tokens": (lambda n: n >= 0, "at least 0"),
    "temperature": (lambda x: 0 <= x <= 100, "0 to 100"),
    "top_p": (lambda x: 0 <= x <= 1, "0 to 1"),
    "top_k": (lambda n: n >= 1, "at least 1"),
    "repetition_penalty": (lambda x: 0.01 <= x <= 100, "0.01 to 100"),
    "frequency_penalty": (lambda x: -100 <= x <= 100, "-100 to 100"),
    "presence_penalty": (lambda x: -100 <= x <= 100, "-100 to 100"),
    "seed": (lambda n: n >= 0, "at least 0"),
}
INTEGER_OPTIONS = ("max_new_tokens", "min_new_tokens", "top_k", "seed")
OPTIONAL = ("temperature", "top_p", "top_k", "seed")  # may be None
# Values on both sides of the bounds.
INTEGERS = [-101, -100, -1, 0, 1, 2, 100, 101, 10**20]
REALS = [-100.5, -1e-9, 1e-9, 0.01, 0.5, 1.5, 100.5, math.nan, math.inf, -math.inf]


@pytest.mark.parametrize("name", RANGES)
def test_ranges(name: str) -> None:
    accepts, range_text = RANGES[name]
    for value in INTEGERS if name in INTEGER_OPTIONS else [*INTEGERS, *REALS]:
        # min_new_tokens must not exceed max_new_tokens.
        others = {"max_new_tokens": 10**21} if name == "min_new_tokens" else {}
        if accepts(value):
            assert getattr(GenerationOptions(**{name: value}, **others), name) == value
            continue
        message = f"{name}: {value} is out of range; it must be {range_text}"
        for make in (lambda values: GenerationOptions(**values), GenerationOptions.of):
            with pytest.raises(UsageError, match=f"^{re.escape(message)}$"):
                make({name: value, **others})


@pytest.mark.parametrize("name", RANGES)
def test_types(name: str) -> None:
    kind = "a whole number" if name in INTEGER_OPTIONS else "a number"
    values: list[Any] = ["1", True, [1], {}]
    if name in INTEGER_OPTIONS:
        values.append(1.0)
    if name not in OPTIONAL:
        values.append(None)
    for value in values:
        with pytest.raises(UsageError, match=f"^{re.escape(f'{name}: {value!r} is not {kind}')}$"):
            GenerationOptions.of({name: value})


def test_min_new_tokens_above_max_new_tokens() -> None:
    message = r"^min_new_tokens: 3 is out of range; it must be at most max_new_tokens \(2\)$"
    with pytest.raises(UsageError, match=message):
        GenerationOptions(max_new_tokens=2, min_new_tokens=3)


def test_unknown_options_are_refused_first() -> None:
    message = r"^top_q: unknown option; known are frequency_penalty, max_new_tokens, .*, top_p$"
    with pytest.raises(UsageError, match=message):
        GenerationOptions.of({"top_p": 7, "top_q": 1})


def test_options_are_frozen_and_hashable() -> None:
    options = GenerationOptions(top_p=0.5, seed=1)
    assert options == GenerationOptions.of(asdict(options))
    assert len({options, replace(options), replace(options, seed=2)}) == 2
    with pytest.raises(FrozenInstanceError):
        options.seed = 3  # type: ignore[misc]
    with pytest.raises(UsageError, match="seed: -1"):
        replace(options, seed=-1)


def test_limits_within_the_context_after_a_prompt() -> None:
    options = GenerationOptions(max_new_tokens=9, min_new_tokens=4, seed=1)
    for room in range(1, 12):
        limited = options.within(room)
        assert limited == replace(options, max_new_tokens=min(9, room), min_new_tokens=min(4, room))
