"""Checks of this package's installation: metadata and entry points."""

from __future__ import annotations

import json
import shlex
from importlib import metadata
from typing import Any, Optional
from urllib.parse import urlparse
from urllib.request import url2pathname

from paddlemix_qwenvl_plugin.doctor.probe import Answer
from paddlemix_qwenvl_plugin.doctor.report import Check
from paddlemix_qwenvl_plugin.util.shipped import PACKAGE
from paddlemix_qwenvl_plugin.version import __version__

DISTRIBUTION = "paddlemix-qwenvl-plugin"
# Entry points declared in pyproject.toml, without the command `qwenvl`: group -> name.
ENTRY_POINTS = {
    "paddlenlp.plugins": "qwenvl",
    "paddlenlp.model_types": "qwen-img2txt",
    "paddlemix.image_encoder_exporters": "qwen_vl",
    "paddlemix.predictors": "qwen_vl",
}


def check_plugin() -> Check:
    """Check that this package is installed, and that the installed version is the one that runs."""
    distribution = _distribution()
    data = {
        "version": __version__,
        "installed": distribution.version if distribution else None,
        "path": str(PACKAGE),
    }
    if distribution is None:
        message = f"plugin {__version__} in {PACKAGE.parent}, not installed: no hooks and no entry points"
        return Check("plugin", "note", message, _reinstall_command(), data)
    if distribution.version != __version__:
        message = (
            f"plugin {__version__} in {PACKAGE.parent}, but the installed version is {distribution.version}"
        )
        return Check("plugin", "problem", message, _reinstall_command(), data)
    return Check("plugin", "ok", f"plugin {__version__} in {PACKAGE.parent}", data=data)


def check_entry_points(answer: Answer, paddle_imports: bool) -> list[Check]:
    """Check that each entry point of this package is installed and can be loaded.

    Args:
        answer: result of questions.entry_points.
        paddle_imports: whether Paddle can be imported; without it, entry points cannot be loaded.
    """
    if _distribution() is None:
        return []  # reported by check_plugin
    declared = _declared()
    checks = []
    for group, name in ENTRY_POINTS.items():
        value = declared.get(f"{group} {name}")
        cause = answer.cause or answer.value.get(f"{group} {name}")
        data = {"group": group, "entry_point": name, "value": value, "cause": cause if value else None}
        label = f"entry point {name} of {group}"
        check = f"entry_point.{group}"
        if value is None:
            message = f"{label} is not in the installed package"
            checks.append(Check(check, "problem", message, _reinstall_command(), data))
        elif cause is None:
            checks.append(Check(check, "ok", label, data=data))
        elif not paddle_imports:
            checks.append(Check(check, "note", f"{label} does not load without Paddle", data=data))
        else:
            checks.append(Check(check, "problem", f"{label} does not load: {cause}", data=data))
    return checks


def _distribution() -> Optional[metadata.Distribution]:
    try:
        return metadata.distribution(DISTRIBUTION)
    except metadata.PackageNotFoundError:
        return None


def _declared() -> dict[str, str]:
    """Entry points of the installed package: "GROUP NAME" -> value."""
    distribution = _distribution()
    if distribution is None:
        return {}
    return {f"{point.group} {point.name}": point.value for point in distribution.entry_points}


def _reinstall_command() -> str:
    """Command that installs the metadata of this code."""
    distribution = _distribution()
    text = distribution.read_text("direct_url.json") if distribution is not None else None
    origin: dict[str, Any] = json.loads(text or "{}")
    if origin.get("dir_info", {}).get("editable"):
        folder = url2pathname(urlparse(origin["url"]).path)
        return f"pip install --no-deps -e {shlex.quote(folder)}"
    if (PACKAGE.parent / "pyproject.toml").is_file():
        return f"pip install {shlex.quote(str(PACKAGE.parent))}"
    return f"pip install --force-reinstall --no-deps {DISTRIBUTION}=={__version__}"
