"""The strict JSON schemas of Kubernetes that kubernetes-validate carries, each read once.

`kubernetes_validate.validate` reads them anew at each call, too slow for every misspelling of every key.
"""

from __future__ import annotations

import functools
import json
from importlib import resources
from typing import Any

from jsonschema import Draft202012Validator, ValidationError
from referencing import Registry, Resource

__all__ = ["ValidationError", "validate_kubernetes"]

# The oldest release that its makers still maintain, or newer; the schemas of newer ones have more keys.
VERSION = "1.34"


@functools.cache
def _contents(name: str) -> dict[str, Any]:
    path = f"kubernetes-json-schema/v{VERSION}.0-local-strict/{name}.json"
    found: dict[str, Any] = json.loads(
        resources.files("kubernetes_validate").joinpath(path).read_text("utf-8")
    )
    return found


@functools.cache
def _validator(kind: str, api_version: str) -> Draft202012Validator:
    schema = Resource.from_contents(_contents(f"{kind.lower()}-{api_version.replace('/', '-')}"))
    definitions = Resource.from_contents(_contents("_definitions"))
    registry: Registry[Any] = definitions @ (schema @ Registry())
    return Draft202012Validator(schema.contents, registry=registry)


def validate_kubernetes(document: dict[str, Any]) -> None:
    """Raise ValidationError unless a resource fits the schema of its kind."""
    # autoscaling.k8s.io/v1 is autoscaling-v1 there.
    group, _, version = document["apiVersion"].rpartition("/")
    _validator(document["kind"], "/".join(filter(None, [group.split(".")[0], version]))).validate(document)
