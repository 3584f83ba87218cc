"""Fake upstream checkouts: Git repositories with the files that the shipped patches change, reduced to their hunks."""

from __future__ import annotations

import os
import re
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

from paddlemix_qwenvl_plugin.upstream import patches, pins

_HUNK = re.compile(r"^@@ -(\d+)(?:,\d+)? \+\d+(?:,\d+)? @@", re.MULTILINE)


def git(folder: Path, *arguments: str, stdin: str = "") -> str:
    """Run git in a folder and return its output."""
    identity = ("-c", "user.name=test", "-c", "user.email=test@example.com", "-c", "commit.gpgsign=false")
    # Without GIT_CEILING_DIRECTORIES, git would use a repository above the folder.
    environment = {**os.environ, "GIT_CEILING_DIRECTORIES": str(folder.parent)}
    completed = subprocess.run(
        ["git", *identity, *arguments],
        cwd=folder,
        env=environment,
        input=stdin,
        text=True,
        capture_output=True,
        check=True,
    )
    return completed.stdout


def unpatched_files(patch_text: str) -> dict[str, str]:
    """Map the path of each file of a patch to a content to which it applies: its hunks, with filler lines between."""
    files = {}
    for file_diff in re.split(r"^diff --git ", patch_text, flags=re.MULTILINE)[1:]:
        path = file_diff.split()[0][len("a/") :]
        lines: list[str] = []
        # Alternately the number of a hunk's first line, and the hunk.
        starts_and_hunks = _HUNK.split(file_diff)[1:]
        for start, hunk in zip(starts_and_hunks[::2], starts_and_hunks[1::2]):
            lines += [f"# filler {i}" for i in range(len(lines) + 1, int(start))]
            lines += [line[1:] for line in hunk.splitlines()[1:] if line[:1] in (" ", "-")]
        files[path] = "\n".join([*lines, "# the last line", ""])
    return files


@dataclass
class FakeCheckout:
    """Fake checkout of an upstream.

    Attributes:
        root: its folder.
        patches: folder of the shipped patches, changed to the checkout's commit and blob ids.
        pinned: the upstream's pin, with the checkout's commit.
        touched: paths of the files that the patches change; each shipped patch changes one file.
    """

    root: Path
    patches: Path
    pinned: pins.Upstream
    touched: list[str] = field(default_factory=list)

    def snapshot(self) -> dict[str, tuple[bytes, int]]:
        """Map the path of every file outside .git to its content and mode."""
        return {
            str(path.relative_to(self.root)): (path.read_bytes(), path.stat().st_mode)
            for path in sorted(self.root.rglob("*"))
            if path.is_file() and ".git" not in path.relative_to(self.root).parts
        }

    def status(self) -> str:
        return git(self.root, "status", "--porcelain")

    def edit(self, file: str) -> None:
        """Append a line to a file, as a user's change."""
        with (self.root / file).open("a", encoding="utf-8") as stream:
            stream.write("# mine\n")


def make(folder: Path, upstream: pins.Upstream) -> FakeCheckout:
    """Create a fake checkout of an upstream in folder/tree, with its patches in folder/patches."""
    root, patches_folder = folder / "tree", folder / "patches"
    root.mkdir(parents=True)
    texts = {patch.path.name: patch.path.read_text(encoding="utf-8") for patch in patches.shipped(upstream)}
    files = dict.fromkeys(upstream.markers, "# a marker\n")
    files["README.md"] = "a file that no patch changes\n"
    touched = []
    for text in texts.values():
        touched += list(unpatched_files(text))
        files.update(unpatched_files(text))
    for path, content in files.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(content, encoding="utf-8")
    git(root, "init", "-q")
    git(root, "add", ".")
    git(root, "commit", "-q", "-m", "made up")
    pinned = upstream.model_copy(update={"commit": git(root, "rev-parse", "HEAD").strip()})
    target = patches_folder / upstream.name / pinned.commit
    target.mkdir(parents=True)
    for name, text in texts.items():
        for path in unpatched_files(text):
            # The first of the two ids identifies the unpatched file in a tree without .git.
            blob = git(root, "rev-parse", f"HEAD:{path}").strip()
            start = re.escape(f"diff --git a/{path} b/{path}\nindex ")
            text = re.sub(f"({start})[0-9a-f]+", rf"\g<1>{blob}", text)
        (target / name).write_text(text, encoding="utf-8")
    return FakeCheckout(root, patches_folder, pinned, touched)
