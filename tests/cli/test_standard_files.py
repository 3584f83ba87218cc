"""`-` for standard input and output, output on a terminal, progress lines."""

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
SAMPLED = {"max_new_tokens": 48, "temperature": 9.0, "seed": 1}
FLAGS = [f"--{name}={value}" for name, value in SAMPLED.items()]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(REPO), "TERM": "dumb"}


def qwenvl(folder: Path, *arguments: str, given: bytes = b"") -> bytes:
    """Output of a successful command; stderr may only report malformed boxes."""
    done = subprocess.run(
        [*COMMAND, *arguments], cwd=folder, input=given, env=ENVIRONMENT, capture_output=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def vl(tiny_exported: Path) -> QwenVL:
    return QwenVL.from_exported(tiny_exported / "vision" / "vision", tiny_exported / "text" / "qwen")


def test_the_prompt_from_standard_input(vl: QwenVL, tiny_exported: Path) -> None:
    wanted = vl.generate("What is\nit?", **SAMPLED)
    out = qwenvl(tiny_exported, "predict", *STAGES, *FLAGS, "--prompt", "-", given=b"What is\nit?\n")
    assert out.decode() == f"{without_controls(wanted.text)}\n"


def test_no_control_of_an_answer_reaches_the_terminal(vl: QwenVL, tiny_exported: Path) -> None:
    control = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
    said = ((seed, vl.generate("What is it?", **{**SAMPLED, "seed": seed}).text) for seed in range(100))
    seed, answer = next(pair for pair in said if control.search(pair[1]))
    arguments = ["predict", *STAGES, *FLAGS, f"--seed={seed}", "--prompt", "What is it?"]
    piped = qwenvl(tiny_exported, *arguments).decode()
    assert piped == f"{without_controls(answer)}\n"
    assert not control.search(piped)
    in_json = qwenvl(tiny_exported, *arguments, "--json").decode()
    assert json.loads(in_json)["text"] == answer
    assert not control.search(in_json)


def test_the_image_from_standard_input_and_json_to_standard_output(vl: QwenVL, tiny_exported: Path) -> None:
    content = STREET.read_bytes()
    wanted = vl.generate([{"image": content}, {"text": "What is it?"}], **SAMPLED)
    arguments = ["predict", *STAGES, *FLAGS, "--image", "-", "--prompt", "What is it?", "--output", "-"]
    answer = json.loads(qwenvl(tiny_exported, *arguments, given=content))
    assert answer["token_ids"] == wanted.token_ids
    assert answer["image_size"] == [960, 640]
    assert not (tiny_exported / "-").exists()


def test_batch_from_standard_input_to_standard_output(
    vl: QwenVL, tiny_exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("vision", "text"):
        (tmp_path / name).symlink_to(tiny_exported / name)
    (tmp_path / "street.png").write_bytes(STREET.read_bytes())
    rows = [{"id": 1, "prompt": "Hello"}, {"id": 2, "image": "street.png", "prompt": "What is it?"}]
    given = "".join(json.dumps(row) + "\n" for row in rows).encode()
    before = sorted(path.name for path in tmp_path.iterdir())
    out = qwenvl(tmp_path, "batch", "-", "-", *STAGES, *FLAGS, given=given)
    answers = [json.loads(line) for line in out.splitlines()]
    # A path is a part of the prompt, and the same for both.
    monkeypatch.chdir(tmp_path)
    wanted = [
        vl.generate("Hello", **SAMPLED),
        vl.generate([{"image": "street.png"}, {"text": "What is it?"}], **SAMPLED),
    ]
    assert [(row["id"], row["text"]) for row in answers] == [(1, wanted[0].text), (2, wanted[1].text)]
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    qwenvl(tmp_path, "batch", "-", "out.jsonl", *STAGES, *FLAGS, given=given)
    assert [json.loads(line) for line in (tmp_path / "out.jsonl").read_bytes().splitlines()] == answers


def test_predict_streams_on_a_terminal(vl: QwenVL, tiny_exported: Path) -> None:
    """The answer is streamed: the first words arrive long before the last ones."""
    options: dict[str, Any] = {**SAMPLED, "max_new_tokens": 3000}
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
    shown = terminal.read().replace("\r\n", "\n")
    assert shown.startswith(f"{without_controls(vl.generate('What is it?', **SAMPLED).text)}\n")


@pytest.mark.parametrize("chat_format", ["chatml", "raw", None])
def test_the_form_is_the_model_folders(
    chat_format: str | None, vl: QwenVL, tiny_exported: Path, tmp_path: Path
) -> None:
    (tmp_path / "vision").symlink_to(tiny_exported / "vision")
    (tmp_path / "text").mkdir()
    for path in (tiny_exported / "text").iterdir():
        (tmp_path / "text" / path.name).symlink_to(path)
    if chat_format is not None:
        (tmp_path / "text" / "generation_config.json").write_text(json.dumps({"chat_format": chat_format}))
    forms = {chat: vl.generate("Hello", chat=chat, **SAMPLED).token_ids for chat in (True, False)}
    assert forms[True] != forms[False]
    arguments = ["predict", *STAGES, *FLAGS, "--prompt", "Hello", "--json"]
    for flags, chat in (([], chat_format == "chatml"), (["--chat"], True), (["--no-chat"], False)):
        assert json.loads(qwenvl(tmp_path, *arguments, *flags))["token_ids"] == forms[chat]
    there = QwenVL.from_exported(tmp_path / "vision" / "vision", tmp_path / "text" / "qwen")
    assert there.generate("Hello", **SAMPLED).token_ids == forms[chat_format == "chatml"]
    given = b'{"id": 1, "prompt": "Hello"}\n{"id": 2, "prompt": "Hello", "chat": false}\n'
    rows = [
        json.loads(line)
        for line in qwenvl(tmp_path, "batch", "-", "-", *STAGES, *FLAGS, given=given).splitlines()
    ]
    texts = {chat: vl.generate("Hello", chat=chat, **SAMPLED).text for chat in (True, False)}
    assert [row["text"] for row in rows] == [texts[chat_format == "chatml"], texts[False]]


def test_version_and_help(tmp_path: Path) -> None:
    assert qwenvl(tmp_path, "--version").decode() == f"qwenvl {__version__}\n"
    for words in ([], ["predict"], ["eval", "vqa"]):
        assert qwenvl(tmp_path, *words, "-h") == qwenvl(tmp_path, *words, "--help")


def test_completion(tmp_path: Path) -> None:
    """Shell completions of `qwenvl exp`."""
    done = subprocess.run(
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
    assert done.stdout.split() == ["export-vision", "export-language"]
    assert b"_qwenvl_completion" in qwenvl(tmp_path, "--show-completion", "bash")
