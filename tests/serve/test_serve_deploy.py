"""Systemd units, container image and dashboard in deploy/: all names exist, all settings fit the server."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml
from prometheus_client.metrics_core import Metric
from serve_promql import series
from serve_service_helpers import fake_app, fake_service

from paddlemix_qwenvl_plugin.cli.main import main
from paddlemix_qwenvl_plugin.serve import server
from paddlemix_qwenvl_plugin.serve.settings import ENVIRONMENT_PREFIX, ServeSettings
from paddlemix_qwenvl_plugin.util import env
from paddlemix_qwenvl_plugin.util.errors import UsageError

REPO = Path(__file__).resolve().parents[2]
UNIT = REPO / "deploy" / "systemd" / "qwenvl-serve.service"
DOCKERFILE = REPO / "deploy" / "docker" / "Dockerfile"
DASHBOARD = REPO / "deploy" / "grafana" / "qwenvl.json"

Configure = Callable[..., dict[str, Any]]


@pytest.fixture
def configure(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Configure:
    """Function that returns the settings of a `qwenvl serve` command in an environment."""

    def configure(command: list[str], environment: dict[str, str]) -> dict[str, Any]:
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(sys, "argv", [*command, "--print_config"])
        with pytest.raises(SystemExit) as exit_info:
            main()
        out, err = capsys.readouterr()
        assert exit_info.value.code in (None, 0), err
        settings: dict[str, Any] = yaml.safe_load(out)
        return settings

    return configure


def test_wheel_does_not_contain_deploy() -> None:
    text = (REPO / "pyproject.toml").read_text("utf-8")
    assert '"deploy' not in text


# The unit


def unit() -> list[tuple[str, str, str]]:
    """(section, key, value) of each setting of the service's unit."""
    settings, section = [], ""
    for line in UNIT.read_text("utf-8").splitlines():
        if line.startswith("["):
            section = line.strip("[]")
        elif line and not line.startswith("#"):
            key, equals, value = line.partition("=")
            assert equals, line
            settings.append((section, key, value))
    return settings


def values(key: str) -> list[str]:
    return [value for _, name, value in unit() if name == key]


def test_systemd_accepts_the_units(tmp_path: Path) -> None:
    if shutil.which("systemd-analyze") is None:
        pytest.skip("no systemd-analyze: apt-get install systemd")
    program = values("ExecStart")[0].split()[0]  # replaced, since systemd-analyze requires that it exists
    copies = [tmp_path / path.name for path in (UNIT, UNIT.with_suffix(".socket"))]
    for copy in copies:
        copy.write_text(UNIT.with_name(copy.name).read_text("utf-8").replace(program, "/bin/true"), "utf-8")
    completed = subprocess.run(
        ["systemd-analyze", "verify", *map(str, copies)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    problems = [line for line in completed.stderr.splitlines() if UNIT.stem in line]
    assert (completed.returncode, problems) == (0, [])


def test_unit_starts_the_server(configure: Configure, tmp_path: Path) -> None:
    assert [(section, key) for section, key, _ in unit() if key == "ExecStart"] == [("Service", "ExecStart")]
    program, *arguments = shlex.split(values("ExecStart")[0])
    assert program.endswith("/bin/qwenvl")
    [credential] = values("LoadCredential")
    (tmp_path / credential.split(":")[0]).write_text("key")
    environment = {}
    for assignment in values("Environment"):
        name, _, value = assignment.partition("=")
        # systemd replaces %d by the folder of the credentials, %C by the cache folder.
        environment[name] = value.replace("%d", str(tmp_path)).replace("%C", "/var/cache")
    settings = configure(["qwenvl", *arguments], environment)
    assert Path(settings["api_key_file"]).is_file()
    assert environment[env.CACHE_DIR.name] == f"/var/cache/{values('CacheDirectory')[0]}"


def test_unit_lets_running_requests_finish() -> None:
    # An upper bound of the time that a shutdown takes beyond shutdown_timeout. Four phases have the timeout
    # _STEP_TIMEOUT_SECONDS: the end of the engine process, the handlers' error events, the second engine.stop() in
    # `run`, the end of the image processes. _HANDSHAKE_SECONDS, a part of shutdown_timeout, is a margin.
    cleanup_seconds = 4 * server._STEP_TIMEOUT_SECONDS + server._CLEANUP_SECONDS + server._HANDSHAKE_SECONDS
    assert int(values("TimeoutStopSec")[0]) > ServeSettings().shutdown_timeout + cleanup_seconds
    # "mixed" sends SIGTERM to the front only: at SIGTERM the engine process would exit in the middle of its work.
    assert (values("KillSignal"), values("KillMode")) == (["SIGTERM"], ["mixed"])
    # If memory runs out and the engine process is killed, systemd must not stop the front.
    assert values("OOMPolicy") == ["continue"]
    assert (values("Restart"), values("RestartPreventExitStatus")) == (
        ["on-failure"],
        [str(UsageError.exit_code)],
    )


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("DynamicUser", "yes"),
        ("NoNewPrivileges", "yes"),
        ("ProtectSystem", "strict"),
        ("ProtectHome", "yes"),
        ("PrivateDevices", "yes"),
        ("CapabilityBoundingSet", ""),
        ("RestrictAddressFamilies", "AF_INET AF_INET6 AF_UNIX"),
        ("SystemCallFilter", "@system-service"),
    ],
)
def test_unit_restricts_the_process(key: str, value: str) -> None:
    assert values(key) == [value]


