"""Files in deploy/kuberay: valid for KubeRay, and consistent with the commands of the project and the Ray image."""

from __future__ import annotations

import importlib
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from deploy_documents import DEPLOY, documents, undetected_misspellings
from pydantic import ValidationError
from yaml import safe_dump, safe_load

REASON = "pip install 'paddlemix-qwenvl-plugin[dev,ray]'"
pytest.importorskip("kubernetes_validate", reason=REASON)
pytest.importorskip("ray.serve.schema", reason=REASON)

from deploy_kuberay import RESOURCES, check_serve_config  # noqa: E402
from deploy_schema import ValidationError as SchemaError  # noqa: E402
from deploy_schema import validate_kubernetes  # noqa: E402

from paddlemix_qwenvl_plugin.cluster.serve.replicas import front_cpus, max_fronts  # noqa: E402
from paddlemix_qwenvl_plugin.serve.settings import ServeSettings  # noqa: E402

RESOURCE_FILES = ["kuberay/cluster.yaml", "kuberay/batch.yaml", "kuberay/service.yaml"]
VALIDATION_ERRORS = (ValidationError, SchemaError, AssertionError)


def resource(path: str) -> dict[str, Any]:
    [document] = documents(path)
    return document


def validate(document: dict[str, Any]) -> None:
    # The key of the kind may be misspelt, as "kindx".
    kind = next(value for key, value in document.items() if key.startswith("kind"))
    RESOURCES[kind].model_validate(document)


def cluster_spec(document: dict[str, Any]) -> dict[str, Any]:
    """Return the cluster's specification in a RayJob, a RayService or a RayCluster."""
    spec = document["spec"]
    cluster: dict[str, Any] = spec.get("rayClusterSpec") or spec.get("rayClusterConfig") or spec
    return cluster


def node_groups(document: dict[str, Any]) -> list[dict[str, Any]]:
    """List the head group and the worker groups of the cluster in a resource."""
    cluster = cluster_spec(document)
    return [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]


@pytest.mark.parametrize("path", RESOURCE_FILES)
def test_resources_are_valid(path: str) -> None:
    validate(resource(path))


@pytest.mark.parametrize("path", RESOURCE_FILES)
def test_a_misspelt_key_is_found(path: str) -> None:
    assert undetected_misspellings(validate, resource(path), VALIDATION_ERRORS) == []


def test_a_misspelt_key_of_the_serve_configuration_is_found() -> None:
    def check(document: dict[str, Any]) -> None:
        check_serve_config(safe_dump(document))

    configuration = safe_load(resource("kuberay/service.yaml")["spec"]["serveConfigV2"])
    errors = (ValidationError, KeyError, AssertionError)
    assert undetected_misspellings(check, configuration, errors) == []


def test_redis_is_valid_and_has_the_address_and_password_of_the_cluster() -> None:
    for document in documents("kuberay/redis.yaml"):
        validate_kubernetes(document)
    service, stateful_set = documents("kuberay/redis.yaml")
    options = cluster_spec(resource("kuberay/service.yaml"))["gcsFaultToleranceOptions"]
    assert options["redisAddress"] == f"{service['metadata']['name']}:{service['spec']['ports'][0]['port']}"
    assert service["spec"]["selector"] == stateful_set["spec"]["template"]["metadata"]["labels"]
    [password] = stateful_set["spec"]["template"]["spec"]["containers"][0]["env"]
    assert password["valueFrom"] == options["redisPassword"]["valueFrom"]


def test_the_job_and_the_cluster_have_the_same_cluster_specification() -> None:
    job, cluster = resource("kuberay/batch.yaml"), resource("kuberay/cluster.yaml")
    assert cluster_spec(job) == cluster_spec(cluster)


@pytest.mark.parametrize("path", RESOURCE_FILES)
def test_every_container_mounts_all_volumes_and_is_not_root(path: str) -> None:
    for group in node_groups(resource(path)):
        spec = group["template"]["spec"]
        volumes = {volume["name"] for volume in spec["volumes"]}
        assert spec["securityContext"]["runAsNonRoot"] is True
        for container in spec["containers"]:
            assert {mount["name"] for mount in container["volumeMounts"]} == volumes
            assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
            assert container["resources"]["limits"]["memory"]


@pytest.mark.parametrize("path", RESOURCE_FILES)
def test_no_engine_runs_on_the_head_node(path: str) -> None:
    head, *workers = node_groups(resource(path))
    assert head["rayStartParams"]["num-cpus"] == "0"
    assert not any("num-cpus" in worker["rayStartParams"] for worker in workers)


def serve_application() -> dict[str, Any]:
    applications = safe_load(resource("kuberay/service.yaml")["spec"]["serveConfigV2"])["applications"]
    assert len(applications) == 1
    application: dict[str, Any] = applications[0]
    return application


