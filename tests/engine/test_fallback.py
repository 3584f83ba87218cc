"""Without a built engine: fallback to the portable programs, and a notice."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from engines import needs_compiler

from paddlemix_qwenvl_plugin.artifact.manifest import read_manifest
from paddlemix_qwenvl_plugin.export.export import export_language

LINE = "the engine is not built, and QWENVL_NO_BUILD is set: run qwenvl build-engine"


def command(folder: Path, *arguments: object, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run a command with no built engine and QWENVL_NO_BUILD set."""
    nothing = {"QWENVL_CACHE_DIR": str(folder / "empty"), "QWENVL_NO_BUILD": "1"}
    return subprocess.run(
        [sys.executable, "-m", "paddlemix_qwenvl_plugin.cli", *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**os.environ, **nothing, **variables},
        timeout=120,
        check=False,
    )


def own_lines(done: subprocess.CompletedProcess[str]) -> list[str]:
    return [line for line in done.stderr.splitlines() if line.startswith("qwenvl: ")]


def test_export(tiny_exported: Path, tmp_path: Path) -> None:
    flags = ("--model_name_or_path", tiny_exported / "model", "--save_path", tmp_path / "vision")
    done = command(tmp_path, "export-vision", *flags)
    assert done.returncode == 0, done.stderr[-2000:]
    assert own_lines(done) == [f"qwenvl: {LINE}. Falling back to the portable graph"]
    assert set(read_manifest(tmp_path / "vision", "vision").programs) == {"vision.json", "vision.pdmodel"}

    done = command(tmp_path, "export-vision", *flags, "--engine", "fused")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].endswith(LINE)


@needs_compiler
def test_predict(tiny_exported: Path, tmp_path: Path) -> None:
    stages = ("--first_model_path", tiny_exported / "vision" / "vision")
    stages += ("--second_model_path", tiny_exported / "text" / "qwen")
    asked = ("predict", *stages, "--prompt", "What is it?", "--max_new_tokens", 4)
    with_it = command(tmp_path, *asked, QWENVL_CACHE_DIR=os.environ.get("QWENVL_CACHE_DIR", ""))
    without = command(tmp_path, *asked)
    assert with_it.returncode == without.returncode == 0, without.stderr[-2000:]
    assert own_lines(with_it) == []
    assert own_lines(without) == [f"qwenvl: {LINE}. Falling back to the portable graph"]
    assert with_it.stdout == without.stdout != ""
    assert own_lines(command(tmp_path, *asked, QWENVL_ENGINE="portable")) == []

    needed = command(tmp_path, *asked, QWENVL_ENGINE="fused")
    assert needed.returncode == 1
    assert needed.stderr.splitlines()[-1].endswith(LINE)


@needs_compiler
def test_quantised_weights_need_it(tiny_exported: Path, tmp_path: Path) -> None:
    export_language(tiny_exported / "model", tmp_path / "text", "qwen", quant_type="weight_only_int8")
    stages = ("--first_model_path", tiny_exported / "vision" / "vision")
    stages += ("--second_model_path", tmp_path / "text" / "qwen")
    done = command(tmp_path, "predict", *stages, "--prompt", "What is it?")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].endswith(LINE)
