"""deploy/kuberay: KubeRay's resources, what they run, and the image they run it in."""

from __future__ import annotations

import importlib
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from deploy_documents import DEPLOY, accepted, documents
from pydantic import ValidationError
from yaml import safe_dump, safe_load

REASON = "pip install 'paddlemix-qwenvl-plugin[dev,ray]'"
pytest.importorskip("kubernetes_validate", reason=REASON)
pytest.importorskip("ray.serve.schema", reason=REASON)

from deploy_kuberay import RESOURCES, serve_config  # noqa: E402
from deploy_schema import ValidationError as SchemaError  # noqa: E402
from deploy_schema import validate_kubernetes  # noqa: E402

from paddlemix_qwenvl_plugin.cluster.serve.replicas import front_cpus, max_fronts  # noqa: E402
from paddlemix_qwenvl_plugin.serve.settings import ServeSettings  # noqa: E402

FILES = ["kuberay/cluster.yaml", "kuberay/batch.yaml", "kuberay/service.yaml"]
INVALID = (ValidationError, SchemaError, AssertionError)


def resource(path: str) -> dict[str, Any]:
    [document] = documents(path)
    return document


def validate(document: dict[str, Any]) -> None:
    kind = next(value for key, value in document.items() if key.startswith("kind"))
    RESOURCES[kind].model_validate(document)


def cluster(document: dict[str, Any]) -> dict[str, Any]:
    spec = document["spec"]
    found: dict[str, Any] = spec.get("rayClusterSpec") or spec.get("rayClusterConfig") or spec
    return found


def groups(document: dict[str, Any]) -> list[dict[str, Any]]:
    return [cluster(document)["headGroupSpec"], *cluster(document)["workerGroupSpecs"]]


@pytest.mark.parametrize("path", FILES)
def test_it_fits_the_schema(path: str) -> None:
    validate(resource(path))


@pytest.mark.parametrize("path", FILES)
def test_a_misspelt_key_is_found(path: str) -> None:
    assert accepted(validate, resource(path), INVALID) == []


def test_a_misspelt_key_of_serve_is_found() -> None:
    text = resource("kuberay/service.yaml")["spec"]["serveConfigV2"]
    errors = (ValidationError, KeyError, AssertionError)
    assert accepted(lambda changed: serve_config(safe_dump(changed)), safe_load(text), errors) == []


def test_redis_fits_the_schema() -> None:
    for document in documents("kuberay/redis.yaml"):
        validate_kubernetes(document)
    service, stateful = documents("kuberay/redis.yaml")
    options = cluster(resource("kuberay/service.yaml"))["gcsFaultToleranceOptions"]
    assert options["redisAddress"] == f"{service['metadata']['name']}:{service['spec']['ports'][0]['port']}"
    assert service["spec"]["selector"] == stateful["spec"]["template"]["metadata"]["labels"]
    [environment] = stateful["spec"]["template"]["spec"]["containers"][0]["env"]
    assert environment["valueFrom"] == options["redisPassword"]["valueFrom"]


def test_a_job_has_the_cluster_of_the_cluster() -> None:
    assert cluster(resource("kuberay/batch.yaml")) == cluster(resource("kuberay/cluster.yaml"))


@pytest.mark.parametrize("path", FILES)
def test_every_mount_has_its_volume_and_no_container_is_root(path: str) -> None:
    for group in groups(resource(path)):
        spec = group["template"]["spec"]
        names = {volume["name"] for volume in spec["volumes"]}
        assert spec["securityContext"]["runAsNonRoot"] is True
        for container in spec["containers"]:
            assert {mount["name"] for mount in container["volumeMounts"]} == names
            assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
            assert container["resources"]["limits"]["memory"]


@pytest.mark.parametrize("path", FILES)
def test_no_engine_runs_on_the_head_node(path: str) -> None:
    head, *workers = groups(resource(path))
    assert head["rayStartParams"]["num-cpus"] == "0"
    assert not any("num-cpus" in worker["rayStartParams"] for worker in workers)


def serve_application() -> dict[str, Any]:
    [found] = safe_load(resource("kuberay/service.yaml")["spec"]["serveConfigV2"])["applications"]
    application: dict[str, Any] = found
    return application


