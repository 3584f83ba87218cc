"""Parts of `qwenvl doctor` with this project's entry points, the real Paddle, a Git checkout and a model folder."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest
from doctor_helpers import REPO
from safetensors.numpy import load_file, save_file

from paddlemix_qwenvl_plugin.doctor import machine, probe, upstreams
from paddlemix_qwenvl_plugin.doctor.installation import ENTRY_POINTS
from paddlemix_qwenvl_plugin.doctor.model import check_model
from paddlemix_qwenvl_plugin.doctor.probe import Answer
from paddlemix_qwenvl_plugin.upstream import patches, pins
from paddlemix_qwenvl_plugin.util.errors import UsageError

# Entry points


def declared_entry_points() -> list[tuple[str, str, str]]:
    """List the entry points of pyproject.toml as (group, name, object)."""
    text = (REPO / "pyproject.toml").read_text("utf-8")
    return re.findall(r'^\[project\.entry-points\."(.+)"\]\n(\S+) = "(.+)"$', text, re.MULTILINE)


def test_the_doctor_and_its_document_list_the_entry_points() -> None:
    assert {group: name for group, name, _ in declared_entry_points()} == ENTRY_POINTS
    document = (REPO / "docs" / "doctor.md").read_text("utf-8")
    for group, name, _ in declared_entry_points():
        assert f"| `{group}` | `{name}` |" in document


@pytest.mark.parametrize(("group", "name", "value"), declared_entry_points(), ids=lambda text: text)
def test_entry_points_resolve(group: str, name: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(REPO / "activation"))
    assert callable(EntryPoint(name, value, group).load())


def test_the_activation_imports_no_large_modules() -> None:
    (value,) = [value for group, _, value in declared_entry_points() if group == "paddlenlp.plugins"]
    module, _, function = value.partition(":")
    code = f"import sys, {module}; {module}.{function}(); print(*sys.modules)"
    completed = subprocess.run(
        [sys.executable, "-S", "-c", code],
        env={"PYTHONPATH": str(REPO / "activation")},
        capture_output=True,
        text=True,
        check=True,
    )
    assert not {"paddle", "numpy", "importlib.metadata", "paddlemix_qwenvl_plugin"} & set(
        completed.stdout.split()
    )


# probe.ask: questions to a child process, because the import of a package may hang or end the process


def test_a_hanging_import(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "paddle.py").write_text(
        # This grandchild of the doctor outlives the timeout and keeps the output open.
        "import subprocess, sys, time\n"
        "subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(20)'])\n"
        "time.sleep(60)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    assert probe.ask("paddle", timeout=1) == Answer({}, "timed out after 1 s")


def test_the_real_paddle() -> None:
    """The child process finds the same Paddle: it gets this process's sys.path."""
    import paddle

    answer = probe.ask("paddle")
    assert answer.cause is None
    assert answer.value["version"] == paddle.__version__
    assert answer.value["gpu_build"] == paddle.is_compiled_with_cuda()


