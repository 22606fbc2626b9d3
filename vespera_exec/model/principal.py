"""Who asks, and from where."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING

from vespera_exec.paths import CALLER_ENV

if TYPE_CHECKING:
    from collections.abc import Mapping

LOCAL = "local"


def _no_env() -> Mapping[str, str]:
    return MappingProxyType({})


@dataclass(frozen=True, slots=True)
class Caller:
    """A principal at a door.

    `principal` is "local" (our uid over a unix socket, in-process stdio, the embedding program) or the
    subject of a token. `scopes` apply to tokens only. `cwd` and `env` are where a local caller stands;
    `env` is already cut to `CALLER_ENV`.
    """

    principal: str = LOCAL
    scopes: frozenset[str] = frozenset({"read", "operate"})
    over_tcp: bool = False
    sees_only: str | None = None
    """Tasks of this principal are all there are for it; None: it sees every task of the data directory."""
    cwd: str | None = None
    env: Mapping[str, str] = field(default_factory=_no_env)

    def sees(self, principal: str) -> bool:
        """Whether a task of `principal` is there for this caller."""
        return self.sees_only is None or self.sees_only == principal

    @property
    def is_local(self) -> bool:
        return self.principal == LOCAL and not self.over_tcp


def allowed_env(environ: Mapping[str, str]) -> dict[str, str]:
    """The part of an environment that may travel with a request."""
    return {name: environ[name] for name in CALLER_ENV if name in environ}
