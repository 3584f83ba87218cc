"""Parts of a Markdown file: fenced blocks, headings, sections, links."""

from __future__ import annotations

import re
from pathlib import Path

REPO = Path(__file__).resolve().parents[2]

_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(text: str, language: str | None = None) -> list[str]:
    """Contents of the fenced blocks: all, or those of one language."""
    return [content for block_language, content in _FENCE.findall(text) if language in (None, block_language)]


def prose(text: str) -> str:
    """The text without its fenced blocks."""
    return _FENCE.sub("", text)


def headings(text: str) -> list[tuple[int, str]]:
    """(level, title) of every heading."""
    return [(len(hashes), title) for hashes, title in re.findall(r"^(#+) (.+)$", prose(text), re.MULTILINE)]


def section(text: str, title: str) -> str:
    """Text under a second-level heading."""
    _, _, following = text.partition(f"\n## {title}\n")
    assert following, title
    return re.split(r"^## ", following, flags=re.MULTILINE)[0]


def links(text: str) -> list[str]:
    """Targets of links and images."""
    return re.findall(r"\]\(([^)\s]+)\)", prose(text))


def anchor(title: str) -> str:
    """Fragment of a heading: lower case, without punctuation, spaces as hyphens."""
    return re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")