def test_a_gpu_that_only_the_driver_reports(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")  # no nvidia-smi
    cpu = Answer({"version": "3.3.1", "gpu_build": False, "cuda": None, "architectures": []})
    paddle = machine.check_paddle({"paddlepaddle": "3.3.1"}, found=True, answer=cpu, has_fix=False)
    check = machine.check_gpu(paddle, Answer({}), ["A GPU"])
    assert check.status == "ok"
    assert check.message == "A GPU, used by the engine only: this Paddle is no GPU build"
    assert check.data["gpus"] == [{"name": "A GPU", "architecture": None, "driver": None}]
    assert check.data["visible"] == ["A GPU"]


# Checkouts


def git(folder: Path, *arguments: str) -> str:
    """Run git in a folder and return its output."""
    identity = ("-c", "user.name=test", "-c", "user.email=test@example.com", "-c", "commit.gpgsign=false")
    return subprocess.run(
        ["git", *identity, *arguments], cwd=folder, check=True, capture_output=True, text=True
    ).stdout.strip()


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A fake checkout of PaddleMIX, on sys.path."""
    if shutil.which("git") is None:
        pytest.skip("git is not on PATH; install it")
    root = tmp_path / "a checkout"
    for marker in upstream().markers:
        (root / marker).parent.mkdir(parents=True, exist_ok=True)
        (root / marker).write_text("")
    git(root, "init", "-q")
    git(root, "add", ".")
    git(root, "commit", "-q", "-m", "made up")
    monkeypatch.syspath_prepend(str(root))
    return root


def upstream() -> pins.Upstream:
    [paddlemix] = [upstream for upstream in pins.load().upstreams if upstream.name == "paddlemix"]
    return paddlemix


def check_paddlemix(answer: Answer, **pin: str) -> Any:
    """Check the checkout on sys.path; `answer`: result of its import, `pin`: changed fields of the pin."""
    changed = upstream().model_copy(update=pin)
    return upstreams.check_upstream(changed, {}, answer, paddle_imports=True, has_fix=False)


def test_another_commit(checkout: Path) -> None:
    head, pin = git(checkout, "rev-parse", "HEAD"), upstream().commit
    check = check_paddlemix(Answer({}))
    assert (check.status, check.data["commit"], check.data["path"]) == ("note", head, str(checkout))
    assert check.message.endswith(f"at commit {head[:7]}; the plugin is made for {pin[:7]}")
    assert check.fix == f"git -C '{checkout}' checkout {pin}"


def test_the_pinned_commit(checkout: Path) -> None:
    head = git(checkout, "rev-parse", "HEAD")
    check = check_paddlemix(Answer({}), commit=head)
    assert (check.status, check.fix) == ("ok", None)
    assert check.message.endswith(f"at the pinned commit {head[:7]}")


def test_no_git_folder(checkout: Path) -> None:
    shutil.rmtree(checkout / ".git")
    check = check_paddlemix(Answer({}))
    assert (check.status, check.data["commit"]) == ("note", None)
    assert "commit unknown" in check.message


def test_git_is_missing(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    check = check_paddlemix(Answer({}))
    assert check.status == "note"
    assert "git: not found" in check.message


def test_the_fix_for_a_failing_import_is_to_apply_the_patches(
    checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A patch of this test replaces the shipped ones; once it is applied, the doctor has no fix."""
    head = git(checkout, "rev-parse", "HEAD")
    file = checkout / "paddlemix" / "__init__.py"
    file.write_text("fixed = True\n")
    folder = tmp_path / "patches" / "paddlemix" / upstream().commit
    folder.mkdir(parents=True)
    diff = git(checkout, "diff", "--full-index")
    (folder / "0001-fix.patch").write_text(f"Fixes it\n\n{diff}\n")
    git(checkout, "checkout", "-q", ".")
    monkeypatch.setattr(patches, "shipped_dir", lambda: tmp_path / "patches")
    failing = Answer({}, "ValueError: mutable default")
    check = check_paddlemix(failing, commit=head)
    assert check.status == "problem"
    assert check.message.endswith(
        "import paddlemix fails: ValueError: mutable default; its patches are not applied"
    )
    assert check.fix == f"qwenvl patches apply --tree '{checkout}'"
    assert check.data["patches"] == {"0001-fix": "applies"}
    file.write_text("fixed = True\n")
    check = check_paddlemix(failing, commit=head)
    assert (check.status, check.fix) == ("problem", None)
    assert check.data["patches"] == {"0001-fix": "already applied"}


# Model folders


@pytest.fixture
def model(tiny_exported: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_exported / "model", tmp_path / "a model"))


def rename_tensors(folder: Path, change: Callable[[str], str]) -> None:
    weights = load_file(folder / "model.safetensors")
    save_file({change(name): value for name, value in weights.items()}, folder / "model.safetensors")


def to_static(name: str) -> str:
    return name.replace("transformer.llm.", "qwen.")


def to_hugging_face(name: str) -> str:
    if name.startswith("visual."):
        return "transformer." + name.replace("visual.vit.", "visual.")
    return name.replace("transformer.llm.", "transformer.")


@pytest.mark.parametrize(
    ("change", "scheme"),
    # The tiny model has PaddleMIX's names, which `str` leaves unchanged.
    [(str, "PaddleMIX"), (to_static, "Paddle static"), (to_hugging_face, "Hugging Face")],
)
def test_a_model_folder(model: Path, change: Callable[[str], str], scheme: str) -> None:
    rename_tensors(model, change)
    check = check_model(model)
    assert check.status == "ok", check.message
    n_parameters = sum(value.size for value in load_file(model / "model.safetensors").values())
    assert check.data == {
        "path": str(model),
        "scheme": scheme,
        "dtype": "float32",
        "parameters": n_parameters,
        "language_layers": 2,
        "hidden_size": 256,
        "vocab_size": json.loads((model / "config.json").read_text())["vocab_size"],
        "vision_layers": 2,
        "tokenizer": "qwen.tiktoken",
        "cause": None,
    }
    assert f"{scheme} names, float32, {n_parameters:,} parameters" in check.message


def test_a_model_without_its_vocabulary(model: Path) -> None:
    (model / "qwen.tiktoken").unlink()
    check = check_model(model)
    assert (check.status, check.data["tokenizer"]) == ("note", None)
    assert "it has no qwen.tiktoken" in check.message


def test_a_model_with_a_damaged_vocabulary(model: Path) -> None:
    (model / "qwen.tiktoken").write_text("not base64")
    check = check_model(model)
    assert check.status == "problem"
    assert "qwen.tiktoken" in check.message


def test_a_model_with_another_vocabulary(model: Path) -> None:
    lines = (model / "qwen.tiktoken").read_text().splitlines(keepends=True)
    (model / "qwen.tiktoken").write_text("".join(lines[:-1]))
    check = check_model(model)
    assert check.status == "problem"
    assert "another model's vocabulary" in check.message


def test_a_model_with_an_invalid_config(model: Path) -> None:
    (model / "config.json").write_text("[]")
    check = check_model(model)
    assert (check.status, check.message) == (
        "problem",
        f"model: {model / 'config.json'}: must be a JSON object",
    )
    assert check.data["scheme"] is None


def test_no_model_folder(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such model folder"):
        check_model(tmp_path / "none")
    with pytest.raises(UsageError, match=r"no config\.json in it"):
        check_model(tmp_path)
