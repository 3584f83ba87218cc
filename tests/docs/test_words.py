"""No file under version control has a word that docs/glossary.md discourages.

The test reads the files with a suffix in SUFFIXES that are not EXEMPT, and skips the text that matches ALLOWED.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from doc_helpers import REPO

GLOSSARY = REPO / "docs" / "glossary.md"
SUFFIXES = {
    ".py",
    ".md",
    ".h",
    ".cc",
    ".cu",
    ".cuh",
    ".js",
    ".html",
    ".css",
    ".toml",
    ".yaml",
    ".yml",
    ".sh",
    ".txt",
}
# Beginnings of the paths of files that are not checked. Apart from the first four, they contain text that cannot
# change: upstream's prompts and outputs, fuzzer inputs, or text that the demo model and the tiny vocabulary are trained
# on.
EXEMPT = (
    "CHANGELOG.md",  # it names what earlier versions had
    "docs/glossary.md",
    "docs/glossary.zh.md",
    "tests/docs/test_words.py",
    "tests/golden/",
    "tests/fuzz/found/",
    "paddlemix_qwenvl_plugin/demo/world/",
    "paddlemix_qwenvl_plugin/demo/questions.py",
    "paddlemix_qwenvl_plugin/tiny/vocab.py",
    "tests/demo/world/",
    "tools/train_demo/",
)
# Literal text: the picture label `Picture 1: ` of the official prompts and names that refer to it, prompts of the demo
# model, contractions ("somebody'll", "somebody's") in the rules of VQA accuracy, a method of the library click.
ALLOWED = re.compile(
    r"picture[-_ ]?label|Picture ?(?:\d|\{|N\b|%)|['\"]Picture: ['\"]|usage_pieces"
    r"|(?:in|of|describe|which) (?:the |this )?picture|somebody'(?:ll|s)",
    re.IGNORECASE,
)


def discouraged_words() -> list[str]:
    """The words in the last column of the glossary's table."""
    lines = GLOSSARY.read_text("utf-8").splitlines()
    rows = [line.split("|")[1:-1] for line in lines if line.startswith("|")]
    without_header = rows[2:]
    return [word.strip() for row in without_header for word in row[2].split(",") if word.strip()]


def tracked_files() -> list[Path]:
    """The project's files under version control whose text is checked."""
    listing = subprocess.run(["git", "ls-files", "-z"], cwd=REPO, capture_output=True, text=True)
    if listing.returncode:
        pytest.skip("not a git checkout: the tracked files are not known")
    names = [name for name in listing.stdout.split("\0") if Path(name).suffix in SUFFIXES]
    return [REPO / name for name in names if not name.startswith(EXEMPT)]


def occurrences(text: str, words: list[str]) -> Iterator[tuple[int, str]]:
    """Yield (line number, match) of the words and their plurals, also within names: `n_pictures`, `firstPicture`."""
    # A word between characters that are no letters or digits; or, after a lower-case letter, Picture or Piece.
    pattern = re.compile(
        r"(?<![^\W_])(?:" + "|".join(words) + r")s?(?![^\W_])|(?-i:(?<=[a-z])(?:Picture|Piece)s?)",
        re.IGNORECASE,
    )
    for number, line in enumerate(text.splitlines(), 1):
        for match in pattern.finditer(ALLOWED.sub("", line)):
            yield number, match.group()


def test_no_discouraged_words() -> None:
    words = discouraged_words()
    assert len(words) > 10
    places = [
        f"{path.relative_to(REPO)}:{number}: {word}"
        for path in tracked_files()
        if path.exists()
        for number, word in occurrences(path.read_text("utf-8"), words)
    ]
    assert not places, f"{len(places)} discouraged words, see docs/glossary.md:\n" + "\n".join(places[:200])


@pytest.mark.parametrize(
    ("text", "n_expected"),
    [
        ("A picture, a PHOTO and pictures", 3),
        ("n_pictures = picture_turn", 2),
        ('label = "Picture 1: ", --picture_label', 0),
        ("encrypted spoilage of masterpieces", 0),
        ("it is mended", 1),
    ],
)
def test_occurrences(text: str, n_expected: int) -> None:
    assert len(list(occurrences(text, discouraged_words()))) == n_expected
