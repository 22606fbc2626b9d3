"""A route of the REST door: what it answers, also where its use case refuses or fails."""

from __future__ import annotations

import logging
import uuid
from collections.abc import Awaitable, Callable
from functools import wraps
from typing import TYPE_CHECKING

from starlette.responses import Response
from starlette.routing import Route

from vespera_exec.errors import VesperaError
from vespera_exec.server.http.problems import problem_of, unexpected

if TYPE_CHECKING:
    from pydantic import BaseModel
    from starlette.requests import Request as HttpRequest
    from starlette.types import ASGIApp

Endpoint = Callable[["HttpRequest"], Awaitable["ASGIApp"]]

log = logging.getLogger(__name__)


def route(method: str, path: str, endpoint: Endpoint) -> Route:
    @wraps(endpoint)
    async def answer(request: HttpRequest) -> ASGIApp:
        try:
            return await endpoint(request)
        except VesperaError as error:
            return problem_of(error)
        except Exception:
            # The door's boundary: a fault of ours costs this one answer. The caller gets no more than its name.
            incident = uuid.uuid4().hex[:12]
            log.exception("Incident %s: %s %s failed", incident, method, path)
            return unexpected(incident)

    return Route(path, answer, methods=[method])


def json(view: BaseModel, *, status: int = 200) -> Response:
    return Response(view.model_dump_json().encode(), status, media_type="application/json")


def id_of(request: HttpRequest) -> str:
    return request.path_params["id"]
