"""What a terminal would obey is shown instead."""

from __future__ import annotations

import json

from paddlemix_qwenvl_plugin.util.text import json_line, without_controls


def test_controls_are_escaped() -> None:
    assert without_controls("a\x1b[31m\x07\x00\x7f\x9b\n\tä红") == "a\\x1b[31m\\x07\\x00\\x7f\\x9b\n\tä红"


def test_json_is_the_same_without_a_control() -> None:
    values = {"text": "".join(map(chr, range(0x100))) + "红"}
    line = json_line(values)
    assert json.loads(line) == values
    assert line.isprintable() is False  # \xa0 and \xad stay
    assert not any(c < " " or "\x7f" <= c <= "\x9f" for c in line)
    assert "红" in line
