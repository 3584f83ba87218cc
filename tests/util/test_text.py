"""Control characters are escaped."""

from __future__ import annotations

import json

import pytest

from paddlemix_qwenvl_plugin.util.text import json_line, without_controls


def test_controls_are_escaped() -> None:
    assert without_controls("a\x1b[31m\x07\x00\x7f\x9b\n\tä红") == "a\\x1b[31m\\x07\\x00\\x7f\\x9b\n\tä红"


@pytest.mark.parametrize("ensure_ascii", [False, True])
def test_json_is_the_same_without_a_control(ensure_ascii: bool) -> None:
    values = {"text": "".join(map(chr, range(0x100))) + "红"}
    line = json_line(values, ensure_ascii)
    assert json.loads(line) == values
    assert not any(c < " " or "\x7f" <= c <= "\x9f" for c in line)
    assert line.isascii() == ensure_ascii
    assert ("红" in line) != ensure_ascii
