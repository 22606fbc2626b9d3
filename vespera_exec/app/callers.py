"""Who asks, for the handler that answers: set by a door, handed to the use cases by its skins."""

from __future__ import annotations

from contextvars import ContextVar

from vespera_exec.model.principal import Caller

NOBODY = Caller(principal="nobody", scopes=frozenset(), over_tcp=True)
"""Who asks where no door has said so: may nothing."""

current_caller: ContextVar[Caller] = ContextVar("current_caller", default=NOBODY)