# The container image


class Instruction(NamedTuple):
    """Instruction of the Dockerfile."""

    name: str
    arguments: str

    @property
    def words(self) -> list[str]:
        """The arguments in exec form, a JSON list."""
        words: list[str] = json.loads(self.arguments)
        return words


def instructions() -> list[Instruction]:
    lines = [line for line in DOCKERFILE.read_text("utf-8").splitlines() if not line.startswith("#")]
    joined = "\n".join(lines).replace("\\\n", " ")  # a line that ends with a backslash continues on the next
    return [Instruction(*line.split(maxsplit=1)) for line in joined.splitlines() if line.strip()]


def instructions_named(name: str) -> list[Instruction]:
    return [instruction for instruction in instructions() if instruction.name == name]


def copied_sources() -> Iterator[str]:
    """The paths in the repository that the Dockerfile copies."""
    for instruction in instructions_named("COPY"):
        *sources, _ = instruction.arguments.split()
        if not sources[0].startswith("--from="):
            yield from sources


def test_dockerfile_is_valid() -> None:
    docker_instructions = {"FROM", "RUN", "WORKDIR", "COPY", "ARG", "USER", "ENV", "VOLUME", "EXPOSE"}
    docker_instructions |= {"STOPSIGNAL", "HEALTHCHECK", "ENTRYPOINT", "CMD"}
    assert {instruction.name for instruction in instructions()} <= docker_instructions
    assert instructions()[0].name == "FROM"
    for name in ("ENTRYPOINT", "CMD", "VOLUME"):
        assert all(isinstance(word, str) for word in instructions_named(name)[0].words)


