"""Without a built engine, commands fall back to the portable graph with a notice, or fail if they need the engine."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from engines import needs_compiler

from paddlemix_qwenvl_plugin.artifact.manifest import read_manifest
from paddlemix_qwenvl_plugin.export.export import export_language

NOT_BUILT = "the engine is not built, and QWENVL_NO_BUILD is set: run qwenvl build-engine"


def run_command(folder: Path, *arguments: object, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run a command with an empty cache of engines and QWENVL_NO_BUILD, unless `variables` overrides them."""
    no_engine = {"QWENVL_CACHE_DIR": str(folder / "empty"), "QWENVL_NO_BUILD": "1"}
    return subprocess.run(
        [sys.executable, "-m", "paddlemix_qwenvl_plugin.cli", *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**os.environ, **no_engine, **variables},
        timeout=120,
        check=False,
    )


def messages(result: subprocess.CompletedProcess[str]) -> list[str]:
    return [line for line in result.stderr.splitlines() if line.startswith("qwenvl: ")]


def test_export(tiny_exported: Path, tmp_path: Path) -> None:
    flags = ("--model_name_or_path", tiny_exported / "model", "--save_path", tmp_path / "vision")
    result = run_command(tmp_path, "export-vision", *flags)
    assert result.returncode == 0, result.stderr[-2000:]
    assert messages(result) == [f"qwenvl: {NOT_BUILT}. Falling back to the portable graph"]
    assert set(read_manifest(tmp_path / "vision", "vision").programs) == {"vision.json", "vision.pdmodel"}

    result = run_command(tmp_path, "export-vision", *flags, "--engine", "fused")
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1].endswith(NOT_BUILT)


@needs_compiler
def test_predict(tiny_exported: Path, tmp_path: Path) -> None:
    stages = ("--first_model_path", tiny_exported / "vision" / "vision")
    stages += ("--second_model_path", tiny_exported / "text" / "qwen")
    arguments = ("predict", *stages, "--prompt", "What is it?", "--max_new_tokens", 4)
    # The engine is in the cache of the tests: the fixture tiny_exported has built it.
    with_engine = run_command(tmp_path, *arguments, QWENVL_CACHE_DIR=os.environ.get("QWENVL_CACHE_DIR", ""))
    without_engine = run_command(tmp_path, *arguments)
    assert with_engine.returncode == without_engine.returncode == 0, without_engine.stderr[-2000:]
    assert messages(with_engine) == []
    assert messages(without_engine) == [f"qwenvl: {NOT_BUILT}. Falling back to the portable graph"]
    assert with_engine.stdout == without_engine.stdout != ""
    assert messages(run_command(tmp_path, *arguments, QWENVL_ENGINE="portable")) == []

    required = run_command(tmp_path, *arguments, QWENVL_ENGINE="fused")
    assert required.returncode == 1
    assert required.stderr.splitlines()[-1].endswith(NOT_BUILT)


@needs_compiler
def test_quantized_weights_need_the_engine(tiny_exported: Path, tmp_path: Path) -> None:
    export_language(tiny_exported / "model", tmp_path / "text", "qwen", quant_type="weight_only_int8")
    stages = ("--first_model_path", tiny_exported / "vision" / "vision")
    stages += ("--second_model_path", tmp_path / "text" / "qwen")
    result = run_command(tmp_path, "predict", *stages, "--prompt", "What is it?")
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1].endswith(NOT_BUILT)
