"""Settings of the server: precedence of their sources, error messages, flags of `qwenvl serve`."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml

from paddlemix_qwenvl_plugin.cli import serve
from paddlemix_qwenvl_plugin.cli.main import main
from paddlemix_qwenvl_plugin.serve.settings import ServeSettings
from paddlemix_qwenvl_plugin.serve.settings_sources import read_settings
from paddlemix_qwenvl_plugin.util.errors import UsageError


@pytest.fixture(autouse=True)
def no_variables(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Remove all environment variables of settings; change to an empty folder."""
    monkeypatch.delenv("QWENVL_SERVE_CONFIG", raising=False)
    for name in ServeSettings.model_fields:
        monkeypatch.delenv(f"QWENVL_SERVE_{name.upper()}", raising=False)
    monkeypatch.chdir(tmp_path)


def write_config(text: str, name: str = "serve.yaml") -> Path:
    path = Path(name)
    path.write_text(text, "utf-8")
    return path


class CommandResult(NamedTuple):
    exit_code: Any
    stdout: str
    stderr: str


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., CommandResult]:
    """Function that runs `qwenvl serve` with arguments, in this process."""

    def run(*arguments: str) -> CommandResult:
        monkeypatch.setattr(sys, "argv", ["qwenvl", "serve", *arguments])
        with pytest.raises(SystemExit) as exit_info:
            main()
        out, err = capsys.readouterr()
        return CommandResult(exit_info.value.code, out, err)

    return run


