"""MkDocs hooks of the documentation site: pages and links for files outside docs/, and generated text.

- `index.md` and `index.zh.md` are README.md and README_zh.md.
- A link from a page to a file outside docs/ leads to a page `source/PATH`, which shows the file: Markdown as such,
  other files as a block of code. A link to a missing file is not changed, so `mkdocs build --strict` fails. The
  navigation may also name a page `source/PATH`, if PATH is a Markdown file.
- A heading of a Chinese page also has the anchor of the English heading at the same position. Pages without a
  translation are English on the Chinese site, and their links have English anchors.
- `<!-- header: PATH -->` is replaced by a C header, with a heading for each of its sections, and `<!-- commands -->` by
  the descriptions of all commands.
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

_PATHS = dict(INDEX)  # added page -> path in the repository of the file that it shows

_LANGUAGES = {".h": "c", ".c": "c", ".cc": "cpp", ".cu": "cpp", ".py": "python", ".sh": "sh", ".yaml": "yaml"}
_FENCE = re.compile(r"^( *```+)[^`\n]*\n.*?^\1 *$", re.MULTILINE | re.DOTALL)  # a fenced block of code
_LINK = re.compile(r"(?<=\]\()[^)\s]+")  # the target of a Markdown link
_HEADING = re.compile(r"^#+ +(.+?) *$", re.MULTILINE)
# The line of a README that links to the README in the other language.
_OTHER_LANGUAGE = re.compile(r"^\[[^\]]+\]\(README(?:_zh)?\.md\)\n+", re.MULTILINE)
_HEADER = re.compile(r"^<!-- header: (\S+) -->$", re.MULTILINE)
_COMMANDS = "<!-- commands -->"
_SECTION = re.compile(r"^/\* -+ (.+?) -+ \*/$", re.MULTILINE)  # the comment before a section of a C header


@event_priority(100)  # before the plugin that assigns pages to languages
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
    """Return the text of an added page; for other pages None, so that MkDocs reads them."""
    name = page.file.src_uri
    return _text(_repository_path(name)) if name in _PATHS else None


@event_priority(100)
def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """Resolve the links of a page, and insert anchors, C headers and commands."""
    name = page.file.src_uri

    def resolve_links(text: str) -> str:
        return _LINK.sub(lambda match: _resolved(match.group(), name), text)

    markdown = _outside_fences(markdown, resolve_links)
    if name.endswith(".zh.md"):
        english = _text(_repository_path(name.replace(".zh.md", ".md")))
        markdown = _with_english_anchors(markdown, english)
    if _COMMANDS in markdown:
        from tools.docs_site.commands import reference

        markdown = markdown.replace(_COMMANDS, reference())
    return _HEADER.sub(lambda match: _header(REPO / match.group(1)), markdown)


def _repository_path(name: str) -> str:
    """Return the path in the repository of the file that a page shows."""
    return _PATHS.get(name) or f"docs/{name}"


def _page_of(path: str) -> str:
    """Return the name of the page that shows a file of the repository."""
    # Without dots, since the plugin for translations would interpret `.cc` or `.py` as a language.
    return f"{SOURCE}{path.removesuffix('.md').replace('.', '_')}.md"


def _text(path: str) -> str:
    """Return the Markdown of a page that shows a file of the repository."""
    file = REPO / path
    if file.suffix == ".md":
        return _OTHER_LANGUAGE.sub("", file.read_text("utf-8"))
    code = file.read_text("utf-8").rstrip()
    language = _LANGUAGES.get(file.suffix, "text")
    return f"---\nsearch:\n  exclude: true\n---\n\n# {path}\n\n````{language}\n{code}\n````\n"


def _sources_in(nav: Any) -> Iterator[str]:
    """Yield the files of the repository that the navigation names as `source/PATH`."""
    if isinstance(nav, str):
        path = nav.removeprefix(SOURCE)
        if nav.startswith(SOURCE) and (REPO / path).is_file():
            yield path
    elif isinstance(nav, (dict, list)):
        for item in nav.values() if isinstance(nav, dict) else nav:
            yield from _sources_in(item)


def _target(link: str, name: str) -> tuple[str, str] | None:
    """Return (path in the repository, fragment) of a link on the page `name`; None if it leads to no file there."""
    path, _, fragment = link.partition("#")
    if not path or re.match(r"[a-z]+:", path):  # a link within the page, or a URL
        return None
    path = posixpath.normpath(posixpath.join(posixpath.dirname(_repository_path(name)), path))
    if (REPO / path).is_dir() and (REPO / path / "README.md").exists():
        path += "/README.md"
    return (path, fragment) if (REPO / path).is_file() else None


def _outside_docs(name: str) -> Iterator[str]:
    """Yield the files outside docs/ to which a page links, except README.md and README_zh.md, the index pages."""
    text = _FENCE.sub("", _text(_repository_path(name)))
    for link in _LINK.findall(text):
        target = _target(link, name)
        if target and not target[0].startswith("docs/") and target[0] not in INDEX.values():
            yield target[0]


def _resolved(link: str, name: str) -> str:
    """Return a link of the page `name` as a relative link between pages of the site."""
    target = _target(link, name)
    if target is None:
        return link
    path, fragment = target
    if path in INDEX.values():
        page = "index.md"
    elif path.startswith("docs/"):
        # Without the language, which is that of the page that contains the link.
        page = path[len("docs/") :].replace(".zh.md", ".md")
    else:
        page = _page_of(path)
    relative = posixpath.relpath(page, posixpath.dirname(name) or ".")
    return f"{relative}#{fragment}" if fragment else relative


def _outside_fences(text: str, change: Callable[[str], str]) -> str:
    """Return the text with `change` applied to all parts except the fenced blocks of code."""
    parts, end = [], 0
    for fence in _FENCE.finditer(text):
        parts += [change(text[end : fence.start()]), fence.group()]
        end = fence.end()
    return "".join([*parts, change(text[end:])])


def _with_english_anchors(chinese: str, english: str) -> str:
    """Add to each heading of a Chinese page the anchor of the English heading at the same position."""
    slug = slugify(case="lower")
    anchors = iter([slug(title, "-") for title in _HEADING.findall(_FENCE.sub("", english))])

    def with_anchor(match: re.Match[str]) -> str:
        return f'{match.group().rstrip()} <a id="{next(anchors, "")}"></a>'

    return _outside_fences(chinese, lambda text: _HEADING.sub(with_anchor, text))


def _header(path: Path) -> str:
    """Return the Markdown of a C header: a heading for each section, and "Conventions" for the text before them."""
    parts = _SECTION.split(path.read_text("utf-8"))
    sections = zip(["conventions", *parts[1::2]], parts[::2])
    return "\n\n".join(f"## {title.capitalize()}\n\n```c\n{code.strip()}\n```" for title, code in sections)
