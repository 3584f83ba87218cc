"""Sources of settings, in order of precedence: flags, environment variables, YAML file, defaults."""

from __future__ import annotations

import difflib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, Optional

from pydantic import ValidationError
from pydantic.fields import FieldInfo
from pydantic_settings import EnvSettingsSource

from paddlemix_qwenvl_plugin.runtime.options import allowed
from paddlemix_qwenvl_plugin.serve.settings import ENVIRONMENT_PREFIX, ServeSettings
from paddlemix_qwenvl_plugin.util import env, plain_yaml
from paddlemix_qwenvl_plugin.util.errors import UsageError

# pydantic's error types for a number outside of its limits.
_OUT_OF_RANGE = ("greater_than", "greater_than_equal", "less_than", "less_than_equal")
# Beginnings of pydantic's error types for a value of a wrong type, such as int_parsing, and the right type in words.
_TYPE_WORDS = {"int": "a whole number", "float": "a number", "finite": "a number", "bool": "true or false"}


class Origin(NamedTuple):
    """Source of a setting's value.

    Attributes:
        place: as named in the comments of `as_yaml`: a flag, an environment variable or the path of the YAML file.
        name: as named in error messages: the flag, the variable, or file and key.
    """

    place: str
    name: str


class Settings(NamedTuple):
    """Settings and the origin of each value that is not a default."""

    values: ServeSettings
    origins: dict[str, Origin]

    def as_yaml(self) -> str:
        """Write the settings as YAML for `--config`, with a comment that names the origin of each value."""
        lines = []
        for name, value in self.values.model_dump(mode="json").items():
            origin = self.origins.get(name)
            # JSON is valid YAML and fits on one line.
            text = json.dumps(value, ensure_ascii=False)
            lines.append(f"{name}: {text}  # {origin.place if origin else 'default'}")
        return "\n".join(lines) + "\n"


def read_settings(flags: Mapping[str, Any], config: Optional[Path] = None) -> Settings:
    """Read the settings of a command from all sources.

    Args:
        flags: values of the flags on the command line, by setting name.
        config: path of a YAML file; None: the value of QWENVL_SERVE_CONFIG, if set.

    Raises:
        UsageError: the YAML file cannot be read; an unknown setting or an invalid value, where the message names the
            flag, the variable, or the file and key.
    """
    default_config = env.SERVE_CONFIG.read()
    config = config or (Path(default_config) if default_config else None)
    _check_variables()
    values: dict[str, Any] = {}
    origins: dict[str, Origin] = {}
    if config is not None:
        for name, value in _from_file(config).items():
            values[name], origins[name] = value, Origin(str(config), f"{config}: {name}")
    for name, value in EnvSettingsSource(ServeSettings)().items():
        variable = ENVIRONMENT_PREFIX + name.upper()
        values[name], origins[name] = value, Origin(variable, variable)
    for name, value in flags.items():
        values[name], origins[name] = value, Origin(f"--{name}", f"--{name}")
    try:
        return Settings(ServeSettings(**values), origins)
    except ValidationError as error:
        raise UsageError(_line(error, origins)) from None


def _from_file(path: Path) -> dict[str, Any]:
    data = plain_yaml.read_file(path, "a file of settings")
    if data is None:  # only comments
        return {}
    if not isinstance(data, dict):
        raise UsageError(f"{path}: settings are a mapping of keys to values")
    for key in data:
        if key not in ServeSettings.model_fields:
            raise UsageError(
                f"{path}: {key}: no such setting{_suggestion(str(key), ServeSettings.model_fields)}"
            )
    return data


def _check_variables() -> None:
    """Refuse an environment variable with the prefix of settings and an unknown name: pydantic would ignore it."""
    valid_names = [ENVIRONMENT_PREFIX + name.upper() for name in ServeSettings.model_fields]
    valid_names.append(env.SERVE_CONFIG.name)
    for name in sorted(os.environ):
        if name.upper().startswith(ENVIRONMENT_PREFIX) and name.upper() not in valid_names:
            raise UsageError(f"{name}: no such setting{_suggestion(name, valid_names)}")


def _suggestion(name: str, valid_names: Any) -> str:
    """End of the error message of an unknown name: the most similar valid name, or else a reference to --help."""
    close = difflib.get_close_matches(name, valid_names, n=1)
    return f"; did you mean {close[0]}?" if close else "; see qwenvl serve --help"


def _line(error: ValidationError, origins: Mapping[str, Origin]) -> str:
    """Format the first error as a line that begins with the flag, the variable, or file and key."""
    problem: Any = error.errors(include_url=False)[0]
    field, value = str(problem["loc"][0]), problem["input"]
    subject = origins[field].name if field in origins else field
    if problem["type"] in _OUT_OF_RANGE:
        return f"{subject}: {value} is out of range; it must be {allowed(ServeSettings.model_fields[field])}"
    if problem["type"] == "literal_error":
        return f"{subject}: {value!r} must be one of {', '.join(literal_values(ServeSettings.model_fields[field]))}"
    type_words = _TYPE_WORDS.get(problem["type"].partition("_")[0])
    if type_words is not None:
        return f"{subject}: {value!r} is not {type_words}"
    message = str(problem["msg"])
    return f"{subject}: {message[:1].lower()}{message[1:]}, got {value!r}"


def literal_values(field: FieldInfo) -> tuple[str, ...]:
    """Allowed values of a Literal setting; empty for other types."""
    annotation: Any = field.annotation
    return getattr(annotation, "__args__", ()) if str(annotation).startswith("typing.Literal") else ()
