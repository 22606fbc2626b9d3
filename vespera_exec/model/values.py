"""Frozen values with some fields changed, at a fraction of what `dataclasses.replace` costs."""

from __future__ import annotations

from dataclasses import fields
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

if TYPE_CHECKING:
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
    draft = type(f"{kind.__name__}Draft", (), {"__slots__": names})
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


def _names(kind: type[DataclassInstance] | type[Any]) -> tuple[str, ...]:
    return tuple(each.name for each in fields(kind))
