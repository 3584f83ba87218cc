"""Standard input and output as `-`, output on a terminal, the default prompt form, version, help, shell completion."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pexpect
import pytest

from paddlemix_qwenvl_plugin import QwenVL, __version__
from paddlemix_qwenvl_plugin.util.text import without_controls

REPO = Path(__file__).resolve().parents[2]
STREET = REPO / "recipes" / "images" / "street.png"
COMMAND = [sys.executable, "-m", "paddlemix_qwenvl_plugin.cli"]
STAGES = ("--first_model_path", "vision/vision", "--second_model_path", "text/qwen")
# At this high temperature the answers of the tiny model, which has random weights, are varied.
SAMPLING = {"max_new_tokens": 48, "temperature": 9.0, "seed": 1}
FLAGS = [f"--{name}={value}" for name, value in SAMPLING.items()]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(REPO), "TERM": "dumb"}


def qwenvl(folder: Path, *arguments: str, stdin: bytes = b"") -> bytes:
    """Run a command that must succeed, and return its stdout."""
    completed = subprocess.run(
        [*COMMAND, *arguments], cwd=folder, input=stdin, env=ENVIRONMENT, capture_output=True, check=False
    )
    assert completed.returncode == 0, completed.stderr
    return completed.stdout


@pytest.fixture(scope="module")
def vl(tiny_exported: Path) -> QwenVL:
    return QwenVL.from_exported(tiny_exported / "vision" / "vision", tiny_exported / "text" / "qwen")


def test_the_prompt_from_standard_input(vl: QwenVL, tiny_exported: Path) -> None:
    expected = vl.generate("What is\nit?", **SAMPLING)
    out = qwenvl(tiny_exported, "predict", *STAGES, *FLAGS, "--prompt", "-", stdin=b"What is\nit?\n")
    assert out.decode() == f"{without_controls(expected.text)}\n"


def test_control_characters_of_an_answer_are_escaped(vl: QwenVL, tiny_exported: Path) -> None:
    control_character = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # except tab and line feed
    for seed in range(100):
        answer = vl.generate("What is it?", **{**SAMPLING, "seed": seed}).text
        if control_character.search(answer):
            break
    assert control_character.search(answer)
    arguments = ["predict", *STAGES, *FLAGS, f"--seed={seed}", "--prompt", "What is it?"]
    text = qwenvl(tiny_exported, *arguments).decode()
    assert text == f"{without_controls(answer)}\n"
    assert not control_character.search(text)
    json_text = qwenvl(tiny_exported, *arguments, "--json").decode()
    assert json.loads(json_text)["text"] == answer
    assert not control_character.search(json_text)


def test_the_image_from_standard_input_and_json_to_standard_output(vl: QwenVL, tiny_exported: Path) -> None:
    content = STREET.read_bytes()
    expected = vl.generate([{"image": content}, {"text": "What is it?"}], **SAMPLING)
    arguments = ["predict", *STAGES, *FLAGS, "--image", "-", "--prompt", "What is it?", "--output", "-"]
    answer = json.loads(qwenvl(tiny_exported, *arguments, stdin=content))
    assert answer["token_ids"] == expected.token_ids
    assert answer["image_size"] == [960, 640]
    assert not (tiny_exported / "-").exists()


def test_batch_from_standard_input_to_standard_output(
    vl: QwenVL, tiny_exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("vision", "text"):
        (tmp_path / name).symlink_to(tiny_exported / name)
    (tmp_path / "street.png").write_bytes(STREET.read_bytes())
    rows = [{"id": 1, "prompt": "Hello"}, {"id": 2, "image": "street.png", "prompt": "What is it?"}]
    stdin = "".join(json.dumps(row) + "\n" for row in rows).encode()
    before = sorted(path.name for path in tmp_path.iterdir())
    out = qwenvl(tmp_path, "batch", "-", "-", *STAGES, *FLAGS, stdin=stdin)
    answers = [json.loads(line) for line in out.splitlines()]
    # The prompt contains the image's path: use the same relative path here.
    monkeypatch.chdir(tmp_path)
    expected = [
        vl.generate("Hello", **SAMPLING),
        vl.generate([{"image": "street.png"}, {"text": "What is it?"}], **SAMPLING),
    ]
    assert [(row["id"], row["text"]) for row in answers] == [(1, expected[0].text), (2, expected[1].text)]
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    qwenvl(tmp_path, "batch", "-", "out.jsonl", *STAGES, *FLAGS, stdin=stdin)
    assert [json.loads(line) for line in (tmp_path / "out.jsonl").read_bytes().splitlines()] == answers


def test_predict_streams_on_a_terminal(vl: QwenVL, tiny_exported: Path) -> None:
    """The first segment is printed while the command still generates 3000 tokens."""
    options: dict[str, Any] = {**SAMPLING, "max_new_tokens": 3000}
    first = next(iter(vl.stream("What is it?", **options))).text
    arguments = [
        *COMMAND[1:],
        "predict",
        *STAGES,
        *FLAGS[1:],
        "--max_new_tokens=3000",
        "--prompt=What is it?",
    ]
    terminal = pexpect.spawn(
        COMMAND[0], arguments, cwd=tiny_exported, env=ENVIRONMENT, encoding="utf-8", timeout=60
    )
    terminal.expect_exact(without_controls(first).split("\n")[0])
    assert terminal.isalive()
    terminal.sendintr()
    terminal.expect("qwenvl: interrupted")
    terminal.wait()
    assert terminal.exitstatus == 130


def test_a_terminal_gets_the_same_answer(vl: QwenVL, tiny_exported: Path) -> None:
    arguments = [*COMMAND[1:], "predict", *STAGES, *FLAGS, "--prompt", "What is it?"]
    terminal = pexpect.spawn(
        COMMAND[0], arguments, cwd=tiny_exported, env=ENVIRONMENT, encoding="utf-8", timeout=60
    )
    output = terminal.read().replace("\r\n", "\n")
    assert output.startswith(f"{without_controls(vl.generate('What is it?', **SAMPLING).text)}\n")


@pytest.mark.parametrize("chat_format", ["chatml", "raw", None])
def test_the_default_prompt_form_is_that_of_the_generation_config(
    chat_format: str | None, vl: QwenVL, tiny_exported: Path, tmp_path: Path
) -> None:
    """The chat form is the default only if generation_config.json says "chatml"; flags and rows override it."""
    (tmp_path / "vision").symlink_to(tiny_exported / "vision")
    (tmp_path / "text").mkdir()
    for path in (tiny_exported / "text").iterdir():
        (tmp_path / "text" / path.name).symlink_to(path)
    if chat_format is not None:
        (tmp_path / "text" / "generation_config.json").write_text(json.dumps({"chat_format": chat_format}))
    default = chat_format == "chatml"
    expected = {chat: vl.generate("Hello", chat=chat, **SAMPLING) for chat in (True, False)}
    assert expected[True].token_ids != expected[False].token_ids
    arguments = ["predict", *STAGES, *FLAGS, "--prompt", "Hello", "--json"]
    for flags, chat in (([], default), (["--chat"], True), (["--no-chat"], False)):
        answer = json.loads(qwenvl(tmp_path, *arguments, *flags))
        assert answer["token_ids"] == expected[chat].token_ids
    model = QwenVL.from_exported(tmp_path / "vision" / "vision", tmp_path / "text" / "qwen")
    assert model.generate("Hello", **SAMPLING).token_ids == expected[default].token_ids
    stdin = b'{"id": 1, "prompt": "Hello"}\n{"id": 2, "prompt": "Hello", "chat": false}\n'
    rows = [
        json.loads(line)
        for line in qwenvl(tmp_path, "batch", "-", "-", *STAGES, *FLAGS, stdin=stdin).splitlines()
    ]
    assert [row["text"] for row in rows] == [expected[default].text, expected[False].text]


def test_version_and_help(tmp_path: Path) -> None:
    assert qwenvl(tmp_path, "--version").decode() == f"qwenvl {__version__}\n"
    for command in ([], ["predict"], ["eval", "vqa"]):
        assert qwenvl(tmp_path, *command, "-h") == qwenvl(tmp_path, *command, "--help")


def test_shell_completion(tmp_path: Path) -> None:
    """Completions of `qwenvl exp`, and the completion script for bash."""
    completed = subprocess.run(
        [*COMMAND],
        cwd=tmp_path,
        env={
            **ENVIRONMENT,
            "_QWENVL_COMPLETE": "complete_bash",
            "COMP_WORDS": "qwenvl exp",
            "COMP_CWORD": "1",
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert completed.stdout.split() == ["export-vision", "export-language"]
    assert b"_qwenvl_completion" in qwenvl(tmp_path, "--show-completion", "bash")
