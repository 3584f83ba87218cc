"""Validation against the strict JSON schemas of Kubernetes in the package kubernetes-validate.

Schemas are cached: `kubernetes_validate.validate` reads them at each call, too slow for a check of every misspelling.
"""

from __future__ import annotations

import functools
import json
from importlib import resources
from typing import Any

from jsonschema import Draft202012Validator, ValidationError
from referencing import Registry, Resource

__all__ = ["ValidationError", "validate_kubernetes"]

# One of the older releases that Kubernetes still maintains: the schemas of newer releases accept more keys.
VERSION = "1.34"


@functools.cache
def _contents(name: str) -> dict[str, Any]:
    path = f"kubernetes-json-schema/v{VERSION}.0-local-strict/{name}.json"
    schema: dict[str, Any] = json.loads(
        resources.files("kubernetes_validate").joinpath(path).read_text("utf-8")
    )
    return schema


@functools.cache
def _validator(kind: str, api_version: str) -> Draft202012Validator:
    schema = Resource.from_contents(_contents(f"{kind.lower()}-{api_version.replace('/', '-')}"))
    definitions = Resource.from_contents(_contents("_definitions"))
    registry: Registry[Any] = definitions @ (schema @ Registry())
    return Draft202012Validator(schema.contents, registry=registry)


def validate_kubernetes(document: dict[str, Any]) -> None:
    """Raise ValidationError unless a resource fits the schema of its kind."""
    # The schemas' names have only the first part of a group: networking-v1 for networking.k8s.io/v1.
    group, _, version = document["apiVersion"].rpartition("/")
    api_version = f"{group.split('.')[0]}/{version}" if group else version
    _validator(document["kind"], api_version).validate(document)
