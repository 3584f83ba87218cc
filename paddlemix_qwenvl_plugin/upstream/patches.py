"""Apply and revert the shipped patches in a checkout of a pinned upstream, with `git apply`.

Patches of one commit touch different files, so they are independent of each other and of their order.
"""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Optional

from paddlemix_qwenvl_plugin.upstream import pins
from paddlemix_qwenvl_plugin.upstream.pins import Upstream
from paddlemix_qwenvl_plugin.util.errors import QwenVLError, UsageError
from paddlemix_qwenvl_plugin.util.shipped import PACKAGE, shipped_folder

# File headers of a patch; shipped patches have complete ids (--full-index).
_FILE = re.compile(r"^diff --git a/(\S+) b/\1\nindex ([0-9a-f]{40})\.\.[0-9a-f]{40} \d+$", re.MULTILINE)
# Variables that would make git use another repository than the tree's; removed from its environment.
_GIT_VARIABLES = (
    "GIT_DIR",
    "GIT_WORK_TREE",
    "GIT_INDEX_FILE",
    "GIT_OBJECT_DIRECTORY",
    "GIT_COMMON_DIR",
    "GIT_PREFIX",
)


class State(Enum):
    """State of a patch in a tree."""

    APPLIED = "already applied"
    APPLICABLE = "applies"
    CONFLICT = "does not apply"


@dataclass(frozen=True)
class Patch:
    """Shipped patch file.

    Attributes:
        path: the patch file.
        description: first line of the patch file.
        files: path of each file that the patch changes, relative to the tree -> git blob id of that file at the
            pinned commit.
    """

    path: Path
    description: str
    files: dict[str, str]

    @property
    def name(self) -> str:
        """File name without its suffix, NNNN-what."""
        return self.path.stem


@dataclass(frozen=True)
class Tree:
    """Checkout or unpacked archive of an upstream. `commit`: None if the folder has no .git."""

    root: Path
    upstream: Upstream
    commit: Optional[str]


@dataclass(frozen=True)
class Report:
    """A tree and the state of each of its patches, in order.

    `refusal`: why the tree must not be changed; None if it may be.
    """

    tree: Tree
    states: tuple[tuple[Patch, State], ...]
    refusal: Optional[str]

    def with_state(self, state: State) -> list[Patch]:
        """Patches in this state."""
        return [patch for patch, found in self.states if found is state]


def shipped_dir(package: Path = PACKAGE) -> Path:
    """Folder of the shipped patches, in an installed wheel or in a source tree."""
    return shipped_folder("patches", "upstream/patches_data", package)


def shipped(upstream: Upstream) -> list[Patch]:
    """Patches for an upstream's pinned commit, in the order of their names.

    Raises:
        QwenVLError: a patch file lacks the format of `git diff --full-index`, or two patches touch the same file.
    """
    folder = shipped_dir() / upstream.name / upstream.commit
    patches = [_read(path) for path in sorted(folder.glob("*.patch"))]
    touched = [file for patch in patches for file in patch.files]
    for file in touched:
        if touched.count(file) > 1:
            raise QwenVLError(f"{folder}: two patches touch {file}; merge them into one")
    return patches


def _read(path: Path) -> Patch:
    text = path.read_text(encoding="utf-8")
    files = dict(_FILE.findall(text))
    if len(files) != len(re.findall(r"^diff ", text, re.MULTILINE)) or not files:
        raise QwenVLError(f"{path}: not a patch in the format of git diff --full-index")
    return Patch(path, text.partition("\n")[0], files)


def open_tree(folder: Path) -> Tree:
    """Identify the upstream in a folder by its marker files, and its commit.

    Raises:
        UsageError: the folder does not exist, or is not the top folder of a supported upstream.
        QwenVLError: git is missing or cannot read the repository.
    """
    if not folder.is_dir():
        raise UsageError(f"{folder}: no such folder")
    root = folder.resolve()
    for upstream in pins.load().upstreams:
        if all((root / marker).is_file() for marker in upstream.markers):
            break
    else:
        titles = " or ".join(upstream.title for upstream in pins.load().upstreams)
        raise UsageError(f"{folder}: not the top folder of {titles}")
    commit = _git(root, "rev-parse", "--verify", "HEAD").strip() if (root / ".git").exists() else None
    return Tree(root, upstream, commit)


def check(folder: Path, force: bool = False) -> Report:
    """Determine the state of each patch, without changes to the tree.

    Args:
        folder: top folder of a checkout, or of an unpacked archive.
        force: accept another commit than the pinned one. In a tree without .git, also accept other changes of the
            patched files, which cannot be told from another version there.

    Raises:
        UsageError, QwenVLError: see `open_tree` and `shipped`.
    """
    tree = open_tree(folder)
    states = tuple((patch, _state(tree, patch)) for patch in shipped(tree.upstream))
    return Report(tree, states, _refusal(tree, states, force))


