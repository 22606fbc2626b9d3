"""Who asks: set by a door, handed to the use cases by its skins; and whether he may."""

from __future__ import annotations

from contextvars import ContextVar

from vespera_exec.errors import PermissionDenied
from vespera_exec.model.principal import Caller

NOBODY = Caller(principal="nobody", scopes=frozenset(), over_tcp=True)
"""Who asks where no door has said so: may nothing."""

current_caller: ContextVar[Caller] = ContextVar("current_caller", default=NOBODY)


def require(caller: Caller, scope: str) -> None:
    """
    Raises:
        PermissionDenied: the caller lacks the scope.
    """
    if scope not in caller.scopes:
        raise PermissionDenied(
            f"{caller.principal} lacks the scope {scope}",
            hint=f"use a token that has it: `vespera-exec token create NAME --scope {scope}` makes one",
        )


def require_local(caller: Caller) -> None:
    """
    Raises:
        PermissionDenied: the caller came by TCP.
    """
    if not caller.is_local:
        raise PermissionDenied(f"{caller.principal} may not do this", hint="use the command line of its own user")
