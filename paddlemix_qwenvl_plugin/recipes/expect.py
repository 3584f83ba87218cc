"""Evaluation of a recipe's expectations on the files of a run."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from paddlemix_qwenvl_plugin.recipes.schema import Approx, Expect

# Program of the process that searches: reads [expression, text] as JSON.
_SEARCH = "import json, re, sys; print('found' if re.search(*json.load(sys.stdin)) else 'not', end='')"
_SEARCH_SECONDS = 10.0


def evaluate(expect: Expect, file: Path) -> dict[str, Any]:
    """Evaluate one expectation on `file` (`expect.file` with its references filled in).

    Returns {"file", "key", "check", "wanted", "actual", "ok", "problem"}. `problem` says that the value cannot be read
    (then `actual` is None) or that the search for a regular expression timed out; otherwise it is None.
    """
    check = expect.check or "exists"
    wanted = True if check == "exists" else getattr(expect, check)
    result: dict[str, Any] = {
        "file": str(file),
        "key": expect.key,
        "check": check,
        "wanted": wanted.model_dump() if isinstance(wanted, Approx) else wanted,
        "actual": None,
        "ok": False,
        "problem": None,
    }
    if expect.key is None:
        return {**result, "actual": file.exists(), "ok": file.exists()}
    try:
        actual = _look_up(json.loads(file.read_text(encoding="utf-8")), expect.key)
    except FileNotFoundError:
        return {**result, "problem": "no such file"}
    except (OSError, ValueError, RecursionError) as error:
        return {**result, "problem": f"not readable as JSON: {error}"}
    except LookupError as error:
        return {**result, "problem": str(error.args[0])}
    try:
        return {**result, "actual": actual, "ok": _passes(check, wanted, actual)}
    except subprocess.TimeoutExpired as error:
        problem = f"the regular expression timed out after {error.timeout:g} s"
        return {**result, "actual": actual, "problem": problem}


def describe(result: dict[str, Any]) -> str:
    """Format the expectation of a result as one line, without the verdict."""
    key = f" {result['key']}" if result["key"] is not None else ""
    wanted = "" if result["check"] in ("exists", "not_empty") else f" {result['wanted']!r}"
    return f"{Path(result['file']).name}{key} {result['check']}{wanted}"


def _look_up(value: Any, key: str) -> Any:
    for part in key.split("."):
        if isinstance(value, dict) and part in value:
            value = value[part]
        elif isinstance(value, list) and part.isdigit() and int(part) < len(value):
            value = value[int(part)]
        else:
            raise LookupError(f"no key {part!r} on the way to {key!r}")
    return value


def _passes(check: str, wanted: Any, actual: Any) -> bool:
    is_number = isinstance(actual, (int, float)) and not isinstance(actual, bool)
    if check == "equals":
        return _equal(wanted, actual)
    if check == "approx":
        # False for NaN, infinity, and integers so large that the subtraction would raise OverflowError.
        is_finite = is_number and abs(actual) <= sys.float_info.max
        return is_finite and abs(actual - wanted.value) <= wanted.tolerance
    if check == "min":
        return is_number and actual >= wanted
    if check == "max":
        return is_number and actual <= wanted
    if check == "matches":
        return isinstance(actual, str) and _search(wanted, actual)
    if check == "contains":
        if isinstance(actual, str):
            return isinstance(wanted, str) and wanted in actual
        return isinstance(actual, (list, dict)) and any(_equal(wanted, item) for item in actual)
    return isinstance(actual, (str, list, dict)) and len(actual) > 0


def _equal(a: Any, b: Any) -> bool:
    """Whether two values of JSON are equal: True == 1 in Python, but not in JSON."""
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_equal(value, b[key]) for key, value in a.items())
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(_equal, a, b))
    return bool(a == b) and isinstance(a, bool) == isinstance(b, bool)


def _search(expression: str, text: str) -> bool:
    """Search for a regular expression, in a separate process with a timeout: some searches take exponential time."""
    done = subprocess.run(
        [sys.executable, "-I", "-c", _SEARCH],
        input=json.dumps([expression, text]).encode(),
        stdout=subprocess.PIPE,
        timeout=_SEARCH_SECONDS,
        check=True,
    )
    return done.stdout == b"found"
