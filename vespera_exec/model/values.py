"""Frozen values with some fields changed, at a fraction of what `dataclasses.replace` costs."""

from __future__ import annotations

from dataclasses import fields
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable

    from _typeshed import DataclassInstance

T = TypeVar("T")


class Copy(Protocol[T]):
    def __call__(self, value: T, /, **changes: Any) -> T:
        """A copy of `value` with these fields changed; nothing is checked, `__post_init__` is not called.

        Raises:
            AttributeError: there is no such field.
        """
        ...


def copier(kind: type[T]) -> Copy[T]:
    """The function that copies values of `kind`, a frozen dataclass with slots and without a base.

    It is written once, as the dataclass's own `__init__` is: a plain assignment for each field, into an object
    whose class has the same slots and is not frozen yet. For a `Lifecycle` that takes 1 µs, not 8.
    """
    names = _names(kind)
    draft = drafts(kind)
    lines = (
        "def copy(value, /, **changes):",
        "    made = draft()",
        *(f"    made.{name} = value.{name}" for name in names),
        "    for name, new in changes.items():",
        "        setattr(made, name, new)",
        "    made.__class__ = kind",
        "    return made",
    )
    space: dict[str, Any] = {"draft": draft, "kind": kind}
    exec("\n".join(lines), space)
    return space["copy"]


def drafts(kind: type[T]) -> Callable[[], Any]:
    """Makes objects with the slots of `kind` to be filled in and sealed with `made.__class__ = kind`.

    `kind` is a frozen dataclass with slots, whose own `__init__` pays a function call for each field.
    """
    return type(f"{kind.__name__}Draft", (), {"__slots__": _names(kind)})


def _names(kind: type[DataclassInstance] | type[Any]) -> tuple[str, ...]:
    return tuple(each.name for each in fields(kind))
