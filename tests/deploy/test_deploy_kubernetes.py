"""deploy/kubernetes: the schemas of Kubernetes, and the server's behaviour."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from deploy_documents import DEPLOY, accepted, documents
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


def only(name: str) -> Any:
    [document] = documents(f"kubernetes/cpu/{name}.yaml")
    return document


def container() -> Any:
    [found] = only("deployment")["spec"]["template"]["spec"]["containers"]
    return found


@pytest.mark.parametrize("path", FILES)
def test_it_fits_the_schema(path: str) -> None:
    for document in documents(path):
        if path != "kubernetes/gpu/deployment.yaml":  # a patch of another file: kustomize tests it below
            validate_kubernetes(document)


@pytest.mark.parametrize("path", [path for path in FILES if "/cpu/" in path])
def test_a_misspelt_key_is_found(path: str) -> None:
    for document in documents(path):
        # A misspelt selector key of the Service is a label like any other.
        free = {"labels", "limits", "matchLabels", "requests", "selector"}
        found = accepted(validate_kubernetes, document, (ValidationError, KeyError), free)
        assert found == []


@pytest.mark.parametrize("device", ["cpu", "gpu"])
def test_kustomize_builds_it(device: str, tmp_path: Path) -> None:
    if shutil.which("kubectl") is None:
        pytest.skip("no kubectl")
    shutil.copytree(FOLDER, tmp_path / "kubernetes")
    (tmp_path / "kubernetes" / "cpu" / "api_keys").write_text("key")
    done = subprocess.run(
        ["kubectl", "kustomize", str(tmp_path / "kubernetes" / device)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    built = {document["kind"]: document for document in safe_load_all(done.stdout)}
    for document in built.values():
        validate_kubernetes(document)
    secret = built["Secret"]["metadata"]["name"]
    pod = built["Deployment"]["spec"]["template"]["spec"]
    assert secret in [volume.get("secret", {}).get("secretName") for volume in pod["volumes"]]
    [one] = pod["containers"]
    assert one["image"].startswith("registry.example.com/qwenvl-serve:")
    assert ("nvidia.com/gpu" in one["resources"]["limits"]) == (device == "gpu")
    assert one["livenessProbe"] == container()["livenessProbe"]  # the patch keeps the rest


def test_the_kustomization_lists_the_files() -> None:
    [base] = documents("kubernetes/cpu/kustomization.yaml")
    assert {f"kubernetes/cpu/{name}" for name in base["resources"]} == {
        path for path in FILES if "/cpu/" in path
    }
    [generated] = base["secretGenerator"]
    assert [f"/{name}" for name in generated["files"]] == (FOLDER / "cpu/.gitignore").read_text(
        "utf-8"
    ).split()
    volumes = only("deployment")["spec"]["template"]["spec"]["volumes"]
    assert generated["name"] in [volume.get("secret", {}).get("secretName") for volume in volumes]


def test_settings_exist_and_fit() -> None:
    settings = {each["name"][len(ENVIRONMENT_PREFIX) :].lower(): each["value"] for each in container()["env"]}
    assert set(settings) <= set(ServeSettings.model_fields)
    path = Path(settings["api_key_file"])
    mounts = {mount["mountPath"] for mount in container()["volumeMounts"]}
    assert str(path.parent) in mounts
    assert container()["ports"][0]["containerPort"] == ServeSettings().port
    # Kubernetes would set QWENVL_SERVE_… variables for a service of such a name.
    assert only("deployment")["spec"]["template"]["spec"]["enableServiceLinks"] is False


def test_requests_end_before_the_pod() -> None:
    ending = 4 * server._LAST_SECONDS + server._CLEANING_SECONDS + server._HANDSHAKE_SECONDS
    [sleep, seconds] = container()["lifecycle"]["preStop"]["exec"]["command"]
    assert sleep == "sleep"
    shutdown = float(
        {each["name"]: each["value"] for each in container()["env"]}["QWENVL_SERVE_SHUTDOWN_TIMEOUT"]
    )
    grace = only("deployment")["spec"]["template"]["spec"]["terminationGracePeriodSeconds"]
    assert grace > int(seconds) + shutdown + ending


def test_probes_ask_the_health_endpoints() -> None:
    for probe, path in (("livenessProbe", "/health/live"), ("readinessProbe", "/health/ready")):
        assert container()[probe]["httpGet"] == {"path": path, "port": "http"}
        assert path in HEALTH_PATHS


def test_all_select_the_pods() -> None:
    labels = only("deployment")["spec"]["template"]["metadata"]["labels"]
    assert only("deployment")["spec"]["selector"]["matchLabels"] == labels
    assert only("service")["spec"]["selector"] == labels
    assert only("disruption")["spec"]["selector"]["matchLabels"] == labels
    target = only("autoscaler")["spec"]["scaleTargetRef"]
    assert (target["kind"], target["name"]) == ("Deployment", only("deployment")["metadata"]["name"])
    # A budget that allows nothing would block the drain of a node for ever.
    assert only("disruption")["spec"]["maxUnavailable"] >= 1
    assert only("autoscaler")["spec"]["minReplicas"] >= 2


def test_the_autoscaler_reads_a_metric_of_the_server() -> None:
    [metric] = only("autoscaler")["spec"]["metrics"]
    names = [each.name for each in slot_metrics(0, 0)]
    assert metric["pods"]["metric"]["name"] in names
    assert int(metric["pods"]["target"]["averageValue"]) < ServeSettings().max_running
