"""What pure roles have answered: a step with the same inputs takes the result of an earlier one."""

from __future__ import annotations

import hashlib
import json
from dataclasses import fields
from typing import TYPE_CHECKING

from vespera_exec.errors import InvalidInput, RoleNotFound
from vespera_exec.model.ledger import CacheRecord

if TYPE_CHECKING:
    from collections.abc import Mapping

    from roles.definition import Role
    from roles.registry import RoleRegistry
    from vespera_exec.model.events import Json
    from vespera_exec.store.store import Store


class StepCache:
    """Of each principal its own. `inputs` are what the step's task was given: resolved, with the role's defaults.

    What a role is counts as well as its name: its file changed, nothing is found. No answer is kept here, only which
    execution has it, so it is there as long as that execution's result is.
    """

    def __init__(self, store: Store, roles: RoleRegistry) -> None:
        self._store = store
        self._roles = roles

    async def lookup(self, principal: str, role: str, inputs: Mapping[str, Json]) -> str | None:
        """The execution whose result is the answer; None where there is none, or the role is not pure."""
        key = self._key(role, inputs)
        return await self._store.queries.cached(key, principal) if key is not None else None

    def record(self, principal: str, role: str, inputs: Mapping[str, Json], execution_id: str) -> CacheRecord | None:
        """The row that says so, for `ledger.keep`, when `execution_id` has COMPLETED; None: the role is not pure."""
        key = self._key(role, inputs)
        return (
            CacheRecord(key=key, principal=principal, role=role, execution_id=execution_id) if key is not None else None
        )

    def _key(self, name: str, inputs: Mapping[str, Json]) -> bytes | None:
        try:
            role = self._roles.get(name)
        except (RoleNotFound, InvalidInput):
            return None
        if not role.pure:
            return None
        asked = json.dumps([role.name, _defined(role), dict(inputs)], sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(asked.encode()).digest()


def _defined(role: Role) -> str:
    """Everything that a role file says, as text; the callable of a program counts by its target."""
    return repr([(each.name, getattr(role, each.name)) for each in fields(role) if each.compare])
