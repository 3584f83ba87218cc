"""Flags: generation options, spellings, --picture_label, and the files that --draw and --output of `predict` write."""

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
# The ranges in the help texts of the generation options.
RANGES = {
    "max_new_tokens": "at least 1",
    "min_new_tokens": "at least 0",
    "temperature": "0 to 100",
    "top_p": "0 to 1",
    "top_k": "at least 1",
    "repetition_penalty": "0.01 to 100",
    "frequency_penalty": "-100 to 100",
    "presence_penalty": "-100 to 100",
    "seed": "at least 0",
}


def qwenvl(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "paddlemix_qwenvl_plugin.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.mark.parametrize("command", ["predict", "chat", "batch"])
def test_flags_of_the_generation_options(command: str) -> None:
    """Each option has a flag; its help text ends with the range and the default value, if any."""
    without_frames = re.sub("[│╭╮╰╯─]", " ", qwenvl(command, "--help").stdout)
    text = " ".join(without_frames.split())
    for field in fields(GenerationOptions):
        # As in "--repetition_penalty FLOAT ... (0.01 to 100). [default: 1.0]".
        [match] = re.finditer(rf"--{field.name} (?P<help>.*?\))\.( \[default: (?P<default>.*?)\])?", text)
        assert match["help"].endswith(f"({RANGES[field.name]})")
        assert match["default"] == (None if field.default is None else str(field.default))


@pytest.mark.parametrize("flag", ["--max_new_tokens", "--max-new-tokens", "--max_new-tokens"])
def test_both_spellings_of_a_flag(flag: str) -> None:
    for arguments in ([flag, "0"], [f"{flag}=0"]):
        # The prompt is a value that begins like a flag.
        completed = qwenvl(
            "predict", "--first-model-path", "a", "--second_model_path=b", "--prompt=-a-_b", *arguments
        )
        assert (completed.returncode, completed.stderr) == (
            2,
            "qwenvl: max_new_tokens: 0 is out of range; it must be at least 1\n",
        )


@pytest.mark.parametrize("flag", ["--dry_run", "--dry-run"])
def test_both_spellings_of_a_flag_of_run(flag: str) -> None:
    completed = qwenvl("run", "tiny-cpu", flag)
    assert completed.returncode == 0, completed.stderr
    assert "make-tiny" in completed.stdout


def predict(exported: Path, capsys: pytest.CaptureFixture[str], *arguments: str) -> list[int]:
    """Run `qwenvl predict` in this process and return the token ids of its answer."""
    stages = (
        "--first_model_path",
        exported / "vision" / "vision",
        "--second_model_path",
        exported / "text" / "qwen",
    )
    question = ("--prompt", "What is it?", "--image", STREET, "--json")
    sampling = ("--max_new_tokens=24", "--temperature=9", "--seed=1")
    command = ["qwenvl", "predict", *map(str, (*stages, *question, *sampling, *arguments))]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", command)
        with pytest.raises(SystemExit) as system_exit:
            main()
    assert system_exit.value.code == 0
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
    n_opened = 0
    image_open = Image.open

    def count_and_open(*arguments: object) -> Image.Image:
        nonlocal n_opened
        n_opened += 1
        return image_open(*arguments)

    monkeypatch.setattr(Image, "open", count_and_open)
    tokens = predict(tiny_exported, capsys)
    assert n_opened == 1
    drawn = tmp_path / "drawn.png"
    assert predict(tiny_exported, capsys, "--draw", str(drawn)) == tokens
    assert n_opened == 2
    with image_open(drawn) as image, image_open(STREET) as street:
        assert image.size == street.size


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "tif", "bmp", "gif"])
def test_a_drawn_image_is_replaced_by_a_second_run(
    suffix: str, tiny_exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Except in BMP and GIF, which cannot hold the mark that the command has drawn the image."""
    drawn, output = tmp_path / f"drawn.{suffix}", tmp_path / "answer.json"
    output.touch()  # an empty file may be replaced
    predict(tiny_exported, capsys, "--draw", str(drawn), "--output", str(output))
    content = drawn.read_bytes()
    drawn.write_bytes(content + b"more")  # other bytes, with which the test sees whether the file is replaced
    if suffix in ("bmp", "gif"):
        error_of_predict(tiny_exported, drawn, "--draw", str(drawn))
        return
    predict(tiny_exported, capsys, "--draw", str(drawn), "--output", str(output))
    assert drawn.read_bytes() == content


def error_of_predict(exported: Path, unchanged: Path, *arguments: str, image: object = STREET) -> str:
    """Run `qwenvl predict`, which must fail and leave a file unchanged; return its error line."""
    content = unchanged.read_bytes()
    completed = qwenvl(
        *("predict", "--first_model_path", str(exported / "vision" / "vision")),
        *("--second_model_path", str(exported / "text" / "qwen"), "--prompt", "?", "--image", str(image)),
        *arguments,
    )
    assert (completed.returncode, completed.stdout) == (2, "")
    assert unchanged.read_bytes() == content
    return completed.stderr


def test_the_input_image_is_not_overwritten(
    tiny_exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Even if the command has drawn it: such an image may be replaced only if it is not the input."""
    drawn, link = tmp_path / "drawn.png", tmp_path / "link.png"
    predict(tiny_exported, capsys, "--draw", str(drawn))
    link.symlink_to(drawn)
    for flag in ("--draw", "--output"):
        for target in (drawn, link):
            for image in (drawn, drawn.as_uri()):
                error = error_of_predict(tiny_exported, drawn, flag, str(target), image=image)
                assert error == f"qwenvl: {target}: is an input image; name another file\n"
    other = tmp_path / "other.png"  # not drawn by the command
    Image.new("RGB", (4, 4)).save(other)
    assert "did not write it" in error_of_predict(tiny_exported, other, "--draw", str(other))
    assert "did not write it" in error_of_predict(tiny_exported, other, "--output", str(other))
