"""Logits that are not finite, from finite weights: an error in Python and in four commands, never an answer."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import pytest
from safetensors.numpy import load_file, save_file

from paddlemix_qwenvl_plugin import QwenVL, QwenVLError
from paddlemix_qwenvl_plugin.cli.main import main
from paddlemix_qwenvl_plugin.demo import run as demo
from paddlemix_qwenvl_plugin.export.export import export_language, export_vision
from paddlemix_qwenvl_plugin.tiny.make import make_tiny

STREET = Path(__file__).resolve().parents[2] / "recipes" / "images" / "street.png"
MESSAGE = (
    "the model's logits are not finite (infinity or NaN); its weights may be damaged: "
    "check them with qwenvl verify"
)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose last norm overflows float32, and its exported stages."""
    folder = tmp_path_factory.mktemp("overflowing")
    make_tiny(folder / "model", seed=1)
    path = folder / "model" / "model.safetensors"
    tensors = load_file(path)
    [last_norm] = [name for name in tensors if name.endswith("ln_f.weight")]
    tensors[last_norm][:] = 3e38
    save_file(tensors, str(path))
    export_vision(folder / "model", folder / "vision" / "vision", engine="auto")
    export_language(folder / "model", folder / "text", "qwen", engine="auto")
    return folder


def stages(folder: Path) -> list[str]:
    vision, text = folder / "vision" / "vision", folder / "text" / "qwen"
    return ["--first_model_path", str(vision), "--second_model_path", str(text)]


def test_python(exported: Path, engine: str) -> None:
    vl = QwenVL.from_exported(exported / "vision" / "vision", exported / "text" / "qwen")
    parts = [{"image": str(STREET)}, {"text": "What is it?"}]
    for options in ({}, {"temperature": 1.0, "seed": 1}, {"repetition_penalty": 2.0, "min_new_tokens": 3}):
        with pytest.raises(QwenVLError, match="logits are not finite"):
            vl.generate(parts, **options)
        with pytest.raises(QwenVLError, match="logits are not finite"):
            next(vl.stream(parts, chat=True, **options))
    chat = vl.chat()
    with pytest.raises(QwenVLError, match="logits are not finite"):
        chat.ask(parts).finish()
    assert chat.history == ()


@pytest.mark.parametrize("command", ["predict", "predict --chat --json", "chat", "batch"])
def test_commands(
    command: str,
    exported: Path,
    engine: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    name, *flags = command.split()
    rows = [{"id": 1, "prompt": "?"}, {"id": 2, "image": str(STREET), "prompt": "What?", "temperature": 1}]
    if name == "batch":
        Path("in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        flags = ["in.jsonl", "out.jsonl"]
    elif name == "predict":
        flags += ["--prompt", "?", "--image", str(STREET), "--output", "answer.json"]
    else:
        questions = io.BytesIO(b"What is it?\nWhy?\n")
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(questions, "utf-8"))
    monkeypatch.setattr(sys, "argv", ["qwenvl", name, *flags, *stages(exported)])
    capfd.readouterr()
    with pytest.raises(SystemExit) as exit_info:
        main()
    printed = capfd.readouterr()
    assert exit_info.value.code == 1
    assert "\0" not in printed.out  # token 0, which an argmax of NaN selects
    last_line = printed.err.splitlines()[-1]
    if name == "batch":
        assert last_line == "qwenvl: 2 of 2 rows failed; see their errors in out.jsonl"
        output = [json.loads(line) for line in Path("out.jsonl").read_text().splitlines()]
        assert output == [{"id": row["id"], "error": MESSAGE} for row in rows]
    else:
        assert last_line == f"qwenvl: {MESSAGE}"
        assert printed.out.strip() == ""
        assert not Path("answer.json").exists()


def test_the_demo(
    exported: Path,
    engine: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(demo, "MODEL", exported / "model")
    monkeypatch.setattr(sys, "argv", ["qwenvl", "demo"])
    with pytest.raises(SystemExit) as exit_info:
        main()
    printed = capfd.readouterr()
    assert (exit_info.value.code, printed.err.splitlines()[-1]) == (1, f"qwenvl: {MESSAGE}")
    assert not list(Path("qwenvl-demo").glob("*.html"))
