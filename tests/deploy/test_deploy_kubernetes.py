"""Files in deploy/kubernetes: valid for Kubernetes, and consistent with the server's settings and endpoints."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from deploy_documents import DEPLOY, documents, undetected_misspellings
from yaml import safe_load_all

pytest.importorskip("kubernetes_validate", reason="pip install 'paddlemix-qwenvl-plugin[dev]'")

from deploy_schema import ValidationError, validate_kubernetes

from paddlemix_qwenvl_plugin.serve import server
from paddlemix_qwenvl_plugin.serve.metrics import slot_metrics
from paddlemix_qwenvl_plugin.serve.operations import HEALTH_PATHS
from paddlemix_qwenvl_plugin.serve.settings import ENVIRONMENT_PREFIX, ServeSettings

FOLDER = DEPLOY / "kubernetes"
FILES = sorted(
    str(path.relative_to(DEPLOY)) for path in FOLDER.rglob("*.yaml") if path.name != "kustomization.yaml"
)


def resource(name: str) -> Any:
    """Read the resource in a file of the variant for CPUs."""
    [document] = documents(f"kubernetes/cpu/{name}.yaml")
    return document


def container() -> Any:
    [server_container] = resource("deployment")["spec"]["template"]["spec"]["containers"]
    return server_container


@pytest.mark.parametrize("path", FILES)
def test_resources_are_valid(path: str) -> None:
    for document in documents(path):
        # gpu/deployment.yaml patches cpu/deployment.yaml: test_kustomize_builds_the_resources validates the result.
        if path != "kubernetes/gpu/deployment.yaml":
            validate_kubernetes(document)


@pytest.mark.parametrize("path", [path for path in FILES if "/cpu/" in path])
def test_a_misspelt_key_is_found(path: str) -> None:
    for document in documents(path):
        # The selector of a Service consists of labels.
        maps_with_user_keys = {"labels", "limits", "matchLabels", "requests", "selector"}
        errors = (ValidationError, KeyError)
        assert undetected_misspellings(validate_kubernetes, document, errors, maps_with_user_keys) == []


@pytest.mark.parametrize("device", ["cpu", "gpu"])
def test_kustomize_builds_the_resources(device: str, tmp_path: Path) -> None:
    if shutil.which("kubectl") is None:
        pytest.skip("no kubectl")
    shutil.copytree(FOLDER, tmp_path / "kubernetes")
    (tmp_path / "kubernetes" / "cpu" / "api_keys").write_text("key")
    completed = subprocess.run(
        ["kubectl", "kustomize", str(tmp_path / "kubernetes" / device)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert completed.returncode == 0, completed.stderr
    resources = {document["kind"]: document for document in safe_load_all(completed.stdout)}
    for document in resources.values():
        validate_kubernetes(document)
    secret = resources["Secret"]["metadata"]["name"]
    pod = resources["Deployment"]["spec"]["template"]["spec"]
    assert secret in [volume.get("secret", {}).get("secretName") for volume in pod["volumes"]]
    [server_container] = pod["containers"]
    assert server_container["image"].startswith("registry.example.com/qwenvl-serve:")
    assert ("nvidia.com/gpu" in server_container["resources"]["limits"]) == (device == "gpu")
    # The patch of the variant for GPUs keeps other fields, such as the probes.
    assert server_container["livenessProbe"] == container()["livenessProbe"]


def test_the_kustomization_lists_all_files() -> None:
    [base] = documents("kubernetes/cpu/kustomization.yaml")
    assert {f"kubernetes/cpu/{name}" for name in base["resources"]} == {
        path for path in FILES if "/cpu/" in path
    }
    # Git ignores the file of the secret, which the user creates.
    [generated] = base["secretGenerator"]
    assert [f"/{name}" for name in generated["files"]] == (FOLDER / "cpu/.gitignore").read_text(
        "utf-8"
    ).split()
    volumes = resource("deployment")["spec"]["template"]["spec"]["volumes"]
    assert generated["name"] in [volume.get("secret", {}).get("secretName") for volume in volumes]


def test_settings_of_the_server() -> None:
    settings = {
        variable["name"][len(ENVIRONMENT_PREFIX) :].lower(): variable["value"]
        for variable in container()["env"]
    }
    assert set(settings) <= set(ServeSettings.model_fields)
    mounts = {mount["mountPath"] for mount in container()["volumeMounts"]}
    assert str(Path(settings["api_key_file"]).parent) in mounts
    assert container()["ports"][0]["containerPort"] == ServeSettings().port
    # For a service named qwenvl-serve, Kubernetes would set QWENVL_SERVE_… variables, which the server would reject.
    assert resource("deployment")["spec"]["template"]["spec"]["enableServiceLinks"] is False


def test_the_grace_period_of_the_pod_is_longer_than_a_shutdown() -> None:
    [command, seconds] = container()["lifecycle"]["preStop"]["exec"]["command"]
    assert command == "sleep"
    variables = {variable["name"]: variable["value"] for variable in container()["env"]}
    shutdown_timeout = float(variables["QWENVL_SERVE_SHUTDOWN_TIMEOUT"])
    # After shutdown_timeout, serve/server.py waits at most _STEP_TIMEOUT_SECONDS for each of four: the engine process,
    # the handlers, the engine process again, and the image processes; and _CLEANUP_SECONDS for aborted handlers.
    other_timeouts = 4 * server._STEP_TIMEOUT_SECONDS + server._CLEANUP_SECONDS
    grace_period = resource("deployment")["spec"]["template"]["spec"]["terminationGracePeriodSeconds"]
    assert grace_period > int(seconds) + shutdown_timeout + other_timeouts


def test_probes_request_the_health_endpoints() -> None:
    for probe, path in (("livenessProbe", "/health/live"), ("readinessProbe", "/health/ready")):
        assert container()[probe]["httpGet"] == {"path": path, "port": "http"}
        assert path in HEALTH_PATHS


def test_all_resources_select_the_pods_of_the_deployment() -> None:
    labels = resource("deployment")["spec"]["template"]["metadata"]["labels"]
    assert resource("deployment")["spec"]["selector"]["matchLabels"] == labels
    assert resource("service")["spec"]["selector"] == labels
    assert resource("disruption")["spec"]["selector"]["matchLabels"] == labels
    target = resource("autoscaler")["spec"]["scaleTargetRef"]
    assert (target["kind"], target["name"]) == ("Deployment", resource("deployment")["metadata"]["name"])
    # A disruption budget of 0 would prevent the drain of a node.
    assert resource("disruption")["spec"]["maxUnavailable"] >= 1
    assert resource("autoscaler")["spec"]["minReplicas"] >= 2


def test_the_autoscaler_reads_a_metric_of_the_server() -> None:
    [metric] = resource("autoscaler")["spec"]["metrics"]
    assert metric["pods"]["metric"]["name"] in [slot_metric.name for slot_metric in slot_metrics(0, 0)]
    assert int(metric["pods"]["target"]["averageValue"]) < ServeSettings().max_running
