"""Problem details (RFC 9457): what every refusal of the HTTP door looks like."""

from __future__ import annotations

from http import HTTPStatus
from typing import TYPE_CHECKING

import orjson
from starlette.responses import Response

from vespera_exec.errors import (
    Conflict,
    DaemonUnavailable,
    DataDirectoryInUse,
    InvalidInput,
    InvalidPlan,
    NotFound,
    PermissionDenied,
    StoreUnavailable,
    VesperaError,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

    from vespera_exec.app.shapes import Json

PROBLEM_JSON = "application/problem+json"
RETRY_AFTER_SECONDS = 5
_MOST_PROBLEMS = 1000

# The first that fits.
_STATUS: tuple[tuple[type[VesperaError], int], ...] = (
    (InvalidInput, 400),
    (PermissionDenied, 403),
    (NotFound, 404),
    (Conflict, 409),
    (StoreUnavailable, 503),
    (DataDirectoryInUse, 503),
    (DaemonUnavailable, 503),
)


class Refused(Exception):
    """A request that the door itself turns away, before any use case sees it."""

    def __init__(
        self, status: int, error_code: str, detail: str, *, hint: str = "", headers: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(detail)
        self.status = status
        self.error_code = error_code
        self.detail = detail
        self.hint = hint
        self.headers = headers

    def response(self) -> Response:
        return problem(self.status, self.error_code, self.detail, hint=self.hint, headers=self.headers)


def problem(
    status: int,
    error_code: str,
    detail: str,
    *,
    hint: str = "",
    headers: Mapping[str, str] | None = None,
    more: Mapping[str, Json] | None = None,
) -> Response:
    """`{type, title, status, detail, error_code, hint}` and `more`, as `application/problem+json`."""
    body = {
        "type": "about:blank",
        "title": HTTPStatus(status).phrase,
        "status": status,
        "detail": detail,
        "error_code": error_code,
        "hint": hint,
        **(more or {}),
    }
    return Response(orjson.dumps(body), status, headers=headers, media_type=PROBLEM_JSON)


def problem_of(error: VesperaError) -> Response:
    status = next((status for kind, status in _STATUS if isinstance(error, kind)), 500)
    headers = {"Retry-After": str(RETRY_AFTER_SECONDS)} if status == 503 else None
    more = {"problems": error.to_dict()["problems"][:_MOST_PROBLEMS]} if isinstance(error, InvalidPlan) else None
    return problem(status, error.error_code, error.message, hint=error.hint, headers=headers, more=more)


def unexpected(incident: str) -> Response:
    """What a caller may know of a fault of ours: that it happened, and what to look for in the log."""
    return problem(
        500, "INTERNAL_ERROR", f"Something went wrong here (incident {incident})", hint="the server's log says more"
    )
