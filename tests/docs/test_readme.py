"""README.md and README_zh.md have the same structure; CI runs two of their commands.

Links and named files exist in all Markdown files of the root and of docs/.
"""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
from doc_helpers import REPO, anchor, blocks, headings, links, prose

ENGLISH = (REPO / "README.md").read_text("utf-8")
CHINESE = (REPO / "README_zh.md").read_text("utf-8")
DOCUMENTS = [*sorted(REPO.glob("*.md")), *sorted((REPO / "docs").glob("*.md"))]

RUN_COMMAND = "python3 -m venv .venv && .venv/bin/pip install -e '.[cpu]' && .venv/bin/qwenvl demo"
TEST_COMMAND = ".venv/bin/pip install -e '.[cpu,dev]' && .venv/bin/pytest -n 2 --dist loadfile"


def test_same_code_blocks() -> None:
    assert blocks(ENGLISH) == blocks(CHINESE)
    assert len(blocks(ENGLISH)) >= 4


def test_same_headings() -> None:
    levels = [level for level, _ in headings(ENGLISH)]
    assert levels == [level for level, _ in headings(CHINESE)]
    assert len(levels) >= 8


def test_same_shape_section_by_section() -> None:
    """The same number of code blocks, images, list items and table rows under every heading."""

    def shape(text: str) -> list[list[int]]:
        sections = re.split(r"^#+ ", text, flags=re.MULTILINE)
        patterns = (r"^```\w+$", r"^!\[", r"^- ", r"^\|")
        return [
            [len(re.findall(pattern, content, re.MULTILINE)) for pattern in patterns] for content in sections
        ]

    assert shape(ENGLISH) == shape(CHINESE)


@pytest.mark.parametrize(("heading", "command"), [("Run it", RUN_COMMAND), ("Test it", TEST_COMMAND)])
def test_ci_runs_the_commands_of_the_readme(heading: str, command: str) -> None:
    """.ci/run reads these two commands from the README, with the shell function `command_under`."""
    script = (REPO / ".ci" / "run").read_text("utf-8")
    function = re.search(r"^command_under\(\) \{\n.*?^\}$", script, re.MULTILINE | re.DOTALL)
    assert function is not None
    assert f"$(command_under '{heading}')" in script
    result = subprocess.run(
        ["bash", "-c", f"{function.group()}\ncommand_under '{heading}'"],
        cwd=REPO,
        capture_output=True,
        text=True,
        check=True,
    )
    assert result.stdout == f"{command}\n"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_resolve(document: Path) -> None:
    for link in links(document.read_text("utf-8")):
        target, _, fragment = link.partition("#")
        if re.match(r"[a-z]+:", target):  # a URL
            continue
        path = document.parent / target if target else document
        assert path.exists(), link
        if fragment:
            assert fragment in [anchor(title) for _, title in headings(path.read_text("utf-8"))], link


@pytest.mark.parametrize(
    "document", [path for path in DOCUMENTS if path.name != "CHANGELOG.md"], ids=lambda path: path.name
)
def test_named_files_exist(document: Path) -> None:
    """Paths in backquotes that begin with tests, tools, docs, recipes or .ci exist, in the repository or the package.

    The changelog is not checked: it may name older files.
    """
    pattern = r"`((?:tests|tools|docs|recipes|\.ci)/[\w./-]+)`"
    for name in re.findall(pattern, prose(document.read_text("utf-8"))):
        if "NAME" not in name:  # a placeholder
            assert (REPO / name).exists() or (REPO / "paddlemix_qwenvl_plugin" / name).exists(), name
