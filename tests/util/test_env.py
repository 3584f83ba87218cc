"""Environment variables: the table, its documentation, and parsing."""

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


def test_the_page_has_the_table() -> None:
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
                ", ".join(f"`{w}`" for w in variable.words),
                f"`{variable.words[0]}`",
            )
        elif isinstance(variable, env.Folder):
            assert values == "a folder"


def test_every_variable_that_is_spelled_out_is_in_the_table() -> None:
    spelled = {
        name
        for folder in ("paddlemix_qwenvl_plugin", "activation", "patches", "docs")
        for path in (REPO / folder).rglob("*")
        if path.suffix in (".py", ".md", ".patch")
        for name in re.findall(r"QWENVL_[A-Z_]*[A-Z]", path.read_text("utf-8"))
    }
    of_tests = {"QWENVL_PADDLEMIX_DIR", "QWENVL_PADDLENLP_DIR", "QWENVL_TEST_ENVS"}
    of_tests |= {f"QWENVL_{of}FUZZ_{name}" for of in ("", "TEST_") for name in ("SECONDS", "SEED")}
    of_tests |= {f"QWENVL_TEST_SOAK_{name}" for name in ("CLIENTS", "REQUESTS", "SECONDS")}
    of_tests |= {"QWENVL_TEST_CLUSTER_KILLS", "QWENVL_TEST_KILLS", "QWENVL_TEST_UPDATE_ERRORS"}
    of_benchmarks = {"QWENVL_LIBRARY"}
    mistyped = {"QWENVL_SERVE_MAX_WAITNG"}  # in docs/errors.md
    of_serve = {"QWENVL_SERVE", *(f"QWENVL_SERVE_{name.upper()}" for name in ServeSettings.model_fields)}
    assert spelled - of_tests - of_benchmarks - of_serve - mistyped == {
        variable.name for variable in VARIABLES
    }


@pytest.mark.parametrize(("text", "on"), [(None, None), ("", None), ("0", False), ("1", True), ("yes", True)])
def test_switches(monkeypatch: pytest.MonkeyPatch, text: str | None, on: bool | None) -> None:
    for switch, default in ((env.DEBUG, False), (env.PLUGIN, True)):
        monkeypatch.delenv(switch.name, raising=False)
        if text is not None:
            monkeypatch.setenv(switch.name, text)
        assert switch.read() is (default if on is None else on)


def test_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("QWENVL_ENGINE", raising=False)
    assert env.ENGINE.read() == "auto"
    for text, word in (("", "auto"), ("portable", "portable"), ("fused", "fused")):
        monkeypatch.setenv("QWENVL_ENGINE", text)
        assert env.ENGINE.read() == word
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
