"""Who asks, and from where."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Final, Literal

from vespera_exec.paths import CALLER_ENV

if TYPE_CHECKING:
    from collections.abc import Mapping

LOCAL = "local"
Scope = Literal["read", "operate", "worker"]
"""What a caller may: look; create, execute, cancel, pause, resume, answer; take work and report on it."""
SCOPES: Final[tuple[Scope, ...]] = ("read", "operate", "worker")


_NO_ENV: Final[Mapping[str, str]] = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class Caller:
    """A principal at a door.

    `principal` is "local" (our uid over a unix socket, in-process stdio, the embedding program) or the
    subject of a token. `cwd` and `env` are where a local caller stands; `env` is already cut to `CALLER_ENV`.
    """

    principal: str = LOCAL
    scopes: frozenset[str] = frozenset(SCOPES)
    over_tcp: bool = False
    sees_only: str | None = None
    """Tasks of this principal are all there are for it; None: it sees every task of the data directory."""
    token: str | None = None
    """The id of the named token that brought it here."""
    cwd: str | None = None
    env: Mapping[str, str] = field(default_factory=lambda: _NO_ENV)

    def sees(self, principal: str) -> bool:
        """Whether a task of `principal` is there for this caller."""
        return self.sees_only is None or self.sees_only == principal

    @property
    def is_local(self) -> bool:
        return self.principal == LOCAL and not self.over_tcp


def allowed_env(environ: Mapping[str, str]) -> dict[str, str]:
    """The part of an environment that may travel with a request."""
    return {name: environ[name] for name in CALLER_ENV if name in environ}
