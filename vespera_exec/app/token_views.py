"""What is asked and shown of tokens, and of who holds one."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated

from pydantic import Field

from vespera_exec.app.views import Request, View
from vespera_exec.model.principal import Scope


class NewToken(Request):
    """A token to be made. Without `expires_seconds` it is good until it is revoked."""

    name: str
    scopes: list[Scope] = Field(default=["read", "operate"], min_length=1)
    expires_seconds: Annotated[int, Field(gt=0, le=100 * 366 * 86_400)] | None = None
    replace: bool = False
    """Also where the name has been used; the token that has it now ends."""


class TokenView(View):
    """A named token, without its secret. `state` is valid, expired or revoked."""

    id: str
    name: str
    principal: str
    scopes: list[str]
    state: str
    created_at: datetime
    created_by: str
    expires_at: datetime | None
    last_used_at: datetime | None
    revoked_at: datetime | None


class MadeToken(TokenView):
    token: str
    """Shown this once: only a digest of it is kept."""


class TokenList(View):
    tokens: list[TokenView]


class Visitor(View):
    """What the holder of a named token may know of the server and of himself."""

    version: str
    url: str | None
    principal: str
    scopes: list[str]
