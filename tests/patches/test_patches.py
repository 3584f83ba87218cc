"""Apply and revert the patches on fake trees."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from made_up import MadeUp, git
from typer.testing import CliRunner, Result

from paddlemix_qwenvl_plugin.cli.patches import app
from paddlemix_qwenvl_plugin.upstream import patches, pins
from paddlemix_qwenvl_plugin.upstream.patches import State
from paddlemix_qwenvl_plugin.util.errors import QwenVLError, UsageError


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def refusal(result: Result) -> str:
    """Error line of a refusal with exit code 1."""
    assert isinstance(result.exception, QwenVLError), result.output
    assert result.exception.exit_code == 1
    return str(result.exception)


def states(tree: MadeUp, force: bool = False) -> set[State]:
    return {state for _, state in patches.check(tree.root, force).states}


def test_list_names_commit_and_patches(tree: MadeUp) -> None:
    lines = run("list", "--tree", tree.root).output.splitlines()
    assert lines[0] == f"{tree.pinned.title} {tree.pinned.commit}"
    names = sorted(path.stem for path in tree.patches.rglob("*.patch"))
    assert [line.split()[0] for line in lines[1:]] == names
    assert len(run("list").output.splitlines()) >= len(lines) + 1  # the other upstream as well


def test_check_changes_nothing(tree: MadeUp) -> None:
    before = tree.snapshot()
    result = run("check", "--tree", tree.root)
    assert result.exit_code == 0
    assert [line.split(": ")[1] for line in result.output.splitlines()] == ["applies"] * len(tree.touched)
    assert tree.snapshot() == before


def test_apply_gives_the_same_as_git_apply(tree: MadeUp, tmp_path: Path) -> None:
    by_git = tmp_path / "by git"
    shutil.copytree(tree.root, by_git)
    for path in sorted(tree.patches.rglob("*.patch")):
        git(by_git, "apply", "-", stdin=path.read_text(encoding="utf-8"))
    assert run("apply", "--tree", tree.root).exit_code == 0
    for file in tree.touched:
        assert (tree.root / file).read_bytes() == (by_git / file).read_bytes()
    assert sorted(line[3:] for line in tree.status().splitlines()) == sorted(tree.touched)


def test_apply_twice(tree: MadeUp) -> None:
    run("apply", "--tree", tree.root)
    once = tree.snapshot()
    again = run("apply", "--tree", tree.root)
    assert again.exit_code == 0
    assert all(line.endswith(": already applied") for line in again.output.splitlines())
    assert len(again.output.splitlines()) == len(tree.touched)
    assert tree.snapshot() == once


def test_revert_is_exact(tree: MadeUp) -> None:
    before = tree.snapshot()
    run("apply", "--tree", tree.root)
    assert tree.snapshot() != before
    assert run("revert", "--tree", tree.root).exit_code == 0
    assert tree.snapshot() == before
    assert tree.status() == ""
    nothing = run("revert", "--tree", tree.root)
    assert nothing.exit_code == 0
    assert all(line.endswith(": not applied") for line in nothing.output.splitlines())


def test_one_applied_by_hand(tree: MadeUp) -> None:
    first = min(tree.patches.rglob("*.patch"))
    git(tree.root, "apply", "-", stdin=first.read_text(encoding="utf-8"))
    assert states(tree) == {State.APPLIED, State.APPLICABLE}
    result = run("apply", "--tree", tree.root)
    assert [line.split(": ")[1] for line in result.output.splitlines()] == [
        "already applied",
        *["applied"] * (len(tree.touched) - 1),
    ]
    assert states(tree) == {State.APPLIED}


@pytest.mark.parametrize("staged", [False, True])
@pytest.mark.parametrize("command", ["check", "apply", "revert"])
def test_changes_of_others_in_a_touched_file(tree: MadeUp, command: str, staged: bool) -> None:
    tree.edit(tree.touched[0])
    if staged:
        git(tree.root, "add", ".")
    before = tree.snapshot()
    for force in ([], ["--force"]):
        assert tree.touched[0] in refusal(run(command, "--tree", tree.root, *force))
        assert tree.snapshot() == before


@pytest.mark.parametrize("command", ["apply", "revert"])
def test_changes_of_others_on_top_of_a_patch(tree: MadeUp, command: str) -> None:
    run("apply", "--tree", tree.root)
    tree.edit(tree.touched[-1])
    before = tree.snapshot()
    assert tree.touched[-1] in refusal(run(command, "--tree", tree.root))
    assert tree.snapshot() == before


def test_changes_elsewhere_are_kept(tree: MadeUp) -> None:
    tree.edit("README.md")
    (tree.root / "new.txt").write_text("mine\n", encoding="utf-8")
    before = tree.snapshot()
    assert run("apply", "--tree", tree.root).exit_code == 0
    assert run("revert", "--tree", tree.root).exit_code == 0
    assert tree.snapshot() == before


def test_another_commit(tree: MadeUp) -> None:
    tree.edit("README.md")
    git(tree.root, "commit", "-q", "-a", "-m", "newer")
    before = tree.snapshot()
    for command in ("check", "apply", "revert"):
        line = refusal(run(command, "--tree", tree.root))
        assert tree.pinned.commit[:7] in line
        assert "--force" in line
    assert tree.snapshot() == before
    assert run("apply", "--tree", tree.root, "--force").exit_code == 0
    assert states(tree, force=True) == {State.APPLIED}
    assert run("revert", "--tree", tree.root, "--force").exit_code == 0
    assert tree.snapshot() == before
    assert tree.status() == ""


def test_all_or_nothing(tree: MadeUp) -> None:
    (tree.root / tree.touched[-1]).write_text("# rewritten\n", encoding="utf-8")
    git(tree.root, "commit", "-q", "-a", "-m", "rewritten")
    before = tree.snapshot()
    last = max(tree.patches.rglob("*.patch")).stem
    assert last in refusal(run("apply", "--tree", tree.root, "--force"))
    assert tree.snapshot() == before
    assert "1 of" in refusal(run("check", "--tree", tree.root, "--force"))


def test_a_write_that_fails_half_way(tree: MadeUp, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # A git that writes one file and then fails, as on a full disk.
    real, fake = shutil.which("git"), tmp_path / "bin" / "git"
    fake.parent.mkdir()
    fake.write_text(
        "#!/bin/sh\n"
        f'case "$*" in *" apply") echo half > "{tree.root / tree.touched[0]}"\n'
        f'echo "error: disk full" >&2; exit 1;; esac\nexec "{real}" "$@"\n',
        encoding="utf-8",
    )
    fake.chmod(0o755)
    before = tree.snapshot()
    monkeypatch.setenv("PATH", f"{fake.parent}{os.pathsep}{os.environ['PATH']}")
    assert "disk full" in refusal(run("apply", "--tree", tree.root))
    assert tree.snapshot() == before


@pytest.mark.parametrize("inside_another_repository", [False, True])
def test_a_tree_without_git(tree: MadeUp, inside_another_repository: bool) -> None:
    shutil.rmtree(tree.root / ".git")
    if inside_another_repository:
        git(tree.root.parent, "init", "-q")
    before = tree.snapshot()
    assert run("apply", "--tree", tree.root).exit_code == 0
    assert states(tree) == {State.APPLIED}
    assert tree.snapshot() != before
    assert run("revert", "--tree", tree.root).exit_code == 0
    assert tree.snapshot() == before


def test_a_tree_without_git_of_another_version(tree: MadeUp) -> None:
    shutil.rmtree(tree.root / ".git")
    tree.edit(tree.touched[0])
    before = tree.snapshot()
    assert "--force" in refusal(run("apply", "--tree", tree.root))
    assert tree.snapshot() == before
    assert run("apply", "--tree", tree.root, "--force").exit_code == 0
    assert run("revert", "--tree", tree.root, "--force").exit_code == 0
    assert tree.snapshot() == before


def test_git_variables_of_the_caller(tree: MadeUp, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "no such .git"))
    monkeypatch.setenv("GIT_INDEX_FILE", str(tmp_path / "index"))
    assert run("apply", "--tree", tree.root).exit_code == 0


def test_wrong_folder(tmp_path: Path) -> None:
    for folder in (tmp_path / "none", tmp_path):
        error = run("apply", "--tree", folder).exception
        assert isinstance(error, UsageError)
        assert str(folder) in str(error)


def test_no_git(tree: MadeUp, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert refusal(run("apply", "--tree", tree.root)).startswith("git: not found")


def test_patches_that_touch_the_same_file(tree: MadeUp) -> None:
    first = min(tree.patches.rglob("*.patch"))
    shutil.copy(first, first.with_name("0099-again.patch"))
    assert "two patches touch" in refusal(run("check", "--tree", tree.root))


def test_shipped_dir(tmp_path: Path) -> None:
    package = tmp_path / "site" / "paddlemix_qwenvl_plugin"
    package.mkdir(parents=True)
    (tmp_path / "site" / "patches").mkdir()  # of another package
    with pytest.raises(QwenVLError, match="install the package again"):
        patches.shipped_dir(package)
    (tmp_path / "site" / "pyproject.toml").touch()
    assert patches.shipped_dir(package) == tmp_path / "site" / "patches"
    (package / "upstream" / "patches_data").mkdir(parents=True)
    assert patches.shipped_dir(package) == package / "upstream" / "patches_data"


def test_shipped_patches_hold_little_of_upstream() -> None:
    """At most one line of context next to a change, and none in a hunk's header."""
    paths = list(patches.shipped_dir().rglob("*.patch"))
    assert {path.parent.parent.name for path in paths} == {one.name for one in pins.load().upstreams}
    for path in paths:
        run_length = 0
        head, _, body = path.read_text(encoding="utf-8").partition("\ndiff --git ")
        assert head
        for line in body.splitlines():
            if line.startswith("@@"):
                assert line.endswith("@@"), path
            run_length = run_length + 1 if line.startswith(" ") or not line else 0
            assert run_length <= 1, path


def test_every_patch_folder_is_of_a_pinned_commit() -> None:
    folders = {
        path.parent.relative_to(patches.shipped_dir()) for path in patches.shipped_dir().rglob("*.patch")
    }
    assert folders == {Path(one.name, one.commit) for one in pins.load().upstreams}


def test_commands_need_no_paddle() -> None:
    code = "import sys, paddlemix_qwenvl_plugin.cli.patches; print({'paddle', 'pydantic', 'yaml'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
