"""Flags shared by commands."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
from PIL import Image

from paddlemix_qwenvl_plugin import GenerationOptions, QwenVL
from paddlemix_qwenvl_plugin.cli.main import main

STREET = Path(__file__).resolve().parents[2] / "recipes" / "images" / "street.png"
RANGES = {
    "max_new_tokens": "at least 1",
    "min_new_tokens": "at least 0",
    "temperature": "0 to 100",
    "top_p": "0 to 1",
    "top_k": "at least 1",
    "repetition_penalty": "over 0, up to 100",
    "frequency_penalty": "-100 to 100",
    "presence_penalty": "-100 to 100",
    "seed": "at least 0",
}


def qwenvl(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "paddlemix_qwenvl_plugin.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.mark.parametrize("command", ["predict", "chat", "batch"])
def test_the_commands_have_a_flag_for_each(command: str) -> None:
    text = " ".join(re.sub("[│╭╮╰╯─]", " ", qwenvl(command, "--help").stdout).split())
    for field in fields(GenerationOptions):
        [about] = re.findall(rf"--{field.name} (.*?\))\.( \[default: (.*?)\])?", text)
        assert about[0].endswith(f"({RANGES[field.name]})")
        assert about[2] == ("" if field.default is None else str(field.default))


@pytest.mark.parametrize("flag", ["--max_new_tokens", "--max-new-tokens", "--max_new-tokens"])
def test_both_spellings_of_a_flag(flag: str) -> None:
    for arguments in ([flag, "0"], [f"{flag}=0"]):
        done = qwenvl(
            "predict", "--first-model-path", "a", "--second_model_path=b", "--prompt=-a-_b", *arguments
        )
        assert (done.returncode, done.stderr) == (
            2,
            "qwenvl: max_new_tokens: 0 is out of range; it must be at least 1\n",
        )


@pytest.mark.parametrize("flag", ["--dry_run", "--dry-run"])
def test_both_spellings_below_the_top(flag: str) -> None:
    done = qwenvl("run", "tiny-cpu", flag)
    assert done.returncode == 0, done.stderr
    assert "make-tiny" in done.stdout


def predict(exported: Path, capsys: pytest.CaptureFixture[str], *arguments: str) -> list[int]:
    """Token ids of `qwenvl predict`, run in this process."""
    stages = (
        "--first_model_path",
        exported / "vision" / "vision",
        "--second_model_path",
        exported / "text" / "qwen",
    )
    question = ("--prompt", "What is it?", "--image", STREET, "--json")
    sampled = ("--max_new_tokens=24", "--temperature=9", "--seed=1")
    command = ["qwenvl", "predict", *map(str, (*stages, *question, *sampled, *arguments))]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", command)
        with pytest.raises(SystemExit) as ended:
            main()
    assert ended.value.code == 0
    return json.loads(capsys.readouterr().out)["token_ids"]


def test_picture_label(tiny_exported: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = QwenVL.from_exported(tiny_exported / "vision" / "vision", tiny_exported / "text" / "qwen")
    answers = []
    for label, flags in (
        ("Picture {}: ", []),
        ("the dogs and boats {} ", ["--picture-label=the dogs and boats {} "]),
    ):
        model.tokenizer.picture_label = label
        query = [{"image": str(STREET)}, {"text": "What is it?"}]
        answers.append(model.generate(query, max_new_tokens=24, temperature=9.0, seed=1).token_ids)
        assert predict(tiny_exported, capsys, *flags) == answers[-1]
    assert answers[0] != answers[1]


def test_draw_opens_the_image_once(
    tiny_exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = []
    really = Image.open
    monkeypatch.setattr(Image, "open", lambda *arguments: (opened.append(arguments), really(*arguments))[1])
    tokens = predict(tiny_exported, capsys)
    assert len(opened) == 1
    drawn = tmp_path / "drawn.png"
    assert predict(tiny_exported, capsys, "--draw", str(drawn)) == tokens
    assert len(opened) == 2
    with really(drawn) as image, really(STREET) as street:
        assert image.size == street.size


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "tif", "bmp", "gif"])
def test_what_is_written_again_and_what_is_not(
    suffix: str, tiny_exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A second run replaces the first one's file, except in formats without metadata."""
    draw, output = tmp_path / f"drawn.{suffix}", tmp_path / "answer.json"
    output.touch()
    predict(tiny_exported, capsys, "--draw", str(draw), "--output", str(output))
    before = draw.read_bytes()
    draw.write_bytes(before + b"more")
    if suffix in ("bmp", "gif"):
        refused(tiny_exported, draw, "--draw", str(draw))
        return
    predict(tiny_exported, capsys, "--draw", str(draw), "--output", str(output))
    assert draw.read_bytes() == before


def refused(exported: Path, untouched: Path, *arguments: str, image: object = STREET) -> str:
    """Error line of a `qwenvl predict` that leaves a file unchanged."""
    before = untouched.read_bytes()
    done = qwenvl(
        *("predict", "--first_model_path", str(exported / "vision" / "vision")),
        *("--second_model_path", str(exported / "text" / "qwen"), "--prompt", "?", "--image", str(image)),
        *arguments,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert untouched.read_bytes() == before
    return done.stderr


def test_the_image_is_not_overwritten(
    tiny_exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Not even a drawn image, which a run with another image may replace."""
    drawn, link = tmp_path / "drawn.png", tmp_path / "link.png"
    predict(tiny_exported, capsys, "--draw", str(drawn))
    link.symlink_to(drawn)
    for flag in ("--draw", "--output"):
        for target in (drawn, link):
            for image in (drawn, drawn.as_uri()):
                line = refused(tiny_exported, drawn, flag, str(target), image=image)
                assert line == f"qwenvl: {target}: is an input image; name another file\n"
    mine = tmp_path / "mine.png"
    Image.new("RGB", (4, 4)).save(mine)
    assert "did not write it" in refused(tiny_exported, mine, "--draw", str(mine))
    assert "did not write it" in refused(tiny_exported, mine, "--output", str(mine))
