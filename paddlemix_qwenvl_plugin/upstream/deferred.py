"""Lazy creation of an upstream object at its first use."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


class Deferred:
    """Placeholder that turns into the object returned by `make` at the first attribute access or call.

    Attributes named in a subclass's `kept` do not trigger this. Reading `__class__`, as isinstance() does, creates the
    object, but the placeholder does not yet turn into it.
    """

    kept: tuple[str, ...] = ()

    def __init__(self, make: Callable[[], Any]) -> None:
        state(self).update(make=make, steps=[])

    def __getattribute__(self, name: str) -> Any:
        if name in type(self).kept:
            return object.__getattribute__(self, name)
        if name == "__class__":  # for isinstance(): the class of `self` must not change during the call
            return type(_real_object(self))
        return getattr(materialize(self), name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(materialize(self), name, value)

    def __delattr__(self, name: str) -> None:
        delattr(materialize(self), name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the real object."""
        return materialize(self)(*args, **kwargs)

    def __repr__(self) -> str:
        return repr(materialize(self))


def state(deferred: Deferred) -> dict[str, Any]:
    """Return the attributes of a deferred object itself, without making the real object.

    When the real object is made, the functions in the list `steps` are called on it.
    """
    fields: dict[str, Any] = object.__getattribute__(deferred, "__dict__")
    return fields


def materialize(deferred: Any) -> Any:
    """Turn `deferred` into the real object, unless it is already, and return it."""
    if issubclass(type(deferred), Deferred):
        real = _real_object(deferred)
        object.__setattr__(deferred, "__dict__", real.__dict__)
        object.__setattr__(deferred, "__class__", type(real))
    return deferred


def _real_object(deferred: Deferred) -> Any:
    fields = state(deferred)
    if "real" not in fields:
        try:
            real = fields["make"]()
            for step in fields["steps"]:
                step(real)
        except AttributeError as error:  # isinstance() and hasattr() would swallow it
            raise RuntimeError(f"AttributeError: {error}") from error
        fields["real"] = real
    return fields["real"]
