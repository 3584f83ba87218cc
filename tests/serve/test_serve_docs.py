"""docs/serving.md lists all settings, metrics and parameters, and its examples print what it shows.

README.md's curl command is tested, too.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from serve_service_helpers import fake_app, fake_service

from paddlemix_qwenvl_plugin.serve.openai.chat import ChatCompletionRequest
from paddlemix_qwenvl_plugin.serve.openai.completions import CompletionRequest
from paddlemix_qwenvl_plugin.serve.settings import ServeSettings

REPO = Path(__file__).resolve().parents[2]
SERVING = (REPO / "docs" / "serving.md").read_text("utf-8")
README = (REPO / "README.md").read_text("utf-8")


def setting_row(name: str) -> str:
    """Expected table row of a setting: name, default, description."""
    field = ServeSettings.model_fields[name]
    # The keys are texts, since as keys the values 1 and True are equal.
    words = {"None": "", "False": "off", "True": "on", "[]": "none"}
    default = words.get(str(field.default), f"`{field.default}`")
    description = str(field.description).rstrip(".").replace("|", r"\|")
    return f"| `{name}` | {default} | {description} |"


def metric_rows() -> list[str]:
    """Expected table rows of all metrics: name, type, labels, documentation."""
    service = fake_service()
    fake_app(service)  # registers the gauges and the engine's counters
    # A metric with labels has samples, from which the labels are read, only after its first use.
    service.metrics.request("/", 200, 1.0)
    service.metrics.error("code")
    rows = []
    for family in service.metrics.registry.collect():
        if family.name.startswith("qwenvl_"):
            labels = sorted({label for sample in family.samples for label in sample.labels} - {"le"})
            label_list = ", ".join(f"`{label}`" for label in labels)
            name = family.name + ("_total" if family.type == "counter" else "")
            rows.append(f"| `{name}` | {family.type} | {label_list} | {family.documentation.rstrip('.')} |")
    return rows


def table_rows(heading: str) -> list[str]:
    """The table rows in a section of docs/serving.md that begin with a name in backticks, as no header does."""
    _, _, after_heading = SERVING.partition(f"\n## {heading}\n")
    assert after_heading, heading
    lines = re.split(r"^## ", after_heading, flags=re.MULTILINE)[0].splitlines()
    return [line for line in lines if line.startswith("| `")]


def test_every_setting_is_documented() -> None:
    assert table_rows("Settings") == [setting_row(name) for name in ServeSettings.model_fields]


def test_every_metric_is_documented() -> None:
    rows = [row for row in table_rows("Health, logs, metrics") if row.startswith("| `qwenvl_")]
    assert rows == metric_rows()


@pytest.mark.parametrize("schema", [ChatCompletionRequest, CompletionRequest])
def test_every_parameter_is_documented(schema: Any) -> None:
    cells = " ".join(row.split("|")[1] for row in table_rows("The interface"))
    for name in schema.model_fields:
        assert f"`{name}`" in cells, name
    text = SERVING.partition("\n## The interface\n")[2]
    for name in schema.not_supported:
        assert f"`{name}`" in text, name


def test_kv_cache_sizes() -> None:
    """The document's sizes of keys and values in all layers, for the geometry of the 7B model."""
    layers, heads, head_dim = 32, 32, 128
    numbers_per_token = 2 * layers * heads * head_dim
    assert numbers_per_token * 2 == 512 * 2**10  # bfloat16
    assert "512 KiB a token" in SERVING
    assert numbers_per_token * 4 == 2**20  # float32
    assert "1 MiB a token" in SERVING
    context_length = 8192
    assert f"{context_length * numbers_per_token * 2 >> 30} GiB" in SERVING


@pytest.fixture(scope="module")
def demo_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of a running `qwenvl serve --demo`."""
    log = tmp_path_factory.mktemp("serve-docs") / "stderr"
    with log.open("w") as stderr:
        process = subprocess.Popen(
            [sys.executable, "-m", "paddlemix_qwenvl_plugin.cli", "serve", "--demo", "--port", "0"],
            env={**os.environ, "PYTHONPATH": str(REPO)},
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
        )
    assert process.stdout is not None
    try:
        lines = iter(process.stdout.readline, "")
        ready_line = next((line for line in lines if line.startswith("Serving ")), "")
        match = re.search(r"http://127\.0\.0\.1:\d+", ready_line)
        assert match, log.read_text()
        yield match.group()
    finally:
        process.send_signal(signal.SIGTERM)
        process.stdout.read()
        assert process.wait(120) == 0


def code_blocks(text: str, language: str) -> list[str]:
    """The fenced code blocks of a language in a Markdown text."""
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def curl_response(command: str, url: str) -> dict[str, Any]:
    """Response of the server at `url` to a curl command, without the fields that vary."""
    assert "http://localhost:8000" in command
    completed = subprocess.run(
        ["bash", "-c", command.replace("http://localhost:8000", url)],
        cwd=REPO,
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    return without_variable_fields(json.loads(completed.stdout))


def without_variable_fields(response: dict[str, Any]) -> dict[str, Any]:
    del response["id"], response["created"], response["usage"]["prompt_tokens_details"]
    return response


@pytest.mark.parametrize("document", ["README.md", "docs/serving.md"])
def test_curl_example_gives_the_printed_response(document: str, demo_url: str) -> None:
    text = (REPO / document).read_text("utf-8")
    [command] = [block for block in code_blocks(text, "sh") if block.startswith("curl")]
    assert "qwenvl serve --demo" in text
    [printed] = [block for block in code_blocks(text, "json") if "chat.completion" in block]
    assert curl_response(command, demo_url) == without_variable_fields(json.loads(printed))


def test_python_examples(demo_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The examples print what the comments after their `print` calls say."""
    monkeypatch.chdir(REPO)
    namespace: dict[str, Any] = {}  # shared: later examples use names of earlier ones
    examples = code_blocks(SERVING, "python")
    assert len(examples) >= 2
    for code in examples:
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(code.replace("http://localhost:8000", demo_url), namespace)
        expected = re.findall(r"^\s*print\(.*\)  # (.+)$", code, re.MULTILINE)
        assert printed.getvalue().splitlines() == expected


def test_serve_commands_have_valid_flags(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from paddlemix_qwenvl_plugin.cli.main import main

    commands = [
        re.split("[#&]", line)[0]  # without a comment or the & of a background process
        for block in code_blocks(SERVING, "sh")
        for line in block.splitlines()
        if line.startswith("qwenvl serve ")
    ]
    assert len(commands) >= 4
    monkeypatch.chdir(tmp_path)
    for name in ("serve.yaml", "new.yaml"):
        Path(name).write_text("demo: true\n")
    for command in commands:
        monkeypatch.setattr(sys, "argv", [*shlex.split(command), "--print_config"])
        with pytest.raises(SystemExit) as exit_info:
            main()
        assert exit_info.value.code in (None, 0), (command, capsys.readouterr().err)
