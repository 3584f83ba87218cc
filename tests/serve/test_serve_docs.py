"""docs/serving.md lists all settings, metrics and parameters, and its examples and the README's run as printed."""

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
    """Table row of a setting: name, default, description."""
    field = ServeSettings.model_fields[name]
    shown = {"None": "", "False": "off", "True": "on", "[]": "none"}  # as text: 1 == True
    default = shown.get(str(field.default), f"`{field.default}`")
    return f"| `{name}` | {default} | {str(field.description).rstrip('.').replace('|', chr(92) + '|')} |"


def metric_rows() -> list[str]:
    """Table rows of all metrics, with their documentation."""
    service = fake_service()
    fake_app(service)
    service.metrics.request("/", 200, 1.0)
    service.metrics.error("code")
    rows = []
    for family in service.metrics.registry.collect():
        if family.name.startswith("qwenvl_"):
            labels = sorted({label for sample in family.samples for label in sample.labels} - {"le"})
            shown = ", ".join(f"`{label}`" for label in labels)
            name = family.name + ("_total" if family.type == "counter" else "")
            rows.append(f"| `{name}` | {family.type} | {shown} | {family.documentation.rstrip('.')} |")
    return rows


def rows_after(heading: str) -> list[str]:
    """The rows of the tables under a second-level heading, without their heads."""
    _, _, rest = SERVING.partition(f"\n## {heading}\n")
    assert rest, heading
    lines = re.split(r"^## ", rest, flags=re.MULTILINE)[0].splitlines()
    return [line for line in lines if line.startswith("| `")]


def test_every_setting_is_documented() -> None:
    assert rows_after("Settings") == [setting_row(name) for name in ServeSettings.model_fields]


def test_every_metric_is_documented() -> None:
    assert [
        row for row in rows_after("Health, logs, metrics") if row.startswith("| `qwenvl_")
    ] == metric_rows()


@pytest.mark.parametrize("schema", [ChatCompletionRequest, CompletionRequest])
def test_every_parameter_is_documented(schema: Any) -> None:
    cells = " ".join(row.split("|")[1] for row in rows_after("The interface"))
    for name in schema.model_fields:
        assert f"`{name}`" in cells, name
    text = SERVING.partition("\n## The interface\n")[2]
    for name in schema.not_supported:
        assert f"`{name}`" in text, name


def test_sizes_of_the_kv_cache() -> None:
    """Keys and values of each layer and head, in the numbers that the document gives for the 7B geometry."""
    layers, heads, head_dim = 32, 32, 128
    for n_bytes, said in ((2, "512 KiB"), (4, "1 MiB")):
        per_token = 2 * layers * heads * head_dim * n_bytes
        assert said == (f"{per_token >> 20} MiB" if per_token >= 1 << 20 else f"{per_token >> 10} KiB")
        assert f"{said} a token" in SERVING
    assert f"{8192 * 2 * layers * heads * head_dim * 2 >> 30} GiB" in SERVING


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of `qwenvl serve --demo`."""
    errors = tmp_path_factory.mktemp("serve-docs") / "stderr"
    with errors.open("w") as stderr:
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
        said = next((line for line in lines if line.startswith("Serving ")), "")
        match = re.search(r"http://127\.0\.0\.1:\d+", said)
        assert match, errors.read_text()
        yield match.group()
    finally:
        process.send_signal(signal.SIGTERM)
        process.stdout.read()
        assert process.wait(120) == 0


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def asked(command: str, url: str) -> dict[str, Any]:
    """Response to a curl command, without its variable fields."""
    assert "http://localhost:8000" in command
    done = subprocess.run(
        ["bash", "-c", command.replace("http://localhost:8000", url)],
        cwd=REPO,
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    return stable(json.loads(done.stdout))


def stable(answer: dict[str, Any]) -> dict[str, Any]:
    del answer["id"], answer["created"], answer["usage"]["prompt_tokens_details"]
    return answer


@pytest.mark.parametrize("document", ["README.md", "docs/serving.md"])
def test_the_curl_gives_the_answer(document: str, demo: str) -> None:
    text = (REPO / document).read_text("utf-8")
    [command] = [block for block in blocks(text, "sh") if block.startswith("curl")]
    assert "qwenvl serve --demo" in text
    [printed] = [block for block in blocks(text, "json") if "chat.completion" in block]
    assert asked(command, demo) == stable(json.loads(printed))


def test_the_python_example(demo: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The example prints the text of the comments after its `print` calls."""
    monkeypatch.chdir(REPO)
    names: dict[str, Any] = {}
    examples = blocks(SERVING, "python")
    assert len(examples) >= 2
    for code in examples:
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(code.replace("http://localhost:8000", demo), names)
        assert printed.getvalue().splitlines() == re.findall(r"^\s*print\(.*\)  # (.+)$", code, re.MULTILINE)


def test_commands_parse(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each `qwenvl serve` of the document has valid flags."""
    from paddlemix_qwenvl_plugin.cli.main import main

    commands = [
        re.split("[#&]", line)[0]
        for block in blocks(SERVING, "sh")
        for line in block.splitlines()
        if line.startswith("qwenvl serve ")
    ]
    assert len(commands) >= 4
    monkeypatch.chdir(tmp_path)
    for name in ("serve.yaml", "new.yaml"):
        Path(name).write_text("demo: true\n")
    for command in commands:
        monkeypatch.setattr(sys, "argv", [*shlex.split(command), "--print_config"])
        with pytest.raises(SystemExit) as ended:
            main()
        assert ended.value.code in (None, 0), (command, capsys.readouterr().err)
