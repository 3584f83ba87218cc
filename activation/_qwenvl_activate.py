"""Activation of the hooks at interpreter start (qwenvl_activate.pth, qwenvl_activate.start from Python 3.15 on).

Where Python reads neither file, the plugin's launch.py calls init(), or PaddleNLP with the patch 0001-activate-plugin.

A finder on sys.meta_path calls the plugin's hook when a module of HOOKS or EARLY_HOOKS is imported, and provides the
stand-ins of STAND_INS if the real module is missing and paddlenlp.experimental imports it. The plugin itself is
imported for the first call of a hook.

Environment: QWENVL_PLUGIN=0 switches the activation off; QWENVL_PLUGIN_DEBUG=1 logs to stderr.
"""

# `from __future__ import annotations` and typing are not used: they would load files at every interpreter start.
import _thread
import os
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from importlib.abc import Loader
    from importlib.machinery import ModuleSpec
    from types import ModuleType
    from typing import Any

_PLUGIN = "paddlemix_qwenvl_plugin"

# Module -> "hook module:function"; the function is called with the module right after the module's execution.
HOOKS = {
    "paddlemix.auto.modeling": _PLUGIN + ".upstream.paddlemix:hook_auto_modeling",
    "paddlemix.processors.qwen_vl_processing": _PLUGIN + ".upstream.paddlemix:hook_qwen_vl_processing",
    "paddlenlp.experimental.transformers.qwen.modeling": _PLUGIN + ".upstream.paddlenlp:hook_qwen",
    "paddlenlp.transformers.qwen.tokenizer": _PLUGIN + ".upstream.paddlenlp:hook_qwen_tokenizer",
}
# Module -> "hook module:function"; the function is called with the module right before the module's execution.
EARLY_HOOKS = {
    "paddlenlp.experimental.transformers.fused_transformer_layers": (
        _PLUGIN + ".upstream.paddlenlp:before_fused_layers"
    ),
}
# Module that may be missing -> "hook module:function"; if it is missing, the function fills an empty module.
STAND_INS = {"paddlenlp_ops": _PLUGIN + ".upstream.ops_stand_in:fill"}
# A stand-in is provided only if the import comes from a module whose name begins with this.
_IMPORTERS_OF_STAND_INS = "paddlenlp.experimental."
_TABLE = {**HOOKS, **EARLY_HOOKS, **STAND_INS}

# The user's value, kept for the plugin's util/threads.py: Paddle's import sets the variable to 1.
omp_num_threads = os.environ.get("OMP_NUM_THREADS", "")

# Module -> "armed", "fired" or "failed: ERROR"; empty before init() and if the activation is switched off.
state: "dict[str, str]" = {}


def init() -> None:
    """Install the finder. Further calls have no effect."""
    if state or os.environ.get("QWENVL_PLUGIN") == "0":
        return
    state.update(dict.fromkeys(_TABLE, "armed"))
    sys.meta_path.insert(0, _Finder())
    debug("armed for " + ", ".join(sorted(_TABLE)))


def debug(line: str) -> None:
    """Write a line to stderr if QWENVL_PLUGIN_DEBUG is on: set, and neither empty nor 0."""
    if os.environ.get("QWENVL_PLUGIN_DEBUG", "0") not in ("", "0"):
        _write(line)


def _write(line: str) -> None:
    if sys.stderr is not None:  # None under pythonw
        sys.stderr.write("qwenvl: " + line + "\n")


def _fire(name: str, module: "ModuleType") -> bool:
    """Call the hook of a module; return whether it succeeded.

    A failing hook raises no exception, because it must not break the user's import. It causes a warning, unless its
    previous call failed as well.
    """
    try:
        from importlib import import_module

        hook_module, _, function = _TABLE[name].partition(":")
        getattr(import_module(hook_module), function)(module)
    except Exception as error:
        reason = type(error).__name__ + ": " + " ".join(str(error).split())
        is_first_failure = not state[name].startswith("failed")
        state[name] = "failed: " + reason
        debug("hook " + name + " failed: " + reason)
        if is_first_failure:
            effect = " is missing and gets no stand-in" if name in STAND_INS else " is left unchanged"
            _warn(_PLUGIN + ": " + name + effect + ", its hook failed (" + reason + ")")
        return False
    state[name] = "fired"
    debug("hook " + name + " fired")
    return True


def _warn(message: str) -> None:
    import warnings

    try:
        warnings.warn(message, RuntimeWarning, stacklevel=2)
    except RuntimeWarning:  # `-W error` turns it into an exception, which would break the user's import
        _write(message)


def _importer() -> str:
    """Name of the module whose code runs the current import."""
    frame = sys._getframe(1)
    # Skip the frames of finders, of importlib and of this module.
    while frame.f_back is not None and (
        frame.f_code.co_name == "find_spec"
        or frame.f_globals.get("__name__", "").startswith(("importlib", "_frozen_importlib", __name__))
    ):
        frame = frame.f_back
    return str(frame.f_globals.get("__name__"))


class _Finder:
    """Meta path finder for the modules of _TABLE; it finds them through the other finders."""

    def __init__(self) -> None:
        # (module, thread) of running searches, against endless recursion: other finders may call all finders.
        self._searching: set[tuple[str, int]] = set()

    def find_spec(
        self, name: str, path: "Sequence[str] | None" = None, target: "ModuleType | None" = None
    ) -> "ModuleSpec | None":
        if name not in _TABLE:
            return None
        search = (name, _thread.get_ident())
        if search in self._searching:
            return None
        self._searching.add(search)
        try:
            spec = self._find_elsewhere(name, path, target)
        finally:
            self._searching.discard(search)
        if name in STAND_INS:
            # A real module is not changed. Importers outside paddlenlp.experimental get no stand-in: their import may
            # be a check whether the module exists.
            if spec is not None or not _importer().startswith(_IMPORTERS_OF_STAND_INS):
                return spec
            from importlib.machinery import ModuleSpec

            # The loaders of this file are no subclasses of importlib's, which would need another import at start.
            return ModuleSpec(name, _StandInLoader(name))  # type: ignore[arg-type]
        if spec is not None and hasattr(spec.loader, "exec_module"):
            spec.loader = _HookLoader(name, spec.loader)  # type: ignore[assignment, arg-type]
        return spec

    def _find_elsewhere(
        self, name: str, path: "Sequence[str] | None", target: "ModuleType | None"
    ) -> "ModuleSpec | None":
        for finder in sys.meta_path:
            if finder is not self and hasattr(finder, "find_spec"):
                spec = finder.find_spec(name, path, target)
                if spec is not None:
                    return spec
        return None


class _HookLoader:
    """Wrapper of a module's loader that calls the hook; it restores the loader before the module's execution."""

    def __init__(self, name: str, loader: "Loader") -> None:
        self._name = name
        self._loader = loader

    def __getattr__(self, name: str) -> "Any":
        return getattr(self._loader, name)

    def exec_module(self, module: "ModuleType") -> None:
        module.__loader__ = self._loader
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        if self._name in EARLY_HOOKS:
            _fire(self._name, module)
        self._loader.exec_module(module)
        if self._name not in EARLY_HOOKS:
            _fire(self._name, module)


class _StandInLoader:
    """Loader of a stand-in; the import raises ModuleNotFoundError if the hook cannot fill the module."""

    def __init__(self, name: str) -> None:
        self._name = name

    def create_module(self, spec: "ModuleSpec") -> None:
        return None

    def exec_module(self, module: "ModuleType") -> None:
        if not _fire(self._name, module):
            raise ModuleNotFoundError("No module named " + repr(self._name), name=self._name)
