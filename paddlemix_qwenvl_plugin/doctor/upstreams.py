"""Checks of PaddleNLP and PaddleMIX: location, version, import, hooks, paddlenlp_ops, broken package combinations."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping, Sequence
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Optional

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from paddlemix_qwenvl_plugin import upstream
from paddlemix_qwenvl_plugin.doctor.probe import Answer
from paddlemix_qwenvl_plugin.doctor.report import Check, Status
from paddlemix_qwenvl_plugin.upstream import patches, pins
from paddlemix_qwenvl_plugin.upstream.pins import Broken, Upstream
from paddlemix_qwenvl_plugin.util import env
from paddlemix_qwenvl_plugin.util.errors import QwenVLError, UsageError
from paddlemix_qwenvl_plugin.util.program import program

_INSTALL_PADDLENLP = "pip install 'paddlemix-qwenvl-plugin[paddlenlp]'"
# A checkout on sys.path has no version; these packages count as installed, at version 0, if they can be found.
_FROM_CHECKOUTS = ("paddlenlp", "paddlemix", "ppdiffusers")


def source_of(module: str) -> Optional[Path]:
    """Locate the file that `import module` would run, without importing it; None if not found."""
    try:
        spec = find_spec(module)
    except ValueError:  # put into sys.modules by hand
        return None
    # A folder without __init__.py has no origin: Python treats it as an empty package.
    return Path(spec.origin) if spec is not None and spec.origin is not None else None


def installed_versions() -> dict[str, str]:
    """Canonical name -> version of every distribution; of duplicates, the one that Python imports."""
    found: dict[str, str] = {}
    for distribution in metadata.distributions():
        # A damaged or half-removed package has metadata without a name or a version.
        name, version = distribution.metadata["Name"], distribution.metadata["Version"]
        if name and version:
            found.setdefault(canonicalize_name(name), version)
    return found


def broken_rows(versions: Mapping[str, str]) -> list[Broken]:
    """Entries of `broken` in pins.yaml that match this environment."""
    checkouts = {name: "0" for name in _FROM_CHECKOUTS if source_of(name)}
    return [row for row in pins.load().broken if row.matches({**checkouts, **versions})]


def check_combinations(rows: Sequence[Broken], versions: Mapping[str, str]) -> list[Check]:
    """Create a check with status "problem" for each of `rows`, or one with status "ok" if `rows` is empty."""
    if not rows:
        n_known = len(pins.load().broken)
        message = f"none of the {n_known} known broken combinations of packages is installed"
        return [Check("combinations", "ok", message)]
    checks = []
    for row in rows:
        names = [canonicalize_name(Requirement(text).name) for text in row.installed]
        found = {name: versions.get(name, "from a checkout") for name in names}
        packages = ", ".join(f"{name} {version}" for name, version in found.items())
        without = f" without {', '.join(row.missing)}" if row.missing else ""
        data = {"installed": found, "missing": list(row.missing)}
        message = f"{packages}{without}: {row.symptom}"
        checks.append(Check(f"combination.{row.name}", "problem", message, row.fix, data))
    return checks


def check_upstream(
    pinned: Upstream, versions: Mapping[str, str], answer: Answer, paddle_imports: bool, has_fix: bool
) -> Check:
    """Check the version or commit of an upstream against the pins, and that it can be imported.

    Args:
        pinned: the upstream.
        versions: result of `installed_versions`.
        answer: result of questions.import_upstream; ignored if the upstream is not installed.
        paddle_imports: whether Paddle can be imported; without it no upstream can.
        has_fix: whether another check names the fix of a failing import.
    """
    source = source_of(pinned.name)
    data: dict[str, Any] = {
        "path": None,
        "version": None,
        "commit": None,
        "patches": {},
        "cause": None,
    }
    name, title = pinned.name, pinned.title
    if source is None:
        message = f"{title} is not installed; only its own scripts need it"
        fix = _INSTALL_PADDLENLP if name == "paddlenlp" else None
        return Check(name, "note", message, fix, data)
    root = source.parent.parent
    data.update(path=str(root), version=answer.value.get("version") or versions.get(name))
    data["cause"] = answer.cause
    status, description, fix = _compare_with_pins(pinned, root, data)
    if not answer.cause:
        return Check(name, status, description, fix, data)
    if not paddle_imports:
        return Check(name, "note", f"{description}; it does not import without Paddle", data=data)
    fix = None
    message = f"{description}: import {name} fails: {answer.cause}"
    if patches.State.APPLICABLE.value in data["patches"].values():
        message += "; its patches are not applied"
        fix = f"{program()} patches apply --tree {shlex.quote(str(root))}"
    elif not has_fix and name == "paddlenlp":
        fix = _INSTALL_PADDLENLP
    return Check(name, "problem", message, fix, data)


def _compare_with_pins(
    pinned: Upstream, root: Path, data: dict[str, Any]
) -> tuple[Status, str, Optional[str]]:
    """(status, description, fix) of the installed upstream; adds commit and patches of a checkout to `data`."""
    try:
        # force: another commit than the pinned one is described below, not refused.
        report = patches.check(root, force=True)
    except UsageError:  # not a checkout: an installed wheel
        return _wheel(pinned, data)
    except QwenVLError as error:  # git is missing or fails
        return "note", f"{pinned.title} in {root}, commit unknown ({error})", None
    data["patches"] = {patch.name: state.value for patch, state in report.states}
    data["commit"] = commit = report.tree.commit
    if commit is None:
        return "note", f"{pinned.title} in {root}, commit unknown (no .git)", None
    if commit == pinned.commit:
        return "ok", f"{pinned.title} in {root}, at the pinned commit {commit[:7]}", None
    fix = f"git -C {shlex.quote(str(root))} checkout {pinned.commit}"
    description = (
        f"{pinned.title} in {root}, at commit {commit[:7]}; the plugin is made for {pinned.commit[:7]}"
    )
    return "note", description, fix


def _wheel(pinned: Upstream, data: dict[str, Any]) -> tuple[Status, str, Optional[str]]:
    version = data["version"] or "of unknown version"
    if pinned.name != "paddlenlp":
        return "note", f"{pinned.title} {version}; the tested commit is {pinned.commit[:7]}", None
    wheels = pins.load().paddlenlp_wheels
    if version in [wheel.version for wheel in wheels]:
        return "ok", f"{pinned.title} {version}", None
    tested = ", ".join(wheel.version for wheel in wheels)
    return "note", f"{pinned.title} {version} is untested; tested versions: {tested}", _INSTALL_PADDLENLP


def check_hooks(answers: Mapping[str, Answer]) -> Check:
    """Check the state of the hooks after importing the upstreams.

    `answers`: upstream -> result of `import_upstream`, for each installed upstream.
    """
    modules = upstream.hook_states()
    failed_imports: dict[str, str] = {}
    for name, answer in answers.items():
        hooks = answer.value.get("hooks", {})
        # An answer lists all hooks: keep those of the upstream's modules, and all that are no longer "armed", such as
        # the stand-in for paddlenlp_ops, which both upstreams use.
        relevant = {
            module: state
            for module, state in hooks.items()
            if module.startswith(f"{name}.") or state != "armed"
        }
        modules.update(relevant)
        failed_imports.update(answer.value.get("not_imported", {}))
    data = {"modules": modules, "not_imported": failed_imports}
    if not modules:
        if not env.PLUGIN.read():
            message = "hooks: switched off by QWENVL_PLUGIN=0"
        elif "_qwenvl_activate" in sys.modules:
            message = "hooks: none armed"
        else:
            message = (
                "hooks: off, Python read no qwenvl_activate.pth; "
                "run the stock scripts with: python -m paddlemix_qwenvl_plugin.launch SCRIPT"
            )
        return Check("hooks", "note", message, data=data)
    failed = {module: state for module, state in modules.items() if state.startswith("failed")}
    if failed:
        text = "; ".join(f"{module} {state}" for module, state in failed.items())
        return Check("hooks", "problem", f"hooks: {text}", data=data)
    if failed_imports:
        text = "; ".join(f"{module} ({cause})" for module, cause in failed_imports.items())
        return Check("hooks", "problem", f"hooks: these modules do not import: {text}", data=data)
    n_fired = sum(state == "fired" for state in modules.values())
    return Check(
        "hooks", "ok", f"hooks: {len(modules)} armed, {n_fired} fired by importing the upstreams", data=data
    )


def check_ops(answer: Answer, paddle_imports: bool, hooks: Check) -> Check:
    """Check paddlenlp_ops: built, replaced by the stand-in, or missing.

    Args:
        answer: result of questions.ops.
        paddle_imports: whether Paddle can be imported; without it, paddlenlp_ops cannot be.
        hooks: result of `check_hooks`.
    """
    if source_of("paddlenlp_ops") is None:
        stand_in = "paddlenlp_ops" in hooks.data["modules"]
        data = {"state": "stand-in" if stand_in else "missing", "cause": None}
        if stand_in:
            message = "paddlenlp_ops is not built; the plugin's stand-in takes its place"
        else:
            message = "paddlenlp_ops is not built, and the stand-in needs the hooks"
        return Check("ops", "note", message, data=data)
    data = {"state": "built", "cause": answer.cause}
    if answer.cause is None:
        return Check("ops", "ok", "paddlenlp_ops is built", data=data)
    if not paddle_imports:
        return Check("ops", "note", "paddlenlp_ops is built; it does not import without Paddle", data=data)
    message = (
        f"paddlenlp_ops does not import: {answer.cause}; build it for this Paddle, in PaddleNLP's folder csrc"
    )
    return Check("ops", "problem", message, "python setup_cuda.py install", data)
