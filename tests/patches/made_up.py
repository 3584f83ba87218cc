"""Small git trees with only the lines that the shipped patches change, in files of the same paths."""

from __future__ import annotations

import os
import re
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

from paddlemix_qwenvl_plugin.upstream import patches, pins

_HUNK = re.compile(r"^@@ -(\d+)(?:,\d+)? \+\d+(?:,\d+)? @@", re.MULTILINE)


def git(folder: Path, *arguments: str, stdin: str = "") -> str:
    who = ("-c", "user.name=test", "-c", "user.email=test@example.com", "-c", "commit.gpgsign=false")
    environment = {**os.environ, "GIT_CEILING_DIRECTORIES": str(folder.parent)}
    done = subprocess.run(
        ["git", *who, *arguments],
        cwd=folder,
        env=environment,
        input=stdin,
        text=True,
        capture_output=True,
        check=True,
    )
    return done.stdout


def before(patch_text: str) -> dict[str, str]:
    """Path -> file with the lines that a patch expects at their positions, below filler lines."""
    files = {}
    for part in re.split(r"^diff --git ", patch_text, flags=re.MULTILINE)[1:]:
        path = part.split()[0][len("a/") :]
        lines: list[str] = []
        hunks = _HUNK.split(part)[1:]
        for start, hunk in zip(hunks[::2], hunks[1::2]):
            lines += [f"# filler {i}" for i in range(len(lines) + 1, int(start))]
            lines += [line[1:] for line in hunk.splitlines()[1:] if line[:1] in (" ", "-")]
        files[path] = "\n".join([*lines, "# the last line", ""])
    return files


@dataclass
class MadeUp:
    """A fake checkout of one upstream, and the shipped patches with its commit and blob ids."""

    root: Path
    patches: Path
    pinned: pins.Upstream
    touched: list[str] = field(default_factory=list)

    def snapshot(self) -> dict[str, tuple[bytes, int]]:
        """Path -> content and mode of every file outside .git."""
        return {
            str(path.relative_to(self.root)): (path.read_bytes(), path.stat().st_mode)
            for path in sorted(self.root.rglob("*"))
            if path.is_file() and ".git" not in path.relative_to(self.root).parts
        }

    def status(self) -> str:
        return git(self.root, "status", "--porcelain")

    def edit(self, file: str, text: str = "# mine\n") -> None:
        with (self.root / file).open("a", encoding="utf-8") as stream:
            stream.write(text)


def make(folder: Path, upstream: pins.Upstream) -> MadeUp:
    root, where = folder / "tree", folder / "patches"
    root.mkdir(parents=True)
    texts = {patch.path.name: patch.path.read_text(encoding="utf-8") for patch in patches.shipped(upstream)}
    files = dict.fromkeys(upstream.markers, "# a marker\n")
    files["README.md"] = "a file no patch touches\n"
    touched = []
    for text in texts.values():
        touched += list(before(text))
        files.update(before(text))
    for path, content in files.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(content, encoding="utf-8")
    git(root, "init", "-q")
    git(root, "add", ".")
    git(root, "commit", "-q", "-m", "made up")
    pinned = upstream.model_copy(update={"commit": git(root, "rev-parse", "HEAD").strip()})
    target = where / upstream.name / pinned.commit
    target.mkdir(parents=True)
    for name, text in texts.items():
        for path in before(text):
            blob = git(root, "rev-parse", f"HEAD:{path}").strip()
            start = re.escape(f"diff --git a/{path} b/{path}\nindex ")
            text = re.sub(f"({start})[0-9a-f]+", rf"\g<1>{blob}", text)
        (target / name).write_text(text, encoding="utf-8")
    return MadeUp(root, where, pinned, touched)
