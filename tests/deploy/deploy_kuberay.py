"""Pydantic models of KubeRay's resources; only the keys that deploy/ uses are valid.

Source of the keys: ray-operator/apis/ray/v1/*_types.go of KubeRay 1.6; no package on PyPI has them. Source of the
value ranges: the controller's validation.go. Pod templates are validated against the Kubernetes schema.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Optional

from deploy_schema import validate_kubernetes
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator
from ray.serve.config import AutoscalingConfig
from ray.serve.schema import (
    DeploymentSchema,
    HTTPOptionsSchema,
    RayActorOptionsSchema,
    ServeApplicationSchema,
    ServeDeploySchema,
)
from yaml import safe_load


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class Metadata(Strict):
    name: Optional[str] = None
    generateName: Optional[str] = None

    @model_validator(mode="after")
    def _check_name(self) -> Metadata:
        assert (self.name is None) != (self.generateName is None)
        return self


def check_pod(template: dict[str, Any]) -> dict[str, Any]:
    """Validate a pod template and return it."""
    validate_kubernetes({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "pod"}, **template})
    return template


def check_container(fields: dict[str, Any]) -> dict[str, Any]:
    """Validate fields of a container and return them."""
    check_pod({"spec": {"containers": [{"name": "container", **fields}]}})
    return fields


Pod = Annotated[dict[str, Any], AfterValidator(check_pod)]
Resources = Annotated[
    dict[str, Any], AfterValidator(lambda value: check_container({"resources": value})["resources"])
]
RayStartParams = dict[str, str]


class AutoscalerOptions(Strict):
    idleTimeoutSeconds: int
    resources: Resources


class Password(Strict):
    valueFrom: Annotated[
        dict[str, Any],
        AfterValidator(
            lambda value: check_container({"env": [{"name": "P", "valueFrom": value}]})["env"][0]["valueFrom"]
        ),
    ]


class GcsFaultTolerance(Strict):
    redisAddress: str
    redisPassword: Password


class HeadGroup(Strict):
    rayStartParams: RayStartParams
    template: Pod


class WorkerGroup(HeadGroup):
    groupName: str = Field(pattern="^[a-z0-9-]+$")
    replicas: int
    minReplicas: int
    maxReplicas: int

    @model_validator(mode="after")
    def _check_replicas(self) -> WorkerGroup:
        assert 0 <= self.minReplicas <= self.replicas <= self.maxReplicas
        return self


class AuthOptions(Strict):
    mode: Literal["token", "disabled"]


class ClusterSpec(Strict):
    rayVersion: str
    authOptions: AuthOptions
    enableInTreeAutoscaling: bool
    autoscalerOptions: AutoscalerOptions
    gcsFaultToleranceOptions: Optional[GcsFaultTolerance] = None
    headGroupSpec: HeadGroup
    workerGroupSpecs: list[WorkerGroup] = Field(min_length=1)


class JobSpec(Strict):
    entrypoint: str
    submissionMode: Literal["K8sJobMode"]
    backoffLimit: int = Field(ge=0)
    shutdownAfterJobFinishes: bool
    ttlSecondsAfterFinished: int
    rayClusterSpec: ClusterSpec

    @model_validator(mode="after")
    def _check_ttl(self) -> JobSpec:
        # A time to live applies only to a job that shuts its cluster down.
        assert self.shutdownAfterJobFinishes or not self.ttlSecondsAfterFinished
        return self


def check_keys(values: dict[str, Any], model: type[BaseModel]) -> None:
    """Assert that all keys are fields of a model: some of Ray's models ignore unknown keys."""
    assert set(values) <= set(model.model_fields), set(values) - set(model.model_fields)


def check_serve_config(text: str) -> str:
    """Validate a Serve configuration with Ray's models and return it."""
    document = safe_load(text)
    ServeDeploySchema.model_validate(document)
    check_keys(document, ServeDeploySchema)
    check_keys(document["http_options"], HTTPOptionsSchema)
    for application in document["applications"]:
        check_keys(application, ServeApplicationSchema)
        for deployment in application.get("deployments", ()):
            check_keys(deployment, DeploymentSchema)
            check_keys(deployment["ray_actor_options"], RayActorOptionsSchema)
            check_keys(deployment["autoscaling_config"], AutoscalingConfig)
            AutoscalingConfig(**deployment["autoscaling_config"])
    return text


class UpgradeStrategy(Strict):
    type: Literal["NewCluster", "None"]


class ServiceSpec(Strict):
    excludeHeadPodFromServeSvc: bool
    upgradeStrategy: UpgradeStrategy
    rayClusterDeletionDelaySeconds: int
    serveConfigV2: Annotated[str, AfterValidator(check_serve_config)]
    rayClusterConfig: ClusterSpec


class RayResource(Strict):
    apiVersion: Literal["ray.io/v1"]
    metadata: Metadata


class RayCluster(RayResource):
    kind: Literal["RayCluster"]
    spec: ClusterSpec


class RayJob(RayResource):
    kind: Literal["RayJob"]
    spec: JobSpec


class RayService(RayResource):
    kind: Literal["RayService"]
    spec: ServiceSpec


RESOURCES = {"RayCluster": RayCluster, "RayJob": RayJob, "RayService": RayService}
