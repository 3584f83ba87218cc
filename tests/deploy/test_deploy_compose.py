"""deploy/compose: the Compose specification, Prometheus and Grafana, and how they fit together."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from deploy_compose import MODELS
from deploy_documents import DEPLOY, accepted, documents, misspelt
from pydantic import ValidationError
from yaml import safe_dump

from paddlemix_qwenvl_plugin.serve import server
from paddlemix_qwenvl_plugin.serve.settings import ENVIRONMENT_PREFIX, ServeSettings

FILES = ["compose/compose.yaml", "compose/gpu.yaml"]
FOLDER = DEPLOY / "compose"


def services() -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = documents("compose/compose.yaml")[0]["services"]
    return found


def invalid(paths: list[Path]) -> set[str]:
    """The files that do not fit the schema of the Compose specification, by check-jsonschema."""
    pytest.importorskip("check_jsonschema", reason="pip install 'paddlemix-qwenvl-plugin[dev]'")
    command = [
        sys.executable,
        "-m",
        "check_jsonschema",
        "--builtin-schema",
        "vendor.compose-spec",
        "-o",
        "json",
    ]
    done = subprocess.run(
        [*command, *map(str, paths)], capture_output=True, text=True, timeout=60, check=False
    )
    report = json.loads(done.stdout)
    assert not report.get("parse_errors"), report
    return {error["filename"] for error in report.get("errors", [])}


def test_the_files_fit_the_specification() -> None:
    assert invalid([DEPLOY / path for path in FILES]) == set()


@pytest.mark.parametrize("path", FILES)
def test_a_misspelt_key_is_found(path: str, tmp_path: Path) -> None:
    [document] = documents(path)
    # Names of services, volumes, variables and build arguments are free.
    free = {"services", "volumes", "secrets", "environment", "args"}
    changed = {
        str(tmp_path / f"{number}.yaml"): (key, value)
        for number, (key, value) in enumerate(misspelt(document, free))
    }
    for name, (_, value) in changed.items():
        Path(name).write_text(safe_dump(value), "utf-8")
    missed = [changed[name][0] for name in set(changed) - invalid([Path(name) for name in changed])]
    assert not missed
    assert len(changed) >= 7


@pytest.mark.parametrize("path", MODELS)
def test_the_models(path: str) -> None:
    [document] = documents(path)
    MODELS[path].model_validate(document)
    assert accepted(MODELS[path].model_validate, document, (ValidationError,)) == []


def test_mounted_files_exist() -> None:
    for service in services().values():
        for mount in service["volumes"]:
            source = mount.split(":")[0] if isinstance(mount, str) else mount["source"]
            if source.startswith("."):
                assert (FOLDER / source).is_file(), source
    build = services()["qwenvl"]["build"]
    assert (FOLDER / build["context"] / build["dockerfile"]).is_file()
    # Keys are not in Git.
    secrets = documents("compose/compose.yaml")[0]["secrets"].values()
    ignored = (FOLDER / ".gitignore").read_text("utf-8").split()
    assert ignored == [f"/{secret['file']}" for secret in secrets]


def test_the_server_gets_its_settings_and_its_time() -> None:
    service = services()["qwenvl"]
    for name in service["environment"]:
        assert name[len(ENVIRONMENT_PREFIX) :].lower() in ServeSettings.model_fields
    ending = 4 * server._LAST_SECONDS + server._CLEANING_SECONDS + server._HANDSHAKE_SECONDS
    grace = int(service["stop_grace_period"].rstrip("s"))
    assert grace > ServeSettings().shutdown_timeout + ending
    [published] = service["ports"]
    assert published.endswith(f":{ServeSettings().port}")


def test_prometheus_reaches_the_server_and_grafana_prometheus() -> None:
    [scrape] = documents("compose/prometheus.yaml")[0]["scrape_configs"]
    [static] = scrape["static_configs"]
    assert static["targets"] == [f"qwenvl:{ServeSettings().port}"]
    [secret] = services()["prometheus"]["secrets"]
    assert scrape["authorization"]["credentials_file"] == f"/run/secrets/{secret}"
    [source] = documents("compose/grafana/datasources.yaml")[0]["datasources"]
    assert source["url"] == "http://prometheus:9090"
    [provider] = documents("compose/grafana/dashboards.yaml")[0]["providers"]
    assert any(
        mount.split(":")[1].startswith(provider["options"]["path"])
        and mount.split(":")[0].endswith("grafana/qwenvl.json")
        for mount in services()["grafana"]["volumes"]
    )


def test_nothing_listens_beyond_this_machine() -> None:
    for service in services().values():
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", []))
