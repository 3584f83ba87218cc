"""Supported upstream commits and wheels, known GPU wheels and broken combinations of packages, from pins.yaml."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from paddlemix_qwenvl_plugin.checkpoint.config import first_problem
from paddlemix_qwenvl_plugin.util.errors import QwenVLError
from paddlemix_qwenvl_plugin.util.requirement import RequirementText, VersionText

_FILE = Path(__file__).with_name("pins.yaml")


class _Frozen(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Upstream(_Frozen):
    """Upstream repository at the commit that this package supports."""

    name: str  # of its Python package, and of the folder of its patches
    title: str
    commit: str = Field(pattern=r"^[0-9a-f]{40}$")
    markers: tuple[str, ...] = Field(min_length=1)  # files by which a checkout is recognized


class PaddleNLPWheel(_Frozen):
    """Supported PaddleNLP wheel: its version, and its generation of the modules for export and prediction.

    Attributes:
        version: version of the distribution.
        generation: 1: the predictor script chooses the model class; 2: PaddleNLP's auto classes choose it.
    """

    version: VersionText
    generation: Literal[1, 2]


class GpuWheel(_Frozen):
    """GPU wheel of Paddle: its version, and the GPU architectures for which it has machine code.

    Attributes:
        version: version of the distribution.
        architectures: compute capabilities, times ten, for which the wheel has machine code.
        ptx: whether the wheel also has PTX, from which the driver compiles machine code for newer GPUs.
    """

    version: VersionText
    architectures: tuple[int, ...]
    ptx: bool


class Broken(_Frozen):
    """Broken combination of packages: all of `installed` are installed, and none of `missing`."""

    name: str
    installed: tuple[RequirementText, ...] = Field(min_length=1)
    missing: tuple[str, ...] = ()
    symptom: str
    fix: str

    def matches(self, versions: Mapping[str, str]) -> bool:
        """Whether an environment (distribution -> version) has this combination."""
        present = {canonicalize_name(name): version for name, version in versions.items()}
        for text in self.installed:
            requirement = Requirement(text)
            version = present.get(canonicalize_name(requirement.name))
            if version is None or not requirement.specifier.contains(version, prereleases=True):
                return False
        return not any(canonicalize_name(name) in present for name in self.missing)


class Pins(_Frozen):
    """Contents of pins.yaml."""

    upstreams: tuple[Upstream, ...]
    paddlenlp_wheels: tuple[PaddleNLPWheel, ...]
    gpu_wheels: tuple[GpuWheel, ...]
    broken: tuple[Broken, ...]


@functools.cache
def load(path: Path = _FILE) -> Pins:
    """Read the pins.

    Raises:
        QwenVLError: the file cannot be read, is not YAML, or violates the schema.
    """
    try:
        data: Any = yaml.safe_load(path.read_text(encoding="utf-8"))
        return Pins.model_validate(data)
    except OSError as error:
        raise QwenVLError(f"{path}: cannot be read ({error.strerror}); install the package again") from error
    except yaml.YAMLError as error:
        raise QwenVLError(f"{path}: {' '.join(str(error).split())}") from error
    except ValidationError as error:
        raise QwenVLError(f"{path}: {first_problem(error)}") from error
