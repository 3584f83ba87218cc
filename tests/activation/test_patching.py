"""Atomic patching: all of a hook's changes or none."""

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


def change_and(module: ModuleType, error: BaseException | None) -> None:
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
    made = ModuleType("upstream.module")
    made.name = 1  # type: ignore[attr-defined]
    return made


@pytest.mark.parametrize("error", [ValueError("no"), KeyboardInterrupt()])
def test_all_is_undone(module: ModuleType, error: BaseException) -> None:
    before, of_class = dict(vars(module)), dict(vars(Derived))
    with pytest.raises(type(error)):
        change_and(module, error)
    assert vars(module) == before
    assert dict(vars(Derived)) == of_class
    assert "static" not in vars(Derived)  # inherited again, not a copy of the base's
    assert Derived().value == 1
    assert Derived.static() == "base's"


def test_all_is_kept(module: ModuleType) -> None:
    of_class = dict(vars(Derived))
    try:
        change_and(module, None)
        assert (module.name, module.added) == (3, None)
        assert (Derived.static(), Derived().value) == ("patched", 5)
    finally:
        del Derived.static
        Derived.value = of_class["value"]


def test_replaced_once_and_put_back(module: ModuleType) -> None:
    """A second call must not wrap the first one's wrapper."""
    for _ in range(2):
        replace(module, "name", lambda value: [value])
    replace(Derived, "static", lambda _: staticmethod(lambda: "replaced"))
    assert (module.name, Derived.static()) == ([1], "replaced")
    undo_all()
    assert module.name == 1
    assert "static" not in vars(Derived)
    replace(module, "name", lambda value: [value])
    assert module.name == [1]
    undo_all()
