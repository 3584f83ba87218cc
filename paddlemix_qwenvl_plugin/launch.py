"""Run an upstream script with the plugin active: `python -m paddlemix_qwenvl_plugin.launch SCRIPT ...`.

For installations in which Python does not read qwenvl_activate.pth, such as `pip install --target`.
"""

from __future__ import annotations

import runpy
import sys
from importlib import import_module, util
from pathlib import Path

from paddlemix_qwenvl_plugin.util.errors import QwenVLError, UsageError

_USAGE = "usage: python -m paddlemix_qwenvl_plugin.launch (SCRIPT | -m MODULE) [ARGUMENT ...]"


def main() -> None:
    """Run the script or module named in sys.argv, as `python` itself would."""
    arguments = sys.argv[1:]
    if arguments[:1] in (["-h"], ["--help"]):
        print(_USAGE)
        return
    try:
        run = _prepare(arguments)
    except QwenVLError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    if arguments[0] == "-m":
        runpy.run_module(run, run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(str(Path(run).absolute()), run_name="__main__")


def _prepare(arguments: list[str]) -> str:
    """Activate the plugin, set sys.argv and sys.path, return the name of the script or module."""
    as_module = arguments[:1] == ["-m"]
    arguments = arguments[1:] if as_module else arguments
    if not arguments:
        raise UsageError(f"no script named; {_USAGE}")
    name = arguments[0]
    if not as_module and not Path(name).is_file():
        raise UsageError(f"{name}: no such script")
    try:
        activation = import_module("_qwenvl_activate")
    except ModuleNotFoundError as error:
        raise QwenVLError(
            "paddlemix-qwenvl-plugin is not installed where this Python looks (_qwenvl_activate is missing); "
            "run: pip install paddlemix-qwenvl-plugin"
        ) from error
    activation.init()
    if as_module and not _module_exists(name):
        raise UsageError(f"{name}: no such module")
    sys.argv = arguments
    # `python -m` sets sys.path[0] to the working directory, except with -I or -P. A script needs its own folder there.
    if not (as_module or sys.flags.isolated or getattr(sys.flags, "safe_path", False)):
        sys.path[0] = str(Path(name).resolve().parent)
    return name


def _module_exists(module: str) -> bool:
    try:
        return util.find_spec(module) is not None
    except ModuleNotFoundError as error:
        # A parent package is missing. Any other missing module is an import error inside a parent: raise it.
        if error.name is not None and f"{module}.".startswith(f"{error.name}."):
            return False
        raise
    except ValueError:  # the name is empty, or that of a loaded module without a spec
        return False


if __name__ == "__main__":
    main()