@pytest.mark.parametrize("by_file", [False, True])
@pytest.mark.parametrize("by_variable", [False, True])
@pytest.mark.parametrize("by_flag", [False, True])
def test_precedence(by_file: bool, by_variable: bool, by_flag: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A flag has precedence over an environment variable, and the variable over the file."""
    config = write_config("max_waiting: 1\nhost: 127.0.0.9\n") if by_file else None
    if by_variable:
        monkeypatch.setenv("QWENVL_SERVE_MAX_WAITING", "2")
    settings = read_settings({"max_waiting": 3} if by_flag else {}, config)
    expected, place = 256, None  # the default, which has no origin
    if by_file:
        expected, place = 1, "serve.yaml"
    if by_variable:
        expected, place = 2, "QWENVL_SERVE_MAX_WAITING"
    if by_flag:
        expected, place = 3, "--max_waiting"
    assert settings.values.max_waiting == expected
    assert settings.values.host == ("127.0.0.9" if by_file else "127.0.0.1")
    origin = settings.origins.get("max_waiting")
    assert (origin and origin.place) == place


def test_config_file_from_an_environment_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QWENVL_SERVE_CONFIG", str(write_config("port: 1\n", "a.yaml")))
    assert read_settings({}).values.port == 1
    assert read_settings({}, write_config("port: 2\n", "b.yaml")).values.port == 2


def test_empty_variable_is_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QWENVL_SERVE_PORT", "")
    monkeypatch.setenv("QWENVL_SERVE_IMAGE_HOSTS", "")
    assert read_settings({}).values == ServeSettings()


@pytest.mark.parametrize(
    ("text", "items"),
    [("a.org", ["a.org"]), ("a.org, *.b.org,", ["a.org", "*.b.org"]), (" , ", [])],
)
def test_list_in_a_variable(text: str, items: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QWENVL_SERVE_IMAGE_HOSTS", text)
    assert read_settings({}).values.image_hosts == items
    assert read_settings({}, write_config("image_hosts: [c.org]")).values.image_hosts == items
    monkeypatch.delenv("QWENVL_SERVE_IMAGE_HOSTS")
    assert read_settings({}, write_config("image_hosts: [c.org]")).values.image_hosts == ["c.org"]


# Setting, invalid value, message.
INVALID_VALUES = [
    ("port", "70000", "70000 is out of range; it must be 0 to 65535"),
    ("port", "http", "'http' is not a whole number"),
    ("max_running", "1.5", "'1.5' is not a whole number"),
    ("max_per_key", "0", "0 is out of range; it must be at least 1"),
    ("waiting_timeout", "0", "0 is out of range; it must be over 0"),
    ("waiting_timeout", "inf", "'inf' is not a number"),
    ("waiting_timeout", "nan", "'nan' is not a number"),
    ("gpu_memory", "1.1", "1.1 is out of range; it must be over 0, up to 1"),
    ("demo", "perhaps", "'perhaps' is not true or false"),
    ("log_level", "loud", "'loud' must be one of debug, info, warning, error"),
]


@pytest.mark.parametrize(("name", "value", "problem"), INVALID_VALUES)
def test_message_of_an_invalid_value_names_its_source(
    name: str, value: str, problem: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def message(flags: dict[str, Any], config: Path | None = None) -> str:
        with pytest.raises(UsageError) as caught:
            read_settings(flags, config)
        return str(caught.value)

    assert message({name: value}) == f"--{name}: {problem}"
    assert message({}, write_config(f"{name}: '{value}'")) == f"serve.yaml: {name}: {problem}"
    monkeypatch.setenv(f"QWENVL_SERVE_{name.upper()}", value)
    assert message({}) == f"QWENVL_SERVE_{name.upper()}: {problem}"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("max_waitng: 1", "serve.yaml: max_waitng: no such setting; did you mean max_waiting?"),
        ("flavour: 1", "serve.yaml: flavour: no such setting; see qwenvl serve --help"),
        ("- 1", "serve.yaml: settings are a mapping of keys to values"),
        ("port: 1\nport: 2", "serve.yaml:2:1: the key 'port' is given twice"),
        ("image_hosts: 3", "serve.yaml: image_hosts: input should be a valid list, got 3"),
        ("port: [", "serve.yaml:1:8: expected the node content, but found '<stream end>'"),
    ],
)
def test_invalid_config_file(text: str, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        read_settings({}, write_config(text))
    assert str(caught.value) == message


def test_missing_config_file() -> None:
    with pytest.raises(UsageError, match=r"^none\.yaml: cannot be read"):
        read_settings({}, Path("none.yaml"))


def test_unknown_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QWENVL_SERVE_MAX_WAITNG", "1")
    message = r"^QWENVL_SERVE_MAX_WAITNG: no such setting; did you mean QWENVL_SERVE_MAX_WAITING\?$"
    with pytest.raises(UsageError, match=message):
        read_settings({})


def test_output_of_print_config_is_a_config_file_with_the_same_settings(
    run: Callable[..., CommandResult], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QWENVL_SERVE_MAX_RUNNING", "5")
    write_config("max_images: 3\npicture_label: 'Bild # {}: '\n")
    flags = ["--port", "0", "--no-page", "--image-hosts", "a.org", "--image_hosts", "b.org,c.org"]
    result = run("--print-config", "--config", "serve.yaml", *flags)
    assert (result.exit_code, result.stderr) == (0, "")
    data = yaml.safe_load(result.stdout)
    assert list(data) == list(ServeSettings.model_fields)
    expected = {"max_images": 3, "port": 0, "page": False, "max_running": 5, "picture_label": "Bild # {}: "}
    assert data.items() >= expected.items()
    assert data["image_hosts"] == ["a.org", "b.org", "c.org"]
    # A comment on each line names the source.
    lines = result.stdout.splitlines()
    assert "max_images: 3  # serve.yaml" in lines
    assert "port: 0  # --port" in lines
    assert "max_running: 5  # QWENVL_SERVE_MAX_RUNNING" in lines
    assert "max_waiting: 256  # default" in lines
    reread = read_settings({}, write_config(result.stdout, "printed.yaml")).values
    assert reread.model_dump(mode="json") == data


def test_each_setting_has_a_flag(run: Callable[..., CommandResult], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    result = run("--help")
    assert result.exit_code == 0
    flags = {word for word in result.stdout.split() if word.startswith("--")}
    assert flags >= {f"--{name}" for name in ServeSettings.model_fields}
    assert "Maximum tokens of a completion that a request may set" in " ".join(result.stdout.split())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--port", "70000", "--demo"], "--port: 70000 is out of range; it must be 0 to 65535"),
        ([], "nothing to serve: give --first_model_path and --second_model_path, or --demo"),
        (
            ["--demo", "--first_model_path", "x"],
            "--demo: serves the bundled model; leave out the paths, or --demo",
        ),
    ],
)
def test_error_message_of_the_command(
    arguments: list[str], message: str, run: Callable[..., CommandResult]
) -> None:
    assert run(*arguments) == (2, "", f"qwenvl: {message}\n")


def test_message_without_the_extra_serve(
    run: Callable[..., CommandResult], monkeypatch: pytest.MonkeyPatch
) -> None:
    serve._setting_flags.cache_clear()  # its first call checks the libraries; other tests have called it
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    message = "qwenvl serve needs the library uvicorn: pip install 'paddlemix-qwenvl-plugin[serve]'"
    assert run("--demo") == (1, "", f"qwenvl: {message}\n")
