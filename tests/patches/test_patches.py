"""The command `qwenvl patches` on fake checkouts: apply, revert, check and list. The form of the shipped patches."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from made_up import FakeCheckout, git
from typer.testing import CliRunner, Result

from paddlemix_qwenvl_plugin.cli.patches import app
from paddlemix_qwenvl_plugin.upstream import patches, pins
from paddlemix_qwenvl_plugin.upstream.patches import State
from paddlemix_qwenvl_plugin.util.errors import QwenVLError, UsageError


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def refusal(result: Result) -> str:
    """Return the error message of a command that must have ended with exit code 1."""
    assert isinstance(result.exception, QwenVLError), result.output
    assert result.exception.exit_code == 1
    return str(result.exception)


def states(tree: FakeCheckout, force: bool = False) -> set[State]:
    return {state for _, state in patches.check(tree.root, force).states}


def test_list_names_commit_and_patches(tree: FakeCheckout) -> None:
    lines = run("list", "--tree", tree.root).output.splitlines()
    assert lines[0] == f"{tree.pinned.title} {tree.pinned.commit}"
    names = sorted(path.stem for path in tree.patches.rglob("*.patch"))
    assert [line.split()[0] for line in lines[1:]] == names
    assert len(run("list").output.splitlines()) >= len(lines) + 1  # the other upstream as well


def test_check_changes_nothing(tree: FakeCheckout) -> None:
    before = tree.snapshot()
    result = run("check", "--tree", tree.root)
    assert result.exit_code == 0
    assert [line.split(": ")[1] for line in result.output.splitlines()] == ["applies"] * len(tree.touched)
    assert tree.snapshot() == before


def test_the_result_equals_that_of_git_apply(tree: FakeCheckout, tmp_path: Path) -> None:
    by_git = tmp_path / "by git"
    shutil.copytree(tree.root, by_git)
    for path in sorted(tree.patches.rglob("*.patch")):
        git(by_git, "apply", "-", stdin=path.read_text(encoding="utf-8"))
    assert run("apply", "--tree", tree.root).exit_code == 0
    for file in tree.touched:
        assert (tree.root / file).read_bytes() == (by_git / file).read_bytes()
    assert sorted(line[3:] for line in tree.status().splitlines()) == sorted(tree.touched)


def test_apply_twice(tree: FakeCheckout) -> None:
    run("apply", "--tree", tree.root)
    patched = tree.snapshot()
    second = run("apply", "--tree", tree.root)
    assert second.exit_code == 0
    assert all(line.endswith(": already applied") for line in second.output.splitlines())
    assert len(second.output.splitlines()) == len(tree.touched)
    assert tree.snapshot() == patched


def test_revert_restores_all_files(tree: FakeCheckout) -> None:
    before = tree.snapshot()
    run("apply", "--tree", tree.root)
    assert tree.snapshot() != before
    assert run("revert", "--tree", tree.root).exit_code == 0
    assert tree.snapshot() == before
    assert tree.status() == ""
    second = run("revert", "--tree", tree.root)
    assert second.exit_code == 0
    assert all(line.endswith(": not applied") for line in second.output.splitlines())


def test_a_patch_that_was_applied_with_git(tree: FakeCheckout) -> None:
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
def test_user_changes_in_a_file_of_a_patch_are_refused(
    tree: FakeCheckout, command: str, staged: bool
) -> None:
    tree.edit(tree.touched[0])
    if staged:
        git(tree.root, "add", ".")
    before = tree.snapshot()
    for force in ([], ["--force"]):
        assert tree.touched[0] in refusal(run(command, "--tree", tree.root, *force))
        assert tree.snapshot() == before


@pytest.mark.parametrize("command", ["apply", "revert"])
def test_user_changes_in_a_patched_file_are_refused(tree: FakeCheckout, command: str) -> None:
    run("apply", "--tree", tree.root)
    tree.edit(tree.touched[-1])
    before = tree.snapshot()
    assert tree.touched[-1] in refusal(run(command, "--tree", tree.root))
    assert tree.snapshot() == before


def test_user_changes_in_other_files_are_kept(tree: FakeCheckout) -> None:
    tree.edit("README.md")
    (tree.root / "new.txt").write_text("mine\n", encoding="utf-8")
    before = tree.snapshot()
    assert run("apply", "--tree", tree.root).exit_code == 0
    assert run("revert", "--tree", tree.root).exit_code == 0
    assert tree.snapshot() == before


def test_another_commit_needs_force(tree: FakeCheckout) -> None:
    tree.edit("README.md")
    git(tree.root, "commit", "-q", "-a", "-m", "newer")
    before = tree.snapshot()
    for command in ("check", "apply", "revert"):
        message = refusal(run(command, "--tree", tree.root))
        assert tree.pinned.commit[:7] in message
        assert "--force" in message
    assert tree.snapshot() == before
    assert run("apply", "--tree", tree.root, "--force").exit_code == 0
    assert states(tree, force=True) == {State.APPLIED}
    assert run("revert", "--tree", tree.root, "--force").exit_code == 0
    assert tree.snapshot() == before
    assert tree.status() == ""


def test_nothing_is_applied_if_a_patch_does_not_apply(tree: FakeCheckout) -> None:
    (tree.root / tree.touched[-1]).write_text("# rewritten\n", encoding="utf-8")
    git(tree.root, "commit", "-q", "-a", "-m", "rewritten")
    before = tree.snapshot()
    last = max(tree.patches.rglob("*.patch")).stem
    assert last in refusal(run("apply", "--tree", tree.root, "--force"))
    assert tree.snapshot() == before
    assert "1 of" in refusal(run("check", "--tree", tree.root, "--force"))


def test_files_are_restored_if_git_fails(
    tree: FakeCheckout, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A git whose `apply` writes a file and then fails, as on a full disk; `apply --check` works.
    real_git, fake_git = shutil.which("git"), tmp_path / "bin" / "git"
    fake_git.parent.mkdir()
    fake_git.write_text(
        "#!/bin/sh\n"
        f'case "$*" in *" apply") echo incomplete > "{tree.root / tree.touched[0]}"\n'
        f'echo "error: disk full" >&2; exit 1;; esac\nexec "{real_git}" "$@"\n',
        encoding="utf-8",
    )
    fake_git.chmod(0o755)
    before = tree.snapshot()
    monkeypatch.setenv("PATH", f"{fake_git.parent}{os.pathsep}{os.environ['PATH']}")
    assert "disk full" in refusal(run("apply", "--tree", tree.root))
    assert tree.snapshot() == before


@pytest.mark.parametrize("inside_another_repository", [False, True])
def test_a_tree_without_git(tree: FakeCheckout, inside_another_repository: bool) -> None:
    shutil.rmtree(tree.root / ".git")
    if inside_another_repository:
        git(tree.root.parent, "init", "-q")
    before = tree.snapshot()
    assert run("apply", "--tree", tree.root).exit_code == 0
    assert states(tree) == {State.APPLIED}
    assert tree.snapshot() != before
    assert run("revert", "--tree", tree.root).exit_code == 0
    assert tree.snapshot() == before


def test_a_tree_without_git_of_another_version(tree: FakeCheckout) -> None:
    shutil.rmtree(tree.root / ".git")
    tree.edit(tree.touched[0])
    before = tree.snapshot()
    assert "--force" in refusal(run("apply", "--tree", tree.root))
    assert tree.snapshot() == before
    assert run("apply", "--tree", tree.root, "--force").exit_code == 0
    assert run("revert", "--tree", tree.root, "--force").exit_code == 0
    assert tree.snapshot() == before


def test_git_variables_of_the_caller_are_ignored(
    tree: FakeCheckout, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "no such .git"))
    monkeypatch.setenv("GIT_INDEX_FILE", str(tmp_path / "index"))
    assert run("apply", "--tree", tree.root).exit_code == 0


def test_wrong_folder(tmp_path: Path) -> None:
    for folder in (tmp_path / "none", tmp_path):
        error = run("apply", "--tree", folder).exception
        assert isinstance(error, UsageError)
        assert str(folder) in str(error)


def test_no_git(tree: FakeCheckout, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert refusal(run("apply", "--tree", tree.root)).startswith("git: not found")


def test_two_patches_of_the_same_file_are_refused(tree: FakeCheckout) -> None:
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


def test_context_lines_of_the_shipped_patches() -> None:
    """The patches contain little of upstream's code: no consecutive context lines, and no code after a hunk's `@@`."""
    paths = list(patches.shipped_dir().rglob("*.patch"))
    assert {path.parent.parent.name for path in paths} == {
        upstream.name for upstream in pins.load().upstreams
    }
    for path in paths:
        n_context_lines = 0
        description, _, diff = path.read_text(encoding="utf-8").partition("\ndiff --git ")
        assert description
        for line in diff.splitlines():
            if line.startswith("@@"):
                assert line.endswith("@@"), path
            n_context_lines = n_context_lines + 1 if line.startswith(" ") or not line else 0
            assert n_context_lines <= 1, path


def test_every_patch_folder_is_of_a_pinned_commit() -> None:
    folders = {
        path.parent.relative_to(patches.shipped_dir()) for path in patches.shipped_dir().rglob("*.patch")
    }
    assert folders == {Path(upstream.name, upstream.commit) for upstream in pins.load().upstreams}


def test_the_command_module_imports_no_large_modules() -> None:
    """Every `qwenvl` command imports the module; `qwenvl patches` itself imports more."""
    code = "import sys, paddlemix_qwenvl_plugin.cli.patches; print({'paddle', 'pydantic', 'yaml'} & set(sys.modules))"
    completed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert completed.stdout.strip() == "set()"
