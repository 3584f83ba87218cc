"""Seeded mutation of bytes and of parsed JSON."""

from __future__ import annotations

import json
import struct
from collections.abc import Sequence
from random import Random
from typing import Any

# JSON texts that replace a random value.
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

_MARK = "replaced by a fragment"


def corrupted(data: bytes, random: Random, words: Sequence[bytes], is_json: bool) -> bytes:
    """Apply one to eight random mutations to `data`.

    Args:
        words: dictionary of tokens of the format, which random bytes would not hit.
        is_json: mutate the parsed JSON instead of the bytes, most of the time.
    """
    for _ in range(random.choice((1, 1, 1, 2, 3, 8))):
        if is_json and random.random() < 0.75:
            data = _corrupted_json(data, random)
        else:
            data = random.choice(_MUTATIONS)(data, random, words)
    return data


def _corrupted_json(data: bytes, random: Random) -> bytes:
    try:
        whole = {"": json.loads(data)}
    except (ValueError, RecursionError):
        return data
    places = list(_places(whole))
    holder, key = random.choice(places[1:] or places)
    way = random.randrange(6)
    if way == 0:
        del holder[key]
    elif way == 1 and isinstance(holder, dict) and holder is not whole:
        holder[random.choice(("", "a", "visual", "__metadata__", "\0"))] = holder.pop(key)
    elif way == 2:
        source, its_key = random.choice(places)
        holder[key] = json.loads(json.dumps(source[its_key]))
    elif way == 3 and isinstance(holder[key], int):
        holder[key] = holder[key] * random.choice((-1, 2, 64)) + random.choice((-1, 0, 1))
    else:
        holder[key] = _MARK
    if "" not in whole:
        return b""
    text = json.dumps(whole[""])
    return text.replace(json.dumps(_MARK), random.choice(FRAGMENTS)).encode()


def _places(value: Any) -> Any:
    """Yield (container, key or index) of every value."""
    keys = list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    for key in keys:
        yield value, key
        yield from _places(value[key])


def _flip(data: bytes, random: Random, words: Sequence[bytes]) -> bytes:
    result = bytearray(data or b"\0")
    for _ in range(random.choice((1, 1, 4, 30))):
        result[random.randrange(len(result))] ^= 1 << random.randrange(8)
    return bytes(result)


def _number(data: bytes, random: Random, words: Sequence[bytes]) -> bytes:
    value = random.choice((0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF))
    form = random.choice(("<H", ">H", "<I", ">I", "<Q"))
    number = struct.pack(form, value & 0xFFFF if form.endswith("H") else value)
    at = random.randrange(max(1, len(data)))
    return data[:at] + number + data[at + len(number) :]


def _cut(data: bytes, random: Random, words: Sequence[bytes]) -> bytes:
    start, end = sorted((random.randrange(len(data) + 1), random.randrange(len(data) + 1)))
    return random.choice((data[:start], data[:start] + data[end:], data[start:]))


def _repeat(data: bytes, random: Random, words: Sequence[bytes]) -> bytes:
    start, end = sorted((random.randrange(len(data) + 1), random.randrange(len(data) + 1)))
    end = min(end, start + 300)
    return data[:end] + data[start:end] * random.choice((1, 1, 2, 100)) + data[end:]


def _move(data: bytes, random: Random, words: Sequence[bytes]) -> bytes:
    cuts = sorted(random.randrange(len(data) + 1) for _ in range(3))
    a, b, c = cuts
    return data[:a] + data[b:c] + data[a:b] + data[c:]


def _word(data: bytes, random: Random, words: Sequence[bytes]) -> bytes:
    word = random.choice(words or (b"\0", b"\xff"))
    at = random.randrange(len(data) + 1)
    if random.random() < 0.5:  # replace the rest of the line
        end = data.find(b"\n", at)
        return data[:at] + word + (data[end:] if end >= 0 else b"")
    return data[:at] + word + data[at:]


def _noise(data: bytes, random: Random, words: Sequence[bytes]) -> bytes:
    at = random.randrange(len(data) + 1)
    return data[:at] + random.randbytes(random.choice((1, 2, 20))) + data[at:]


_MUTATIONS = (_flip, _flip, _number, _cut, _repeat, _move, _word, _word, _noise)