def test_the_application_is_built_from_its_arguments(tmp_path: Path) -> None:
    """By the function that the file names, with key file and stages that exist."""
    application = serve_application()
    module, _, name = application["import_path"].partition(":")
    build = getattr(importlib.import_module(module), name)
    keys = tmp_path / "api_keys"
    keys.write_text("key")
    built = build({**application["args"], "api_key_file": str(keys)})
    deployments = {built._bound_deployment.name: built._bound_deployment}
    for argument in built._bound_deployment.init_args:
        if hasattr(argument, "_bound_deployment"):
            deployments[argument._bound_deployment.name] = argument._bound_deployment
    assert set(deployments) == {"Front", "Engine"}
    engine = deployments["Engine"]
    assert engine.ray_actor_options["num_gpus"] == 1
    assert engine.ray_actor_options["num_cpus"] == application["args"]["replica_cpus"]


def test_a_node_holds_its_deployments() -> None:
    """An engine and three fronts fit on a worker, and the workers suffice for the most replicas."""
    document = resource("kuberay/service.yaml")
    settings = ServeSettings(**serve_application()["args"])
    [worker] = cluster(document)["workerGroupSpecs"]
    limits = worker["template"]["spec"]["containers"][0]["resources"]["limits"]
    cpus = settings.replica_cpus + 3 * front_cpus(settings)
    assert cpus < int(limits["cpu"])
    assert (settings.min_replicas, settings.max_replicas) == (worker["minReplicas"], worker["maxReplicas"])
    assert settings.min_fronts <= 3 * worker["minReplicas"]
    assert max_fronts(settings) <= 3 * worker["maxReplicas"]
    # The old cluster lives on until its last request has ended.
    longest = settings.waiting_timeout + settings.running_timeout
    assert document["spec"]["rayClusterDeletionDelaySeconds"] > longest


# The image


def instructions() -> list[tuple[str, str]]:
    text = (DEPLOY / "docker" / "Dockerfile.ray").read_text("utf-8")
    joined = "\n".join(line for line in text.splitlines() if not line.startswith("#")).replace("\\\n", " ")
    found = []
    for line in filter(str.strip, joined.splitlines()):
        name, rest = line.split(maxsplit=1)
        found.append((name, rest))
    return found


def test_the_image() -> None:
    found = instructions()
    assert {name for name, _ in found} <= {
        *("ARG", "FROM", "USER", "RUN", "ENV", "EXPOSE", "HEALTHCHECK", "ENTRYPOINT", "CMD")
    }
    assert [rest for name, rest in found if name == "USER"][-1] == "qwenvl"
    arguments = dict(rest.split("=", 1) for name, rest in found if name == "ARG")
    assert [rest for name, rest in found if name == "FROM"] == ["$BASE"]
    assert f"-t {arguments['BASE']} ." in (DEPLOY / "docker" / "Dockerfile").read_text("utf-8")
    for path in FILES:
        assert cluster(resource(path))["rayVersion"] == arguments["RAY"], path
    extras = re.search(r"paddlemix-qwenvl-plugin\[(\w+)\]", " ".join(rest for _, rest in found))
    project = (DEPLOY.parent / "pyproject.toml").read_text("utf-8")
    assert extras
    assert re.search(rf"^{extras[1]} = \[$", project, re.MULTILINE)


def test_the_job_is_a_command_of_the_project() -> None:
    """The head of cluster.yaml and the entrypoint of batch.yaml: the same command, with existing flags."""
    import typer.main

    from paddlemix_qwenvl_plugin.cli.main import app

    batch: Any = typer.main.get_command(app)
    batch = batch.commands["batch"]
    known = {name for parameter in batch.params for name in parameter.opts}
    words = shlex.split(resource("kuberay/batch.yaml")["spec"]["entrypoint"])
    assert words[:2] == ["qwenvl", "batch"]
    assert {word for word in words if word.startswith("--")} <= known
    head = (DEPLOY / "kuberay" / "cluster.yaml").read_text("utf-8").split("\napiVersion")[0]
    typed = head.replace("#", "").replace("\\\n", " ").split(" -- ", 1)[1]
    assert shlex.split(typed.split("\n\n")[0].split("\n \n")[0])[: len(words)] == words
