"""The keys of KubeRay's resources that deploy/ uses, as strict models; pod templates go to the Kubernetes schema.

Source: the resource definitions of KubeRay 1.6, ray-operator/apis/ray/v1/*_types.go; no package on PyPI has them.
The values' ranges are those of the controller's validation.go where they are narrower than the types.
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
    def _named(self) -> Metadata:
        assert (self.name is None) != (self.generateName is None)
        return self


def pod(template: dict[str, Any]) -> dict[str, Any]:
    validate_kubernetes({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "pod"}, **template})
    return template


def container_part(part: dict[str, Any]) -> dict[str, Any]:
    pod({"spec": {"containers": [{"name": "container", **part}]}})
    return part


Pod = Annotated[dict[str, Any], AfterValidator(pod)]
Resources = Annotated[dict[str, Any], AfterValidator(lambda value: container_part({"resources": value}))]
RayStartParams = dict[str, str]


class AutoscalerOptions(Strict):
    idleTimeoutSeconds: int
    resources: Resources


class Password(Strict):
    valueFrom: Annotated[
        dict[str, Any],
        AfterValidator(lambda value: container_part({"env": [{"name": "P", "valueFrom": value}]})),
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
    def _bounds(self) -> WorkerGroup:
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
    def _ends(self) -> JobSpec:
        assert self.shutdownAfterJobFinishes or not self.ttlSecondsAfterFinished
        return self


def known(given: dict[str, Any], model: type[BaseModel]) -> None:
    """Assert that a model has each key: Ray's models of some levels ignore unknown ones."""
    assert set(given) <= set(model.model_fields), set(given) - set(model.model_fields)


def serve_config(text: str) -> str:
    """A Serve configuration, by Ray's own models."""
    document = safe_load(text)
    ServeDeploySchema.model_validate(document)
    known(document, ServeDeploySchema)
    known(document["http_options"], HTTPOptionsSchema)
    for application in document["applications"]:
        known(application, ServeApplicationSchema)
        for deployment in application.get("deployments", ()):
            known(deployment, DeploymentSchema)
            known(deployment["ray_actor_options"], RayActorOptionsSchema)
            known(deployment["autoscaling_config"], AutoscalingConfig)
            AutoscalingConfig(**deployment["autoscaling_config"])
    return text


class UpgradeStrategy(Strict):
    type: Literal["NewCluster", "None"]


class ServiceSpec(Strict):
    excludeHeadPodFromServeSvc: bool
    upgradeStrategy: UpgradeStrategy
    rayClusterDeletionDelaySeconds: int
    serveConfigV2: Annotated[str, AfterValidator(serve_config)]
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
