"""What a named token is: its form, whose it is, what it lets its holder do, and until when."""

from __future__ import annotations

import hashlib
import hmac
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Literal

if TYPE_CHECKING:
    from collections.abc import Iterable
    from datetime import datetime

    from vespera_exec.model.principal import Scope

TOKEN_PRINCIPAL: Final = "token:default"
"""Who brings the token of the data directory: its user himself."""

_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}\Z")
_ID = re.compile(r"[0-9a-f]{12}\Z")
FORM: Final = re.compile(rb"vsp_([0-9a-f]{12})_[0-9a-f]{40}")
"""The whole of a token; its group is the id, which is no secret. All are of one length."""
FORM_PREFIX: Final = b"vsp_"
FORM_BYTES: Final = 57
BEGINNING: Final = re.compile(rb"v(?:s(?:p(?:_(?:[0-9a-f]{0,11}|[0-9a-f]{12}(?:_[0-9a-f]{0,39})?))?)?)?\Z")
"""What may be the beginning of a token, at the end of some bytes."""

State = Literal["valid", "expired", "revoked"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Token:
    """A token as it is kept: of its secret there is only the SHA-256 of the whole, `digest`.

    `created_by` is a principal. `expires_at` None: never. `revoked_at` is final.
    """

    id: str
    name: str
    digest: bytes
    scopes: frozenset[Scope]
    created_at: datetime
    created_by: str
    expires_at: datetime | None = None
    last_used_at: datetime | None = None
    revoked_at: datetime | None = None

    @property
    def principal(self) -> str:
        return f"token:{self.name}"

    def state(self, now: datetime) -> State:
        if self.revoked_at is not None:
            return "revoked"
        return "expired" if self.expires_at is not None and now >= self.expires_at else "valid"


def digest_of(token: bytes) -> bytes:
    return hashlib.sha256(token).digest()


def is_whole(given: bytes, digest: bytes) -> bool:
    """`given` is the token of this digest; takes the same time whatever it is."""
    return hmac.compare_digest(digest_of(given), digest)


def is_name(name: str) -> bool:
    """A token may be called so. `default` is the data directory's own; what looks like an id would be taken for one."""
    return bool(_NAME.match(name)) and not _ID.match(name) and f"token:{name}" != TOKEN_PRINCIPAL


def granted(chosen: Iterable[Scope]) -> frozenset[Scope]:
    """The scopes of who was given `chosen`: whoever may start work may also look at it."""
    scopes = set(chosen)
    if "operate" in scopes:
        scopes.add("read")
    return frozenset(scopes)