def apply(folder: Path, force: bool = False) -> Report:
    """Apply the patches that are not applied yet, all or none. Returns the report before the change.

    Raises:
        QwenVLError: the tree is at another commit (unless `force`), a file of a patch has other changes (unless `force`
            in a tree without .git), a patch does not apply, or git fails; or see `check`.
        UsageError: see `check`.
    """
    report = check(folder, force)
    conflicts = ", ".join(patch.name for patch in report.with_state(State.CONFLICT))
    if conflicts and not report.refusal:
        raise QwenVLError(f"{folder}: nothing applied; these patches do not apply: {conflicts}")
    return _change(report, State.APPLICABLE)


def revert(folder: Path, force: bool = False) -> Report:
    """Revert the applied patches, all or none. Returns the report before the change.

    Raises:
        QwenVLError, UsageError: see `apply`; a patch that does not apply is not an error here.
    """
    return _change(check(folder, force), State.APPLIED, "--reverse")


def _change(report: Report, state: State, *arguments: str) -> Report:
    if report.refusal:
        raise QwenVLError(report.refusal)
    _apply(report.tree.root, report.with_state(state), *arguments)
    return report


def _refusal(tree: Tree, states: Sequence[tuple[Patch, State]], force: bool) -> Optional[str]:
    pinned = tree.upstream
    if tree.commit not in (None, pinned.commit) and not force:
        return (
            f"{tree.root}: at commit {str(tree.commit)[:7]}, the patches are for {pinned.title} {pinned.commit[:7]}; "
            "check that out, or use --force"
        )
    changed = [
        file
        for patch, state in states
        for file in patch.files
        if _has_other_changes(tree, patch, state, file)
    ]
    if not changed:
        return None
    if tree.commit is not None:
        return f"{tree.root}: {', '.join(changed)} changed since the commit; commit that, stash it or undo it"
    if force:
        return None  # without .git, a file of another version and a changed file look the same
    return (
        f"{tree.root}: {', '.join(changed)} differ from {pinned.title} {pinned.commit[:7]}, and without .git "
        "the commit is unknown; use --force to patch anyway"
    )


def _has_other_changes(tree: Tree, patch: Patch, state: State, file: str) -> bool:
    """Whether a file differs from the tree's commit, apart from the changes of the patch if it is applied.

    In a tree without .git: from the pinned commit.
    """
    if tree.commit is None:
        expected = patch.files[file]
    else:
        # Empty if the commit does not contain the file.
        tree_entry = _git(tree.root, "ls-tree", "HEAD", "--", file).split()
        expected = tree_entry[2] if tree_entry else ""
    path = tree.root / file
    if not path.is_file():
        return bool(expected)
    if state is not State.APPLIED:
        return _blob_id(tree.root, file, path) != expected
    with tempfile.TemporaryDirectory() as name:
        copies = Path(name).resolve()
        for patched in patch.files:
            (copies / patched).parent.mkdir(parents=True, exist_ok=True)
            (copies / patched).write_bytes((tree.root / patched).read_bytes())
        _apply(copies, [patch], "--reverse")
        return _blob_id(tree.root, file, copies / file) != expected


def _blob_id(root: Path, file: str, content: Path) -> str:
    # --path: apply the tree's settings for line ends.
    return _git(root, "hash-object", f"--path={file}", "--stdin", stdin=content.read_bytes()).strip()


def _state(tree: Tree, patch: Patch) -> State:
    # Check the reverse patch first: git might also accept an applied patch a second time, a few lines further down.
    for arguments, state in ((["--reverse"], State.APPLIED), ([], State.APPLICABLE)):
        if _run(tree.root, "apply", "--check", *arguments, stdin=patch.path.read_bytes()).returncode == 0:
            return state
    return State.CONFLICT


def _apply(root: Path, patches: Sequence[Patch], *arguments: str) -> None:
    if not patches:
        return
    original_contents = {root / file: (root / file).read_bytes() for patch in patches for file in patch.files}
    try:
        # One call: git writes nothing unless its complete input applies.
        _git(root, "apply", *arguments, stdin=b"".join(patch.path.read_bytes() for patch in patches))
    except BaseException:
        # Full disk or read-only folder: restore the files written so far.
        for path, content in original_contents.items():
            if not path.exists() or path.read_bytes() != content:
                path.write_bytes(content)
        raise


def _git(root: Path, *arguments: str, stdin: bytes = b"") -> str:
    done = _run(root, *arguments, stdin=stdin)
    if done.returncode != 0:
        lines = done.stderr.decode(errors="replace").strip().splitlines() or ["failed"]
        raise QwenVLError(f"{root}: git {arguments[0]}: {lines[0]}")
    return done.stdout.decode(errors="replace")


def _run(root: Path, *arguments: str, stdin: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    # The user's whitespace settings must not change the result.
    settings = ("-c", "apply.whitespace=nowarn", "-c", "apply.ignoreWhitespace=no")
    environment = {key: value for key, value in os.environ.items() if key not in _GIT_VARIABLES}
    # If the tree has no .git, git must not find one in a parent: `git apply` would skip the tree's files.
    environment["GIT_CEILING_DIRECTORIES"] = str(root.parent)
    try:
        return subprocess.run(
            ["git", *settings, *arguments], cwd=root, env=environment, input=stdin, capture_output=True
        )
    except FileNotFoundError as error:
        raise QwenVLError("git: not found on PATH; install it") from error