def test_image_is_built_from_existing_files(tmp_path: Path) -> None:
    """The copied files suffice to build a wheel, and the ignore file excludes none of them."""
    ignored = DOCKERFILE.with_name("Dockerfile.dockerignore").read_text("utf-8").split()
    for name in copied_sources():
        assert f"!{name}" in ignored
        source = REPO / name
        if source.is_dir():
            shutil.copytree(source, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copyfile(source, tmp_path / name)
    assert (tmp_path / "tools" / "release_wheel.py").is_file()
    completed = subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", "out"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert completed.returncode == 0, completed.stderr
    [wheel] = (tmp_path / "out").glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    # Hatchling does not complain if one of these folders is missing.
    for part in ("engine/csrc", "upstream/patches_data", "recipes/shipped", "serve/page", "demo/model"):
        assert any(name.startswith(f"paddlemix_qwenvl_plugin/{part}/") for name in names), part
    assert "_qwenvl_activate.py" in names


def device_case_statement() -> str:
    """The shell statement that selects the extras for the build argument DEVICE."""
    [install] = [run.arguments for run in instructions_named("RUN") if "case" in run.arguments]
    return install[: install.index("esac") + len("esac")]


@pytest.mark.parametrize(("device", "extras"), [("cpu", ["serve"]), ("gpu", ["serve", "gpu-engine"])])
def test_build_argument_device(device: str, extras: list[str], configure: Configure) -> None:
    """DEVICE selects extras that exist; the container serves the exported stages of the first volume on this device."""
    device_case = device_case_statement()
    selected = subprocess.run(
        ["sh", "-c", f'{device_case}; echo "$extras"'],
        env={"DEVICE": device},
        capture_output=True,
        text=True,
        check=True,
    )
    assert selected.stdout.strip().split(",") == extras
    project = (REPO / "pyproject.toml").read_text("utf-8")
    assert all(re.search(rf"^{extra} = \[$", project, re.MULTILINE) for extra in extras)

    [variables] = instructions_named("ENV")
    environment = dict(
        word.replace("$DEVICE", device).split("=", 1)
        for word in shlex.split(variables.arguments)
        if "=" in word
    )
    for name in environment:
        if name.startswith(ENVIRONMENT_PREFIX):
            assert name[len(ENVIRONMENT_PREFIX) :].lower() in ServeSettings.model_fields
    settings = configure(
        [*instructions_named("ENTRYPOINT")[0].words, *instructions_named("CMD")[0].words], environment
    )
    assert (settings["device"], settings["host"]) == (device, "0.0.0.0")
    volumes = instructions_named("VOLUME")[0].words
    assert all(
        settings[name].startswith(f"{volumes[0]}/") for name in ("first_model_path", "second_model_path")
    )
    assert environment[env.CACHE_DIR.name] == volumes[1]
    assert instructions_named("EXPOSE")[0].arguments == str(settings["port"])


def test_unknown_device_fails_the_build() -> None:
    device_case = device_case_statement()
    assert subprocess.run(["sh", "-c", device_case], env={"DEVICE": "tpu"}, check=False).returncode == 1


def test_image_has_a_user_and_a_health_check() -> None:
    names = [instruction.name for instruction in instructions()]
    assert instructions_named("USER")[0].arguments == "qwenvl"
    assert names.index("USER") < names.index("ENTRYPOINT")
    [health] = instructions_named("HEALTHCHECK")
    command: list[str] = json.loads(health.arguments[health.arguments.index("CMD") + 4 :])
    assert "/health/live" in command[-1]
    compile(command[-1], "HEALTHCHECK", "exec")
    assert "/health/live" in fake_app(fake_service()).openapi()["paths"]


# The dashboard


def families() -> dict[str, Metric]:
    """Name of a metric in queries -> its family in GET /metrics."""
    service = fake_service()
    fake_app(service)
    suffixes = {"counter": ["_total"], "histogram": ["_bucket", "_sum", "_count"]}
    return {
        family.name + suffix: family
        for family in service.metrics.registry.collect()
        for suffix in suffixes.get(family.type, [""])
    }


def queries() -> list[str]:
    panels = json.loads(DASHBOARD.read_text("utf-8"))["panels"]
    return [target["expr"] for panel in panels for target in panel["targets"]]


@pytest.mark.parametrize("query", queries())
def test_queries_use_existing_metrics_and_labels(query: str) -> None:
    existing = families()
    labels = {"path", "status", "kind", "le", "instance"}
    for metric in series(query):
        assert metric.name in existing
        assert set(metric.labels) <= labels
        # Of counters and histograms, only rates and increases are of interest, which need a range vector.
        assert metric.is_range == (existing[metric.name].type in ("counter", "histogram"))


@pytest.mark.parametrize(
    "query", ["sum(", "rate(a_total)", "a b", "sum by (x (a)", 'a{b="c}', "nothing_such(a)", "a[5 m]", ""]
)
def test_promql_parser_refuses_invalid_queries(query: str) -> None:
    with pytest.raises(ValueError, match=r".+"):
        series(query)


def test_every_metric_of_the_server_is_on_the_dashboard() -> None:
    queried = {metric.name for query in queries() for metric in series(query)}
    for name, family in families().items():
        if name.startswith("qwenvl_") and not name.endswith(("_sum", "_count")):
            assert name in queried, family.documentation


def test_panels_do_not_overlap() -> None:
    panels = json.loads(DASHBOARD.read_text("utf-8"))["panels"]
    occupied = set()
    for panel in panels:
        position = panel["gridPos"]
        left, top = position["x"], position["y"]
        right, bottom = left + position["w"], top + position["h"]
        assert right <= 24  # columns of Grafana's grid
        for x in range(left, right):
            for y in range(top, bottom):
                assert (x, y) not in occupied
                occupied.add((x, y))
    assert len({panel["id"] for panel in panels}) == len(panels)