def test_the_application_is_built_from_its_arguments(tmp_path: Path) -> None:
    """The function in `import_path` builds the application from `args`, with a key file that exists."""
    configuration = serve_application()
    module, _, name = configuration["import_path"].partition(":")
    build = getattr(importlib.import_module(module), name)
    key_file = tmp_path / "api_keys"
    key_file.write_text("key")
    application = build({**configuration["args"], "api_key_file": str(key_file)})
    front = application._bound_deployment
    deployments = {front.name: front}
    for argument in front.init_args:
        if hasattr(argument, "_bound_deployment"):
            deployments[argument._bound_deployment.name] = argument._bound_deployment
    assert set(deployments) == {"Front", "Engine"}
    engine = deployments["Engine"]
    assert engine.ray_actor_options["num_gpus"] == 1
    assert engine.ray_actor_options["num_cpus"] == configuration["args"]["replica_cpus"]


def test_the_worker_nodes_have_enough_cpus_for_all_replicas() -> None:
    """An engine, three fronts and the HTTP proxy fit on a worker; the workers suffice for all engines and fronts."""
    document = resource("kuberay/service.yaml")
    settings = ServeSettings(**serve_application()["args"])
    [worker] = cluster_spec(document)["workerGroupSpecs"]
    limits = worker["template"]["spec"]["containers"][0]["resources"]["limits"]
    cpus = settings.replica_cpus + 3 * front_cpus(settings)
    assert cpus < int(limits["cpu"])
    assert (settings.min_replicas, settings.max_replicas) == (worker["minReplicas"], worker["maxReplicas"])
    assert settings.min_fronts <= 3 * worker["minReplicas"]
    assert max_fronts(settings) <= 3 * worker["maxReplicas"]
    # After an update, the old cluster is deleted only when its last request has ended.
    max_request_seconds = settings.waiting_timeout + settings.running_timeout
    assert document["spec"]["rayClusterDeletionDelaySeconds"] > max_request_seconds


def dockerfile_instructions() -> list[tuple[str, str]]:
    """Parse Dockerfile.ray into (name, arguments) of its instructions."""
    text = (DEPLOY / "docker" / "Dockerfile.ray").read_text("utf-8")
    without_comments = "\n".join(line for line in text.splitlines() if not line.startswith("#"))
    instructions = []
    for line in without_comments.replace("\\\n", " ").splitlines():
        if line.strip():
            name, arguments = line.split(maxsplit=1)
            instructions.append((name, arguments))
    return instructions


def test_the_ray_image() -> None:
    instructions = dockerfile_instructions()
    assert {name for name, _ in instructions} <= {
        *("ARG", "FROM", "USER", "RUN", "ENV", "EXPOSE", "HEALTHCHECK", "ENTRYPOINT", "CMD")
    }
    assert [user for name, user in instructions if name == "USER"][-1] == "qwenvl"
    build_arguments = dict(assignment.split("=", 1) for name, assignment in instructions if name == "ARG")
    assert [image for name, image in instructions if name == "FROM"] == ["$BASE"]
    # A comment of the other Dockerfile builds the base image under this name.
    assert f"-t {build_arguments['BASE']} ." in (DEPLOY / "docker" / "Dockerfile").read_text("utf-8")
    for path in RESOURCE_FILES:
        assert cluster_spec(resource(path))["rayVersion"] == build_arguments["RAY"], path
    # The extra of the project that the image installs is in pyproject.toml.
    all_arguments = " ".join(arguments for _, arguments in instructions)
    extra = re.search(r"paddlemix-qwenvl-plugin\[(\w+)\]", all_arguments)
    project = (DEPLOY.parent / "pyproject.toml").read_text("utf-8")
    assert extra
    assert re.search(rf"^{extra[1]} = \[$", project, re.MULTILINE)


def test_the_job_is_a_command_of_the_project() -> None:
    """The entrypoint of batch.yaml has existing flags; the command in the comment of cluster.yaml begins with it."""
    import typer.main

    from paddlemix_qwenvl_plugin.cli.main import app

    batch: Any = typer.main.get_command(app)
    batch = batch.commands["batch"]
    flags = {name for parameter in batch.params for name in parameter.opts}
    arguments = shlex.split(resource("kuberay/batch.yaml")["spec"]["entrypoint"])
    assert arguments[:2] == ["qwenvl", "batch"]
    assert {argument for argument in arguments if argument.startswith("--")} <= flags
    # In the comment, the command follows the " -- " of kubectl and ends before an empty line.
    comment = (DEPLOY / "kuberay" / "cluster.yaml").read_text("utf-8").split("\napiVersion")[0]
    from_command = comment.replace("#", "").replace("\\\n", " ").split(" -- ", 1)[1]
    command = from_command.split("\n\n")[0]
    assert shlex.split(command)[: len(arguments)] == arguments
