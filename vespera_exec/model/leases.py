"""Who works on an execution that is done elsewhere, and how it proves that: the lease, of which a digest is kept."""

from __future__ import annotations

import hashlib
import hmac
import secrets
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

    from vespera_exec.model.events import Json


@dataclass(frozen=True, slots=True, kw_only=True)
class Lease:
    """One claim of an execution by a worker. `fence` counts the claims of the execution from 1.

    It ends `seconds` after the last report. `worker` is what the worker calls itself, `principal` who it is.
    """

    worker: str
    principal: str
    fence: int
    seconds: float
    digest: str

    def admits(self, key: str, principal: str) -> bool:
        """Whether `key`, shown by `principal`, is that of this claim."""
        return principal == self.principal and hmac.compare_digest(digest_of(key), self.digest)

    def to_dict(self) -> dict[str, Json]:
        return {
            "worker": self.worker,
            "principal": self.principal,
            "fence": self.fence,
            "seconds": self.seconds,
            "digest": self.digest,
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Json]) -> Lease:
        """The inverse of `to_dict`."""
        return cls(**data)


def new_key() -> str:
    """What a worker shows with every report; nobody else can know it."""
    return secrets.token_urlsafe(24)


def digest_of(key: str) -> str:
    """What the log keeps of a key."""
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).hexdigest()
