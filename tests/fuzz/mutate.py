"""Seeded random mutation of bytes and of parsed JSON."""

from __future__ import annotations

import json
import struct
from collections.abc import Sequence
from random import Random
from typing import Any

# Texts that replace a random value of the JSON: extreme numbers, odd strings and paths, deep nesting.
FRAGMENTS = (
    *("null", "true", "false", "0", "-1", "1", "2", "3", "7", "128", "255", "65536", "1048576", "1048577"),
    *("2147483647", "2147483648", "4294967296", "9007199254740993", "9223372036854775807", "1" + "0" * 30),
    *("1" + "0" * 5000, "-0", "0.5", "1.0", "1e-320", "1e308", "1e999", "-1e999", "NaN", "Infinity"),
    *('""', '"a"', '"1"', '"\\u0000"', '"\\ud800"', '"\\u001b[31m"', '"../x"', '"/dev/zero"', '"C:\\\\x"'),
    *(
        f'"{"A" * 5000}"',
        "[]",
        "{}",
        "[1, 2]",
        '{"a": 1}',
        "[" * 300 + "]" * 300,
        "[" * 20000,
        '{"a":' * 3000,
    ),
)

# Stands for a fragment until the JSON is serialized: a fragment need not be valid JSON.
_PLACEHOLDER = "replaced by a fragment"


def corrupted(data: bytes, random: Random, words: Sequence[bytes], is_json: bool) -> bytes:
    """Apply 1, 2, 3 or 8 random mutations to `data`.

    Args:
        words: tokens of the format, inserted as they are because random bytes would hardly ever form them.
        is_json: whether to mutate the parsed JSON, three times out of four, instead of the bytes.
    """
    for _ in range(random.choice((1, 1, 1, 2, 3, 8))):
        if is_json and random.random() < 0.75:
            data = _corrupted_json(data, random)
        else:
            data = random.choice(_MUTATIONS)(data, random, words)
    return data


def _corrupted_json(data: bytes, random: Random) -> bytes:
    try:
        # The document is the value of a dictionary, so that it can be replaced or deleted like any other value.
        root = {"": json.loads(data)}
    except (ValueError, RecursionError):
        return data
    places = list(_places(root))
    # The document itself, places[0], is mutated only if it contains no other values.
    container, key = random.choice(places[1:] or places)
    mutation = random.randrange(6)
    if mutation == 0:  # delete
        del container[key]
    elif mutation == 1 and isinstance(container, dict) and container is not root:  # rename the key
        container[random.choice(("", "a", "visual", "__metadata__", "\0"))] = container.pop(key)
    elif mutation == 2:  # replace by a copy of another value
        source, source_key = random.choice(places)
        container[key] = json.loads(json.dumps(source[source_key]))
    elif mutation == 3 and isinstance(container[key], int):  # change the number
        container[key] = container[key] * random.choice((-1, 2, 64)) + random.choice((-1, 0, 1))
    else:  # replace by a fragment, also if the selected mutation does not apply
        container[key] = _PLACEHOLDER
    if "" not in root:  # the document was deleted
        return b""
    text = json.dumps(root[""])
    return text.replace(json.dumps(_PLACEHOLDER), random.choice(FRAGMENTS)).encode()


def _places(value: Any) -> Any:
    """Yield (container, key or index) of every value in parsed JSON, outer values first."""
    if isinstance(value, dict):
        keys: Sequence[Any] = list(value)
    elif isinstance(value, list):
        keys = range(len(value))
    else:
        return
    for key in keys:
        yield value, key
        yield from _places(value[key])


def _flip_bits(data: bytes, random: Random, words: Sequence[bytes]) -> bytes:
    result = bytearray(data or b"\0")
    for _ in range(random.choice((1, 1, 4, 30))):
        result[random.randrange(len(result))] ^= 1 << random.randrange(8)
    return bytes(result)


def _overwrite_with_number(data: bytes, random: Random, words: Sequence[bytes]) -> bytes:
    value = random.choice((0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF))
    layout = random.choice(("<H", ">H", "<I", ">I", "<Q"))
    number = struct.pack(layout, value & 0xFFFF if layout.endswith("H") else value)
    position = random.randrange(max(1, len(data)))
    return data[:position] + number + data[position + len(number) :]


def _cut(data: bytes, random: Random, words: Sequence[bytes]) -> bytes:
    start, end = sorted((random.randrange(len(data) + 1), random.randrange(len(data) + 1)))
    return random.choice((data[:start], data[:start] + data[end:], data[start:]))


def _repeat_range(data: bytes, random: Random, words: Sequence[bytes]) -> bytes:
    start, end = sorted((random.randrange(len(data) + 1), random.randrange(len(data) + 1)))
    end = min(end, start + 300)
    return data[:end] + data[start:end] * random.choice((1, 1, 2, 100)) + data[end:]


def _swap_ranges(data: bytes, random: Random, words: Sequence[bytes]) -> bytes:
    """Swap two adjacent ranges of random length."""
    start, middle, end = sorted(random.randrange(len(data) + 1) for _ in range(3))
    return data[:start] + data[middle:end] + data[start:middle] + data[end:]


def _insert_word(data: bytes, random: Random, words: Sequence[bytes]) -> bytes:
    word = random.choice(words or (b"\0", b"\xff"))
    position = random.randrange(len(data) + 1)
    if random.random() < 0.5:  # the word replaces the line from this position on
        end = data.find(b"\n", position)
        return data[:position] + word + (data[end:] if end >= 0 else b"")
    return data[:position] + word + data[position:]


def _insert_noise(data: bytes, random: Random, words: Sequence[bytes]) -> bytes:
    position = random.randrange(len(data) + 1)
    return data[:position] + random.randbytes(random.choice((1, 2, 20))) + data[position:]


# A mutation that is listed twice is selected twice as often.
_MUTATIONS = (
    *(_flip_bits, _flip_bits, _overwrite_with_number, _cut, _repeat_range, _swap_ranges),
    *(_insert_word, _insert_word, _insert_noise),
)
