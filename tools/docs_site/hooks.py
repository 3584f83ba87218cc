"""MkDocs hooks of the documentation site: pages and links beyond docs/.

- `index.md` and `index.zh.md` are README.md and README_zh.md.
- A link from a page to a file outside docs/ leads to `source/PATH`, a page made of that file: Markdown as it is,
  anything else as a block of code. A link to a missing file stays, and `mkdocs build --strict` fails on it. The
  navigation may name such a page of a Markdown file, too.
- A heading of a Chinese page also has the anchor of the English heading in the same place, so that English pages,
  which stand in for missing translations, may link to it.
- `<!-- header: PATH -->` is replaced by a C header, with a heading for each of its sections, and `<!-- commands -->` by
  the flags of all commands.
"""

from __future__ import annotations

import posixpath
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from mkdocs.plugins import event_priority
from mkdocs.structure.files import File, Files, InclusionLevel
from pymdownx.slugs import slugify

REPO = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPO))
INDEX = {"index.md": "README.md", "index.zh.md": "README_zh.md"}
SOURCE = "source/"

_PATHS = dict(INDEX)  # of each added page: the path in the repository

_LANGUAGES = {".h": "c", ".c": "c", ".cc": "cpp", ".cu": "cpp", ".py": "python", ".sh": "sh", ".yaml": "yaml"}
_FENCE = re.compile(r"^( *```+)[^`\n]*\n.*?^\1 *$", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"(?<=\]\()[^)\s]+")
_HEADING = re.compile(r"^#+ +(.+?) *$", re.MULTILINE)
_OTHER_LANGUAGE = re.compile(r"^\[[^\]]+\]\(README(?:_zh)?\.md\)\n+", re.MULTILINE)
_HEADER = re.compile(r"^<!-- header: (\S+) -->$", re.MULTILINE)
_COMMANDS = "<!-- commands -->"
_SECTION = re.compile(r"^/\* -+ (.+?) -+ \*/$", re.MULTILINE)


@event_priority(100)  # before the translations are told apart
def on_files(files: Files, config: Any) -> Files:
    """Add the pages that docs/ does not contain."""

    def add(name: str, inclusion: InclusionLevel = InclusionLevel.UNDEFINED) -> None:
        files.append(
            File(name, config.docs_dir, config.site_dir, config.use_directory_urls, inclusion=inclusion)
        )

    def add_source(path: str) -> None:
        name = _page_of(path)
        if name not in files.src_uris:
            _PATHS[name] = path
            add(name, InclusionLevel.NOT_IN_NAV)
            pending.append(name)

    for name in INDEX:
        add(name)
    pending = [file.src_uri for file in files if file.src_uri.endswith(".md")]
    for path in _sources_in(config.nav):
        add_source(path)
    while pending:
        for path in _outside_docs(pending.pop()):
            add_source(path)
    return files


def on_page_read_source(*, page: Any, **_: Any) -> str | None:
    """The text of the added pages; None leaves the others to MkDocs."""
    name = page.file.src_uri
    return _text(_origin(name)) if name in _PATHS else None


@event_priority(100)
def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """Resolve links against the repository, and fill in anchors and headers."""
    name = page.file.src_uri
    markdown = _outside_fences(markdown, lambda text: _LINK.sub(lambda m: _resolved(m.group(), name), text))
    if name.endswith(".zh.md"):
        markdown = _with_english_anchors(markdown, _text(_origin(name.replace(".zh.md", ".md"))))
    if _COMMANDS in markdown:
        from tools.docs_site.commands import reference

        markdown = markdown.replace(_COMMANDS, reference())
    return _HEADER.sub(lambda match: _header(REPO / match.group(1)), markdown)


def _origin(name: str) -> str:
    """The path in the repository of a page's text."""
    return _PATHS.get(name) or f"docs/{name}"


def _page_of(path: str) -> str:
    """The page that shows a file of the repository."""
    # Without the suffix, as `.cc` and `.py` would be taken for languages.
    return f"{SOURCE}{path.removesuffix('.md').replace('.', '_')}.md"


def _text(path: str) -> str:
    """A page's Markdown, made of a file of the repository."""
    file = REPO / path
    if file.suffix == ".md":
        return _OTHER_LANGUAGE.sub("", file.read_text("utf-8"))
    code = file.read_text("utf-8").rstrip()
    language = _LANGUAGES.get(file.suffix, "text")
    return f"---\nsearch:\n  exclude: true\n---\n\n# {path}\n\n````{language}\n{code}\n````\n"


def _sources_in(nav: Any) -> Iterator[str]:
    """The files of the repository that the navigation names as `source/PATH`."""
    if isinstance(nav, str) and nav.startswith(SOURCE) and (REPO / nav[len(SOURCE) :]).is_file():
        yield nav[len(SOURCE) :]
    for item in nav.values() if isinstance(nav, dict) else nav if isinstance(nav, list) else ():
        yield from _sources_in(item)


def _target(link: str, name: str) -> tuple[str, str] | None:
    """The file in the repository that a page's link leads to, and the fragment; None for a link elsewhere."""
    path, _, fragment = link.partition("#")
    if not path or re.match(r"[a-z]+:", path):
        return None
    path = posixpath.normpath(posixpath.join(posixpath.dirname(_origin(name)), path))
    if (REPO / path).is_dir() and (REPO / path / "README.md").exists():
        path += "/README.md"
    return (path, fragment) if (REPO / path).is_file() else None


def _outside_docs(name: str) -> Iterator[str]:
    text = _FENCE.sub("", _text(_origin(name)))
    for link in _LINK.findall(text):
        target = _target(link, name)
        if target and not target[0].startswith("docs/") and target[0] not in INDEX.values():
            yield target[0]


def _resolved(link: str, name: str) -> str:
    """A page's link, relative to the page on the site."""
    target = _target(link, name)
    if target is None:
        return link
    path, fragment = target
    if path in INDEX.values():
        page = "index.md"
    elif path.startswith("docs/"):
        page = path[len("docs/") :].replace(".zh.md", ".md")  # the build's language decides
    else:
        page = _page_of(path)
    relative = posixpath.relpath(page, posixpath.dirname(name) or ".")
    return f"{relative}#{fragment}" if fragment else relative


def _outside_fences(text: str, change: Callable[[str], str]) -> str:
    """The text, changed except in its fenced blocks."""
    parts, end = [], 0
    for fence in _FENCE.finditer(text):
        parts += [change(text[end : fence.start()]), fence.group()]
        end = fence.end()
    return "".join([*parts, change(text[end:])])


def _with_english_anchors(chinese: str, english: str) -> str:
    anchors = [slugify(case="lower")(title, "-") for title in _HEADING.findall(_FENCE.sub("", english))]
    remaining = iter(anchors)

    def anchored(match: re.Match[str]) -> str:
        return f'{match.group().rstrip()} <a id="{next(remaining, "")}"></a>'

    return _outside_fences(chinese, lambda text: _HEADING.sub(anchored, text))


def _header(path: Path) -> str:
    parts = _SECTION.split(path.read_text("utf-8"))
    sections = zip(["conventions", *parts[1::2]], parts[::2])
    return "\n\n".join(f"## {title.capitalize()}\n\n```c\n{code.strip()}\n```" for title, code in sections)
