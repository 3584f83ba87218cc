"""Schema of recipes. Unknown keys and unknown `${names}` are errors."""

from __future__ import annotations

import re
import shlex
import warnings
from typing import Annotated, Any, Literal, Optional, Union

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from paddlemix_qwenvl_plugin.recipes import interpolate
from paddlemix_qwenvl_plugin.util.requirement import RequirementText, SpecifierText


def _as_text(value: Any) -> Any:
    """Convert numbers to text, as on a command line; not YAML's true and null, whose text is ambiguous."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return str(value)
    return value


def _as_argv(value: Any) -> Any:
    return shlex.split(value) if isinstance(value, str) else value


def _regex(value: str) -> str:
    try:
        with warnings.catch_warnings():  # FutureWarning about ambiguous syntax
            warnings.simplefilter("ignore")
            re.compile(value)
    except (re.error, RecursionError, OverflowError) as error:
        raise ValueError(f"not a regular expression ({error}): {value!r:.60}") from error
    return value


def _variable(value: str) -> str:
    if re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", value) is None:
        raise ValueError("not a name for an environment variable: letters, digits and _")
    return value


# No dots: overrides use them to separate the parts of a key.
ItemName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$")]
# Part of the run folder's name.
RecipeName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
Text = Annotated[str, BeforeValidator(_as_text)]
Variable = Annotated[str, AfterValidator(_variable)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    @model_validator(mode="before")
    @classmethod
    def _known_keys_only(cls, data: Any) -> Any:
        if isinstance(data, dict):
            known = [field.alias or name for name, field in cls.model_fields.items()]
            for key in data:
                if key not in known:
                    raise PydanticCustomError(
                        "unknown_key",
                        "unknown key; known keys: {known}",
                        {"key": str(key), "known": ", ".join(known)},
                    )
        return data


class Requires(_Strict):
    """Requirements on the machine, checked before the first step."""

    python: Optional[SpecifierText] = None
    paddle: Optional[SpecifierText] = None
    packages: list[RequirementText] = []
    memory_gib: Optional[float] = Field(default=None, gt=0)
    disk_gib: Optional[float] = Field(default=None, gt=0)
    gpu: bool = False


class Asset(_Strict):
    """A file or folder that the run needs. `sha256`: digest of a file; null: not checked."""

    name: ItemName
    path: str = Field(min_length=1)
    sha256: Optional[Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]] = None
    why: Optional[str] = None


class Step(_Strict):
    """One command: its arguments, run without a shell."""

    name: ItemName
    run: Annotated[list[Text], BeforeValidator(_as_argv), Field(min_length=1)]
    timeout_seconds: Optional[float] = Field(default=None, gt=0)


class Approx(_Strict):
    """Expected number with an absolute tolerance."""

    value: float
    tolerance: float = Field(ge=0)


CHECKS = ("equals", "approx", "min", "max", "matches", "contains", "not_empty")


class Expect(_Strict):
    """Expectation: a file exists or, with `key`, a value in a JSON file passes one check."""

    file: str = Field(min_length=1)
    key: Optional[str] = None
    equals: Any = None
    approx: Optional[Approx] = None
    min: Optional[Union[int, float]] = None
    max: Optional[Union[int, float]] = None
    matches: Optional[Annotated[str, AfterValidator(_regex)]] = None
    contains: Any = None
    not_empty: Optional[Literal[True]] = None

    @property
    def check(self) -> Optional[str]:
        """Name of the check, None if only the file's existence is checked."""
        # `equals: null` is a check, so test which fields are set, not which are None.
        return next((name for name in CHECKS if name in self.model_fields_set), None)

    @model_validator(mode="after")
    def _one_check(self) -> Expect:
        checks = [name for name in CHECKS if name in self.model_fields_set]
        if len(checks) > 1:
            raise ValueError(f"one check only, not {' and '.join(checks)}; write one entry for each")
        if bool(checks) != (self.key is not None):
            raise ValueError(f"a check needs a key and a key needs one check of {', '.join(CHECKS)}")
        for name in checks:
            if name not in ("equals", "contains") and getattr(self, name) is None:
                raise ValueError(f"{name} has no value")
        return self


class Bench(_Strict):
    """Benchmark of a step: `warmup` uncounted runs, then `repeat` timed runs."""

    step: str
    repeat: int = Field(ge=1)
    warmup: int = Field(default=0, ge=0)


class Recipe(_Strict):
    """A reproducible run: commands, requirements and expectations.

    `pins`: upstream commits or wheel versions that the recipe refers to; recorded, not checked.
    """

    schema_version: Literal[1] = Field(alias="schema")
    name: RecipeName
    why: str = Field(min_length=1)
    requires: Requires = Requires()
    pins: dict[str, Text] = {}
    assets: list[Asset] = []
    env: dict[Variable, Text] = {}
    seed: Optional[int] = None
    dtype: Optional[Literal["float32", "float16", "bfloat16"]] = None
    steps: list[Step] = Field(min_length=1)
    expect: list[Expect] = []
    bench: Optional[Bench] = None

    @model_validator(mode="after")
    def _names_fit_together(self) -> Recipe:
        for kind, names in (
            ("steps", [step.name for step in self.steps]),
            ("assets", [asset.name for asset in self.assets]),
        ):
            for name in names:
                if names.count(name) > 1:
                    raise ValueError(f"{kind}: duplicate name {name!r}")
        if self.bench and self.bench.step not in [step.name for step in self.steps]:
            raise ValueError(
                f"bench.step: no step {self.bench.step!r}; steps: {', '.join(s.name for s in self.steps)}"
            )
        self._check_references()
        return self

    def _check_references(self) -> None:
        known = [*interpolate.RUN_NAMES, *interpolate.LOAD_NAMES, *(f"assets.{a.name}" for a in self.assets)]
        # An unset seed or dtype has no value to fill in.
        known = [name for name in known if name not in ("seed", "dtype") or getattr(self, name) is not None]
        # (key, texts, allowed references)
        places: list[tuple[str, Union[list[str], tuple[str, ...]], list[str]]] = [
            *((f"assets.{a.name}.path", [a.path], list(interpolate.LOAD_NAMES)) for a in self.assets),
            *((f"env.{key}", [value], known) for key, value in self.env.items()),
            *((f"steps.{step.name}.run", step.run, known) for step in self.steps),
            *((f"expect.{i}.file", [e.file], known) for i, e in enumerate(self.expect)),
        ]
        for path, texts, names in places:
            for text in texts:
                try:
                    interpolate.check(text, names)
                except ValueError as error:
                    raise ValueError(f"{path}: {error}") from error

    def resolved(self) -> dict[str, Any]:
        """The recipe as plain data for YAML: only the keys that were set in the file or by overrides."""
        return self.model_dump(by_alias=True, exclude_unset=True)
