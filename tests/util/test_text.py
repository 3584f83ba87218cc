"""Control characters are escaped: in text all but line feeds and tabs, in JSON all."""

from __future__ import annotations

import json

import pytest

from paddlemix_qwenvl_plugin.util.text import json_line, without_controls


def test_without_controls() -> None:
    assert without_controls("a\x1b[31m\x07\x00\x7f\x9b\n\tä红") == "a\\x1b[31m\\x07\\x00\\x7f\\x9b\n\tä红"


@pytest.mark.parametrize("ensure_ascii", [False, True])
def test_json_line_escapes_control_characters_and_keeps_values(ensure_ascii: bool) -> None:
    values = {"text": "".join(map(chr, range(0x100))) + "红"}
    line = json_line(values, ensure_ascii)
    assert json.loads(line) == values
    assert not any(character < " " or "\x7f" <= character <= "\x9f" for character in line)
    assert line.isascii() == ensure_ascii
    assert ("红" in line) != ensure_ascii
