"""`python -m paddlemix_qwenvl_plugin.launch SCRIPT ...`: run an upstream script with the plugin active.

For where Python does not read the installed qwenvl_activate.pth, as in a folder made by `pip install --target`.
"""

from __future__ import annotations

import runpy
import sys
from importlib import import_module, util
from pathlib import Path

from paddlemix_qwenvl_plugin.util.errors import QwenVLError, UsageError

_USAGE = "usage: python -m paddlemix_qwenvl_plugin.launch (SCRIPT | -m MODULE) [ARGUMENT ...]"


def main() -> None:
    """Run the script or module that sys.argv names, as `python` itself would."""
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
    """Activate the plugin, set sys.argv and sys.path; return the script or the module."""
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
    if as_module and not _is_there(name):
        raise UsageError(f"{name}: no such module")
    sys.argv = arguments
    # `python -m` has put the working directory first. That is right for a module, unless -I or -P forbids it.
    if not (as_module or sys.flags.isolated or getattr(sys.flags, "safe_path", False)):
        sys.path[0] = str(Path(name).resolve().parent)
    return name


def _is_there(module: str) -> bool:
    try:
        return util.find_spec(module) is not None
    except ModuleNotFoundError as error:
        # One of the packages around it is missing; anything else that is missing is that package's affair.
        if error.name is not None and f"{module}.".startswith(f"{error.name}."):
            return False
        raise
    except ValueError:
        return False


if __name__ == "__main__":
    main()
