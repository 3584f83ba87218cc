"""Parts of a Markdown file: fenced blocks, headings, sections, links."""

from __future__ import annotations

import re
from pathlib import Path

REPO = Path(__file__).resolve().parents[2]

_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(text: str, language: str | None = None) -> list[str]:
    """Contents of the fenced blocks, of one language or of all."""
    return [content for found, content in _FENCE.findall(text) if language in (None, found)]


def prose(text: str) -> str:
    """The text without its fenced blocks."""
    return _FENCE.sub("", text)


def headings(text: str) -> list[tuple[int, str]]:
    """(level, title) of every heading."""
    found = re.findall(r"^(#+) (.+)$", prose(text), re.MULTILINE)
    return [(len(marks), title) for marks, title in found]


def section(text: str, title: str) -> str:
    """Text under a second-level heading."""
    _, _, rest = text.partition(f"\n## {title}\n")
    assert rest, title
    return re.split(r"^## ", rest, flags=re.MULTILINE)[0]


def links(text: str) -> list[str]:
    """Targets of links and images."""
    return re.findall(r"\]\(([^)\s]+)\)", prose(text))


def anchor(title: str) -> str:
    """Fragment of a heading: lower case, without punctuation, spaces as hyphens."""
    return re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")
