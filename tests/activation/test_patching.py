"""Atomic patching: either all changes of a hook are made, or none. Also replacements, which can be undone."""

from __future__ import annotations

from types import ModuleType

import pytest

from paddlemix_qwenvl_plugin.upstream.patching import patching, replace, undo_all


class Base:
    @staticmethod
    def static() -> str:
        return "base's"


class Derived(Base):
    @property
    def value(self) -> int:
        return 1


def patch_module(module: ModuleType, error: BaseException | None = None) -> None:
    """Patch the module and Derived, then raise the error, if any, inside of `patching`."""
    with patching(module) as patch:
        patch.set(module, "name", 2)
        patch.set(module, "name", 3)
        patch.set(module, "added", None)
        patch.set(Derived, "static", staticmethod(lambda: "patched"))
        patch.set(Derived, "value", 5)
        if error is not None:
            raise error


@pytest.fixture
def module() -> ModuleType:
    module = ModuleType("upstream.module")
    module.name = 1  # type: ignore[attr-defined]
    return module


@pytest.mark.parametrize("error", [ValueError("no"), KeyboardInterrupt()])
def test_error_undoes_all_changes(module: ModuleType, error: BaseException) -> None:
    module_attributes, class_attributes = dict(vars(module)), dict(vars(Derived))
    with pytest.raises(type(error)):
        patch_module(module, error)
    assert vars(module) == module_attributes
    assert dict(vars(Derived)) == class_attributes
    assert "static" not in vars(Derived)  # inherited again, not set to the base's value
    assert Derived().value == 1
    assert Derived.static() == "base's"


def test_changes_remain_without_an_error(module: ModuleType) -> None:
    class_attributes = dict(vars(Derived))
    try:
        patch_module(module)
        assert (module.name, module.added) == (3, None)
        assert (Derived.static(), Derived().value) == ("patched", 5)
    finally:
        del Derived.static
        Derived.value = class_attributes["value"]


def test_replace_has_an_effect_once_and_can_be_undone(module: ModuleType) -> None:
    for _ in range(2):  # the second call must not wrap the wrapper of the first
        replace(module, "name", lambda value: [value])
    replace(Derived, "static", lambda _: staticmethod(lambda: "replaced"))
    assert (module.name, Derived.static()) == ([1], "replaced")
    undo_all()
    assert module.name == 1
    assert "static" not in vars(Derived)
    replace(module, "name", lambda value: [value])
    assert module.name == [1]
    undo_all()
