"""Checks of a recipe's `expect`, with values that pass and similar values that fail."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from paddlemix_qwenvl_plugin.recipes.expect import describe, evaluate
from paddlemix_qwenvl_plugin.recipes.schema import Expect


def evaluated(tmp_path: Path, content: Any, **keys: Any) -> dict[str, Any]:
    """Evaluate an expectation with `keys` on answer.json; `content`: its data, or its text as a str."""
    file = tmp_path / "answer.json"
    file.write_text(content if isinstance(content, str) else json.dumps(content))
    return evaluate(Expect.model_validate({"file": "answer.json", **keys}), file)


@pytest.mark.parametrize(
    ("check", "expected", "passing", "failing"),
    [
        ("equals", 3, [3, 3.0], [4, "3", None]),
        ("equals", 1, [1], [True]),
        ("equals", None, [None], [0, ""]),
        (
            "equals",
            ["a", {"b": 1}],
            [["a", {"b": 1}], ["a", {"b": 1.0}]],
            [["a"], ["a", {"b": True}], ["a", {"c": 1}], "a"],
        ),
        (
            "equals",
            {"a": [True]},
            [{"a": [True]}],
            [{"a": [1]}, {"a": [True], "b": 1}, {"a": [True, True]}, ["a"]],
        ),
        ("approx", {"value": 2.0, "tolerance": 0.5}, [1.5, 2, 2.5], [1.49, 2.51, "2", None, True]),
        ("min", 3, [3, 3.5], [2.99, "9", None, True]),
        ("max", 3, [3, -1], [3.01, "1", None, False]),
        ("matches", "^(stop|length)$", ["stop", "length"], ["stopped", "", 1, None]),
        ("contains", "cat", ["a cat", ["cat", 1], {"cat": 0}], ["a dog", ["cats"], 1, None]),
        ("contains", 1, [[1]], ["1", [2], [True], [[1]]]),
        ("contains", [1], [[[1]]], [[1], [[True]], {"a": [1]}]),
        ("not_empty", True, ["x", [0], {"a": 1}], ["", [], {}, None, 5]),
    ],
)
def test_check(tmp_path: Path, check: str, expected: Any, passing: list[Any], failing: list[Any]) -> None:
    for value in passing:
        assert evaluated(tmp_path, {"v": value}, key="v", **{check: expected})["ok"] is True, value
    for value in failing:
        result = evaluated(tmp_path, {"v": value}, key="v", **{check: expected})
        assert result["ok"] is False, value
        assert result["actual"] == value
        assert result["problem"] is None


def test_nan_fails_every_check_of_a_number(tmp_path: Path) -> None:
    for check in ({"min": 0}, {"max": 0}, {"approx": {"value": 0, "tolerance": 1}}):
        assert evaluated(tmp_path, '{"v": NaN}', key="v", **check)["ok"] is False


def test_dotted_key_goes_through_mappings_and_lists(tmp_path: Path) -> None:
    content = {"boxes": [{"x": 1}, {"x": 7}]}
    assert evaluated(tmp_path, content, key="boxes.1.x", equals=7)["ok"] is True
    result = evaluated(tmp_path, content, key="boxes.2.x", equals=7)
    assert (result["ok"], result["problem"]) == (False, "no key '2' on the way to 'boxes.2.x'")


def test_existence_of_a_file(tmp_path: Path) -> None:
    expect = Expect.model_validate({"file": "x"})
    assert evaluate(expect, tmp_path / "x")["ok"] is False
    (tmp_path / "x").touch()
    assert evaluate(expect, tmp_path / "x")["ok"] is True


def test_missing_file_and_invalid_json(tmp_path: Path) -> None:
    result = evaluate(Expect.model_validate({"file": "x", "key": "a", "min": 1}), tmp_path / "x")
    assert (result["ok"], result["problem"]) == (False, "no such file")
    result = evaluated(tmp_path, "not json", key="a", min=1)
    assert result["ok"] is False
    assert result["problem"].startswith("not readable as JSON: ")


def test_description(tmp_path: Path) -> None:
    assert describe(evaluated(tmp_path, {"n": 1}, key="n", min=2.5)) == "answer.json n min 2.5"
    assert describe(evaluated(tmp_path, {"n": 1}, key="n", not_empty=True)) == "answer.json n not_empty"
    assert describe(evaluated(tmp_path, {})) == "answer.json exists"
