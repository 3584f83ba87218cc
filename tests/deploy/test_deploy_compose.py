"""Files in deploy/compose: valid for Compose, Prometheus and Grafana, consistent with each other and the server."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from deploy_compose import MODELS
from deploy_documents import DEPLOY, documents, misspellings, undetected_misspellings
from pydantic import ValidationError
from yaml import safe_dump

from paddlemix_qwenvl_plugin.serve import server
from paddlemix_qwenvl_plugin.serve.settings import ENVIRONMENT_PREFIX, ServeSettings

COMPOSE_FILES = ["compose/compose.yaml", "compose/gpu.yaml"]
FOLDER = DEPLOY / "compose"


def services() -> dict[str, dict[str, Any]]:
    services: dict[str, dict[str, Any]] = documents("compose/compose.yaml")[0]["services"]
    return services


def invalid_files(paths: list[Path]) -> set[str]:
    """Check files with check-jsonschema; return those that violate the schema of the Compose specification."""
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
    completed = subprocess.run(
        [*command, *map(str, paths)], capture_output=True, text=True, timeout=60, check=False
    )
    report = json.loads(completed.stdout)
    assert not report.get("parse_errors"), report
    return {error["filename"] for error in report.get("errors", [])}


def test_the_files_are_valid_for_compose() -> None:
    assert invalid_files([DEPLOY / path for path in COMPOSE_FILES]) == set()


@pytest.mark.parametrize("path", COMPOSE_FILES)
def test_a_misspelt_key_is_found(path: str, tmp_path: Path) -> None:
    [document] = documents(path)
    # The names of services, volumes, secrets, variables and build arguments.
    maps_with_user_keys = {"services", "volumes", "secrets", "environment", "args"}
    key_paths = {}
    for number, (key_path, variant) in enumerate(misspellings(document, maps_with_user_keys)):
        file = tmp_path / f"{number}.yaml"
        file.write_text(safe_dump(variant), "utf-8")
        key_paths[str(file)] = key_path
    valid_files = set(key_paths) - invalid_files([Path(name) for name in key_paths])
    assert [key_paths[name] for name in valid_files] == []
    assert len(key_paths) >= 7


@pytest.mark.parametrize("path", MODELS)
def test_the_models_fit_the_file_and_reject_misspelt_keys(path: str) -> None:
    [document] = documents(path)
    MODELS[path].model_validate(document)
    assert undetected_misspellings(MODELS[path].model_validate, document, (ValidationError,)) == []


def test_mounted_files_exist() -> None:
    for service in services().values():
        for mount in service["volumes"]:
            source = mount.split(":")[0] if isinstance(mount, str) else mount["source"]
            if source.startswith("."):
                assert (FOLDER / source).is_file(), source
    build = services()["qwenvl"]["build"]
    assert (FOLDER / build["context"] / build["dockerfile"]).is_file()
    # Git ignores the files with keys.
    secrets = documents("compose/compose.yaml")[0]["secrets"].values()
    ignored = (FOLDER / ".gitignore").read_text("utf-8").split()
    assert ignored == [f"/{secret['file']}" for secret in secrets]


def test_settings_stop_grace_period_and_port_of_the_server() -> None:
    service = services()["qwenvl"]
    for name in service["environment"]:
        assert name[len(ENVIRONMENT_PREFIX) :].lower() in ServeSettings.model_fields
    # After shutdown_timeout, serve/server.py waits at most _STEP_TIMEOUT_SECONDS for each of four: the engine process,
    # the handlers, the engine process again, and the image processes; and _CLEANUP_SECONDS for aborted handlers.
    # _HANDSHAKE_SECONDS, a part of shutdown_timeout, is added as a margin.
    other_timeouts = 4 * server._STEP_TIMEOUT_SECONDS + server._CLEANUP_SECONDS + server._HANDSHAKE_SECONDS
    grace_period = int(service["stop_grace_period"].rstrip("s"))
    assert grace_period > ServeSettings().shutdown_timeout + other_timeouts
    [port] = service["ports"]
    assert port.endswith(f":{ServeSettings().port}")


def test_addresses_of_the_server_and_of_prometheus() -> None:
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


def test_ports_are_open_on_this_machine_only() -> None:
    for service in services().values():
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", []))
