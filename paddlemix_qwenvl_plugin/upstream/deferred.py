"""An object of upstream's that is made when it is first used: until then, nobody pays for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


class Deferred:
    """Becomes what `make` gives as soon as anything is asked of it, and is that object from then on.

    A subclass names in `kept` what it answers itself.
    """

    kept: tuple[str, ...] = ()

    def __init__(self, make: Callable[[], Any]) -> None:
        state(self).update(make=make, steps=[])

    def __getattribute__(self, name: str) -> Any:
        if name in type(self).kept:
            return object.__getattribute__(self, name)
        if (
            name == "__class__"
        ):  # isinstance() asks for it, and looks no further at one that becomes another meanwhile
            return type(_made(self))
        return getattr(become(self), name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(become(self), name, value)

    def __delattr__(self, name: str) -> None:
        delattr(become(self), name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return become(self)(*args, **kwargs)

    def __repr__(self) -> str:
        return repr(become(self))


def state(deferred: Deferred) -> dict[str, Any]:
    """What it knows while it is deferred; functions in its list `steps` are called on what is made, in order."""
    found: dict[str, Any] = object.__getattribute__(deferred, "__dict__")
    return found


def become(deferred: Any) -> Any:
    """Make the object, unless that was done; `deferred` itself, which is it now."""
    if issubclass(type(deferred), Deferred):
        real = _made(deferred)
        object.__setattr__(deferred, "__dict__", real.__dict__)
        object.__setattr__(deferred, "__class__", type(real))
    return deferred


def _made(deferred: Deferred) -> Any:
    known = state(deferred)
    if "real" not in known:
        try:
            real = known["make"]()
            for step in known["steps"]:
                step(real)
        except AttributeError as error:  # which isinstance() and hasattr() would take for an answer
            raise RuntimeError(f"AttributeError: {error}") from error
        known["real"] = real
    return known["real"]
