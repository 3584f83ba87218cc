"""Environment variables of the plugin: documentation and parsing."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from paddlemix_qwenvl_plugin.serve.settings import ServeSettings
from paddlemix_qwenvl_plugin.util import env
from paddlemix_qwenvl_plugin.util.errors import UsageError

KINDS = (env.Switch, env.Choice, env.Folder, env.Text)
VARIABLES = [value for value in vars(env).values() if isinstance(value, KINDS)]
REPO = Path(__file__).resolve().parents[2]


def test_table_of_the_documentation() -> None:
    """docs/environment.md has a row (name, values, default, meaning) for each variable, in the order of env.py."""
    text = (REPO / "docs" / "environment.md").read_text("utf-8")
    rows = [
        [cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line[:3] == "| `"
    ]
    assert [row[0] for row in rows] == [f"`{variable.name}`" for variable in VARIABLES]
    for variable, (_, values, default, _) in zip(VARIABLES, rows):
        if isinstance(variable, env.Switch):
            assert (values, default) == ("`0` or `1`", f"`{int(variable.default)}`")
        elif isinstance(variable, env.Choice):
            assert (values, default) == (
                ", ".join(f"`{word}`" for word in variable.words),
                f"`{variable.words[0]}`",
            )
        elif isinstance(variable, env.Folder):
            assert values == "a folder"


def test_every_variable_in_code_and_documents_is_declared() -> None:
    names = {
        name
        for folder in ("paddlemix_qwenvl_plugin", "activation", "patches", "docs")
        for path in (REPO / folder).rglob("*")
        if path.suffix in (".py", ".md", ".patch")
        for name in re.findall(r"QWENVL_[A-Z_]*[A-Z]", path.read_text("utf-8"))
    }
    of_tests = {"QWENVL_PADDLEMIX_DIR", "QWENVL_PADDLENLP_DIR", "QWENVL_TEST_ENVS"}
    of_tests |= {f"QWENVL_{prefix}FUZZ_{name}" for prefix in ("", "TEST_") for name in ("SECONDS", "SEED")}
    of_tests |= {f"QWENVL_TEST_SOAK_{name}" for name in ("CLIENTS", "REQUESTS", "SECONDS")}
    of_tests |= {"QWENVL_TEST_CLUSTER_KILLS", "QWENVL_TEST_KILLS", "QWENVL_TEST_UPDATE_ERRORS"}
    of_benchmarks = {"QWENVL_LIBRARY"}
    mistyped = {"QWENVL_SERVE_MAX_WAITNG"}  # in docs/errors.md
    of_serve = {"QWENVL_SERVE", *(f"QWENVL_SERVE_{name.upper()}" for name in ServeSettings.model_fields)}
    assert names - of_tests - of_benchmarks - of_serve - mistyped == {variable.name for variable in VARIABLES}


# expected None: the default.
@pytest.mark.parametrize(
    ("text", "expected"), [(None, None), ("", None), ("0", False), ("1", True), ("yes", True)]
)
def test_switches(monkeypatch: pytest.MonkeyPatch, text: str | None, expected: bool | None) -> None:
    for switch, default in ((env.DEBUG, False), (env.PLUGIN, True)):
        monkeypatch.delenv(switch.name, raising=False)
        if text is not None:
            monkeypatch.setenv(switch.name, text)
        assert switch.read() is (default if expected is None else expected)


def test_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("QWENVL_ENGINE", raising=False)
    assert env.ENGINE.read() == "auto"
    for text, expected in (("", "auto"), ("portable", "portable"), ("fused", "fused")):
        monkeypatch.setenv("QWENVL_ENGINE", text)
        assert env.ENGINE.read() == expected
    monkeypatch.setenv("QWENVL_ENGINE", "slow")
    with pytest.raises(UsageError, match=r"^QWENVL_ENGINE slow: must be one of auto, fused, portable$"):
        env.ENGINE.read()
    with pytest.raises(UsageError, match=r"^--engine slow: must be one of auto, fused, portable$"):
        env.ENGINE.check("slow", "--engine")


def test_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QWENVL_CACHE_DIR", "")
    assert env.CACHE_DIR.read() is None
    monkeypatch.setenv("QWENVL_CACHE_DIR", "some/where")
    assert env.CACHE_DIR.read() == Path("some/where")
