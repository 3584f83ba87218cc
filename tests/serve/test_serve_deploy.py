"""deploy/: units, image and dashboard refer to existing names and fit the server's behaviour."""

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
def configured(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Configure:
    """Function that returns the settings of a command in an environment."""

    def configured(command: list[str], environment: dict[str, str]) -> dict[str, Any]:
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(sys, "argv", [*command, "--print_config"])
        with pytest.raises(SystemExit) as ended:
            main()
        out, err = capsys.readouterr()
        assert ended.value.code in (None, 0), err
        settings: dict[str, Any] = yaml.safe_load(out)
        return settings

    return configured


def test_the_wheel_carries_none_of_it() -> None:
    text = (REPO / "pyproject.toml").read_text("utf-8")
    assert '"deploy' not in text


# The unit


def unit() -> list[tuple[str, str, str]]:
    """(section, key, value) of each line."""
    found, section = [], ""
    for line in UNIT.read_text("utf-8").splitlines():
        if line.startswith("["):
            section = line.strip("[]")
        elif line and not line.startswith("#"):
            key, equals, value = line.partition("=")
            assert equals, line
            found.append((section, key, value))
    return found


def values(key: str) -> list[str]:
    return [value for _, name, value in unit() if name == key]


def test_systemd_takes_the_unit(tmp_path: Path) -> None:
    if shutil.which("systemd-analyze") is None:
        pytest.skip("no systemd-analyze: apt-get install systemd")
    program = values("ExecStart")[0].split()[0]
    copies = [tmp_path / path.name for path in (UNIT, UNIT.with_suffix(".socket"))]
    for copy in copies:
        copy.write_text(UNIT.with_name(copy.name).read_text("utf-8").replace(program, "/bin/true"), "utf-8")
    done = subprocess.run(
        ["systemd-analyze", "verify", *map(str, copies)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    about_it = [line for line in done.stderr.splitlines() if UNIT.stem in line]
    assert (done.returncode, about_it) == (0, [])


def test_the_unit_starts_the_server(configured: Configure, tmp_path: Path) -> None:
    assert [(section, key) for section, key, _ in unit() if key == "ExecStart"] == [("Service", "ExecStart")]
    program, *arguments = shlex.split(values("ExecStart")[0])
    assert program.endswith("/bin/qwenvl")
    [credential] = values("LoadCredential")
    (tmp_path / credential.split(":")[0]).write_text("key")
    environment = {}
    for assignment in values("Environment"):
        name, _, value = assignment.partition("=")
        environment[name] = value.replace("%d", str(tmp_path)).replace("%C", "/var/cache")
    settings = configured(["qwenvl", *arguments], environment)
    assert Path(settings["api_key_file"]).is_file()
    assert environment[env.CACHE_DIR.name] == f"/var/cache/{values('CacheDirectory')[0]}"


def test_the_unit_lets_requests_end() -> None:
    # All that shutdown_timeout does not cover: see Server.shutdown and run.
    ending = 4 * server._LAST_SECONDS + server._CLEANING_SECONDS + server._HANDSHAKE_SECONDS
    assert int(values("TimeoutStopSec")[0]) > ServeSettings().shutdown_timeout + ending
    # The engine process ends at SIGTERM even during a computation: only the front may get it.
    assert (values("KillSignal"), values("KillMode")) == (["SIGTERM"], ["mixed"])
    # Else systemd would stop the front as well.
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
def test_the_unit_may_do_little(key: str, value: str) -> None:
    assert values(key) == [value]


# The image


class Instruction(NamedTuple):
    name: str
    rest: str

    @property
    def words(self) -> list[str]:
        """The words of an exec form."""
        words: list[str] = json.loads(self.rest)
        return words


def instructions() -> list[Instruction]:
    lines = [line for line in DOCKERFILE.read_text("utf-8").splitlines() if not line.startswith("#")]
    joined = "\n".join(lines).replace("\\\n", " ")
    return [Instruction(*line.split(maxsplit=1)) for line in joined.splitlines() if line.strip()]


def all_of(name: str) -> list[Instruction]:
    return [each for each in instructions() if each.name == name]


def copied() -> Iterator[str]:
    for instruction in all_of("COPY"):
        *sources, _ = instruction.rest.split()
        if not sources[0].startswith("--from="):
            yield from sources


def test_instructions_are_those_of_docker() -> None:
    known = {"FROM", "RUN", "WORKDIR", "COPY", "ARG", "USER", "ENV", "VOLUME", "EXPOSE", "STOPSIGNAL"}
    assert {each.name for each in instructions()} <= known | {"HEALTHCHECK", "ENTRYPOINT", "CMD"}
    assert instructions()[0].name == "FROM"
    for name in ("ENTRYPOINT", "CMD", "VOLUME"):
        assert all(isinstance(word, str) for word in all_of(name)[0].words)


def test_the_image_is_built_from_existing_files(tmp_path: Path) -> None:
    """The copied files suffice to build a wheel, and the ignore file excludes none of them."""
    ignored = DOCKERFILE.with_name("Dockerfile.dockerignore").read_text("utf-8").split()
    for name in copied():
        assert f"!{name}" in ignored
        source = REPO / name
        if source.is_dir():
            shutil.copytree(source, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copyfile(source, tmp_path / name)
    assert (tmp_path / "tools" / "release_wheel.py").is_file()
    done = subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", "out"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    [wheel] = (tmp_path / "out").glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    # What hatchling passes over if it is not there.
    for part in ("engine/csrc", "upstream/patches_data", "recipes/shipped", "serve/page", "demo/model"):
        assert any(name.startswith(f"paddlemix_qwenvl_plugin/{part}/") for name in names), part
    assert "_qwenvl_activate.py" in names


@pytest.mark.parametrize(("device", "wanted"), [("cpu", ["serve"]), ("gpu", ["serve", "gpu-engine"])])
def test_the_build_argument(device: str, wanted: list[str], configured: Configure) -> None:
    """The argument chooses extras that exist, and the container serves the volume's stages on that device."""
    [install] = [each.rest for each in all_of("RUN") if "case" in each.rest]
    choice = install[: install.index("esac") + 4]
    chosen = subprocess.run(
        ["sh", "-c", f'{choice}; echo "$extras"'],
        env={"DEVICE": device},
        capture_output=True,
        text=True,
        check=True,
    )
    assert chosen.stdout.strip().split(",") == wanted
    project = (REPO / "pyproject.toml").read_text("utf-8")
    assert all(re.search(rf"^{extra} = \[$", project, re.MULTILINE) for extra in wanted)

    [variables] = all_of("ENV")
    environment = dict(
        word.replace("$DEVICE", device).split("=", 1) for word in shlex.split(variables.rest) if "=" in word
    )
    for name in environment:
        if name.startswith(ENVIRONMENT_PREFIX):
            assert name[len(ENVIRONMENT_PREFIX) :].lower() in ServeSettings.model_fields
    settings = configured([*all_of("ENTRYPOINT")[0].words, *all_of("CMD")[0].words], environment)
    assert (settings["device"], settings["host"]) == (device, "0.0.0.0")
    volumes = all_of("VOLUME")[0].words
    assert all(
        settings[name].startswith(f"{volumes[0]}/") for name in ("first_model_path", "second_model_path")
    )
    assert environment[env.CACHE_DIR.name] == volumes[1]
    assert all_of("EXPOSE")[0].rest == str(settings["port"])


def test_another_build_argument_ends_the_build() -> None:
    [install] = [each.rest for each in all_of("RUN") if "case" in each.rest]
    choice = install[: install.index("esac") + 4]
    assert subprocess.run(["sh", "-c", choice], env={"DEVICE": "tpu"}, check=False).returncode == 1


def test_the_image_is_not_root_and_is_asked_how_it_is() -> None:
    names = [each.name for each in instructions()]
    assert all_of("USER")[0].rest == "qwenvl"
    assert names.index("USER") < names.index("ENTRYPOINT")
    [health] = all_of("HEALTHCHECK")
    command: list[str] = json.loads(health.rest[health.rest.index("CMD") + 4 :])
    assert "/health/live" in command[-1]
    compile(command[-1], "HEALTHCHECK", "exec")
    assert "/health/live" in fake_app(fake_service()).openapi()["paths"]


# The dashboard


def families() -> dict[str, Metric]:
    """Metric families of GET /metrics, by the names in queries."""
    service = fake_service()
    fake_app(service)
    found = {}
    for family in service.metrics.registry.collect():
        endings = {"counter": ["_total"], "histogram": ["_bucket", "_sum", "_count"]}.get(family.type, [""])
        found.update({family.name + ending: family for ending in endings})
    return found


def queries() -> list[str]:
    panels = json.loads(DASHBOARD.read_text("utf-8"))["panels"]
    return [target["expr"] for panel in panels for target in panel["targets"]]


@pytest.mark.parametrize("query", queries())
def test_queries(query: str) -> None:
    known = families()
    labels = {"path", "status", "kind", "le", "instance"}
    for one in series(query):
        assert one.name in known
        assert set(one.labels) <= labels
        # A counter says nothing, only how fast it grows.
        assert one.ranged == (known[one.name].type in ("counter", "histogram"))


@pytest.mark.parametrize(
    "query", ["sum(", "rate(a_total)", "a b", "sum by (x (a)", 'a{b="c}', "nothing_such(a)", "a[5 m]", ""]
)
def test_the_parser_refuses(query: str) -> None:
    with pytest.raises(ValueError, match=r".+"):
        series(query)


def test_every_metric_of_the_server_is_on_the_dashboard() -> None:
    asked = {one.name for query in queries() for one in series(query)}
    for name, family in families().items():
        if name.startswith("qwenvl_") and not name.endswith(("_sum", "_count")):
            assert name in asked, family.documentation


def test_panels_do_not_overlap() -> None:
    panels = json.loads(DASHBOARD.read_text("utf-8"))["panels"]
    taken = set()
    for panel in panels:
        at = panel["gridPos"]
        assert at["x"] + at["w"] <= 24
        for x in range(at["x"], at["x"] + at["w"]):
            for y in range(at["y"], at["y"] + at["h"]):
                assert (x, y) not in taken
                taken.add((x, y))
    assert len({panel["id"] for panel in panels}) == len(panels)
