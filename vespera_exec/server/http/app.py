"""The REST door: each use case once more, as a route."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.routing import Mount, Route

from vespera_exec.app.callers import current_caller
from vespera_exec.app.replies import by_key
from vespera_exec.app.token_views import NewToken
from vespera_exec.app.views import (
    Backup,
    DaemonView,
    Execute,
    GiveAnswers,
    InputView,
    NewTask,
    Request,
    View,
)
from vespera_exec.app.workers.views import Claim, Conclude, Report
from vespera_exec.server.http import requests
from vespera_exec.server.http.answering import id_of, json, route
from vespera_exec.server.http.plan_routes import PlanRoutes
from vespera_exec.server.http.problems import problem
from vespera_exec.server.http.sse import EventStream, LogEvent, resume_cursor, wants_event_stream

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from contextlib import AbstractAsyncContextManager

    from starlette.requests import Request as HttpRequest
    from starlette.routing import BaseRoute
    from starlette.types import ASGIApp

    from vespera_exec.app.service import Vespera
    from vespera_exec.app.views import Json

    Lifespan = Callable[[Starlette], AbstractAsyncContextManager[None]]

MAX_WAIT_MS = 25_000
_MAX_PAGE_BYTES = 1024 * 1024
_OUTPUT_LIMIT = 4000

Cursor = Annotated[int, Field(ge=0, le=2**63 - 1)]
WaitMs = Annotated[int, Field(ge=0, le=MAX_WAIT_MS)]


class _Nothing(Request):
    pass


class _List(Request):
    status: str | None = None
    role: str | None = None
    text: str | None = None
    limit: int = 20
    page: str | None = None


class _Detail(Request):
    detail: bool = False


class _Events(Request):
    cursor: Cursor = 0
    wait_ms: WaitMs = 0
    max_events: Annotated[int, Field(ge=1, le=1000)] = 100


class _Result(Request):
    output_offset: Cursor | None = None
    output_limit: Annotated[int, Field(ge=0, le=_MAX_PAGE_BYTES)] | None = None


class _Output(Request):
    stream: Literal["combined", "stdout", "stderr"] = "combined"
    offset: Cursor = 0
    limit: Annotated[int, Field(ge=1, le=_MAX_PAGE_BYTES)] = 65_536
    wait_ms: WaitMs = 0


class _Cancel(Request):
    reason: str = "User requested"
    wait_ms: WaitMs = 0


class _Pause(Request):
    reason: str = "User requested"
    wait_ms: WaitMs = 5000


class _Resume(Request):
    reason: str = "User requested"


class _Inputs(Request):
    limit: Annotated[int, Field(ge=1, le=200)] = 20


class _RunInputs(View):
    """The questions that a run waits for."""

    task_id: str
    session_id: str | None
    status: str
    done: bool
    inputs: list[InputView]


def build_http_app(
    vespera: Vespera,
    *,
    describe: Callable[[], DaemonView] | None = None,
    mcp: ASGIApp | None = None,
    lifespan: Lifespan | None = None,
) -> Starlette:
    """All routes of the HTTP door, without its guard: `listeners.serve_http` puts one in front of each socket.

    `describe` answers `GET /daemon`; it is asked at each request, so it may name addresses that are known
    only after the app was built. `mcp` serves both transports of MCP.
    """
    api = _Api(vespera, describe or vespera.describe)
    app = Starlette(
        routes=[*_mcp_routes(mcp), *api.routes()],  # they are tried in this order
        exception_handlers={HTTPException: _no_such_route},
        lifespan=lifespan,
    )
    # A redirect would be built from the Host header, and loses the body of a POST with some clients.
    app.router.redirect_slashes = False
    return app


def _mcp_routes(mcp: ASGIApp | None) -> list[BaseRoute]:
    if mcp is None:
        return []
    return [
        Route("/mcp", endpoint=mcp),
        Route("/sse", endpoint=mcp, methods=["GET"]),
        Mount("/messages/", app=mcp),
    ]


class _Api:
    def __init__(self, vespera: Vespera, describe: Callable[[], DaemonView]) -> None:
        self._vespera = vespera
        self._describe = describe

    def routes(self) -> list[BaseRoute]:
        routes = [
            route("POST", "/tasks", self.create_task),
            route("GET", "/tasks", self.list_tasks),
            route("GET", "/tasks/{id}", self.status),
            route("GET", "/tasks/{id}/definition", self.definition),
            route("POST", "/executions", self.execute),
            route("GET", "/executions/{id}", self.status),
            route("GET", "/inputs", self.all_inputs),
            route("POST", "/worker/claim", self.claim),
            route("POST", "/worker/report", self.report),
            route("POST", "/worker/complete", self.conclude),
            route("GET", "/roles", self.roles),
            route("GET", "/daemon", self.daemon),
            route("POST", "/doctor", self.doctor),
            route("POST", "/backup", self.backup),
            route("GET", "/healthz", self.healthz),
            route("POST", "/tokens", self.create_token),
            route("GET", "/tokens", self.list_tokens),
            route("DELETE", "/tokens/{id}", self.revoke_token),
        ]
        for prefix in ("/tasks/{id}", "/executions/{id}"):
            routes += [
                route("GET", prefix + "/progress", self.progress),
                route("GET", prefix + "/events", self.events),
                route("GET", prefix + "/result", self.result),
                route("GET", prefix + "/output", self.output),
                route("POST", prefix + "/cancel", self.cancel),
                route("POST", prefix + "/pause", self.pause),
                route("POST", prefix + "/resume", self.resume),
                route("GET", prefix + "/inputs", self.inputs),
                route("POST", prefix + "/inputs", self.answer),
                route("GET", prefix + "/metrics", self.metrics),
            ]
        return [*routes, *PlanRoutes(self._vespera).routes()]

    async def create_task(self, request: HttpRequest) -> Response:
        requests.query(request, _Nothing)
        new = await requests.body(request, NewTask)
        return json(await self._vespera.create_task(current_caller.get(), new), status=201)

    async def list_tasks(self, request: HttpRequest) -> Response:
        asked = requests.query(request, _List)
        page = await self._vespera.list_tasks(
            current_caller.get(),
            status=asked.status,
            role=asked.role,
            text=asked.text,
            limit=asked.limit,
            page=asked.page,
        )
        return json(page)

    async def status(self, request: HttpRequest) -> Response:
        asked = requests.query(request, _Detail)
        return json(await self._vespera.get_status(current_caller.get(), id_of(request), detail=asked.detail))

    async def definition(self, request: HttpRequest) -> Response:
        requests.query(request, _Nothing)
        return json(await self._vespera.get_task(current_caller.get(), id_of(request)))

    async def execute(self, request: HttpRequest) -> Response:
        requests.query(request, _Nothing)
        handle = await self._vespera.execute_task(current_caller.get(), await requests.body(request, Execute))
        return json(handle, status=200 if handle.done else 202)

    async def progress(self, request: HttpRequest) -> Response:
        requests.query(request, _Nothing)
        progress = await self._vespera.get_progress(current_caller.get(), id_of(request))
        return Response(status_code=204) if progress is None else json(progress)

    async def events(self, request: HttpRequest) -> ASGIApp:
        asked = requests.query(request, _Events)
        if request.method == "GET" and wants_event_stream(request.headers.get("accept", "")):
            return await self._event_stream(request, asked.cursor)
        page = await self._vespera.read_events(
            current_caller.get(),
            id_of(request),
            cursor=asked.cursor,
            wait_ms=asked.wait_ms,
            max_events=asked.max_events,
        )
        return json(page)

    async def result(self, request: HttpRequest) -> Response:
        asked = requests.query(request, _Result)
        limit = asked.output_limit
        if limit is None:
            limit = 0 if asked.output_offset is None else _OUTPUT_LIMIT
        result = await self._vespera.get_result(
            current_caller.get(), id_of(request), output_offset=asked.output_offset, output_limit=limit
        )
        return json(result)

    async def output(self, request: HttpRequest) -> Response:
        asked = requests.query(request, _Output)
        page = await self._vespera.read_output(
            current_caller.get(),
            id_of(request),
            stream=asked.stream,
            offset=asked.offset,
            limit=asked.limit,
            wait_ms=asked.wait_ms,
        )
        return json(page)

    async def cancel(self, request: HttpRequest) -> Response:
        requests.query(request, _Nothing)
        asked = await requests.body(request, _Cancel)
        answer = await self._vespera.cancel(
            current_caller.get(), id_of(request), reason=asked.reason, wait_ms=asked.wait_ms
        )
        return json(answer, status=200 if answer.success else 409)

    async def pause(self, request: HttpRequest) -> Response:
        requests.query(request, _Nothing)
        asked = await requests.body(request, _Pause)
        answer = await self._vespera.pause(
            current_caller.get(), id_of(request), reason=asked.reason, wait_ms=asked.wait_ms
        )
        return json(answer, status=202 if answer.pending else 200 if answer.success else 409)

    async def resume(self, request: HttpRequest) -> Response:
        requests.query(request, _Nothing)
        asked = await requests.body(request, _Resume)
        answer = await self._vespera.resume(current_caller.get(), id_of(request), reason=asked.reason)
        return json(answer, status=200 if answer.success else 409)

    async def all_inputs(self, request: HttpRequest) -> Response:
        asked = requests.query(request, _Inputs)
        return json(await self._vespera.list_inputs(current_caller.get(), limit=asked.limit))

    async def inputs(self, request: HttpRequest) -> Response:
        requests.query(request, _Nothing)
        status = await self._vespera.get_status(current_caller.get(), id_of(request))
        return json(
            _RunInputs(
                task_id=status.task_id,
                session_id=status.session_id,
                status=status.status,
                done=status.done,
                inputs=status.inputs or [],
            )
        )

    async def answer(self, request: HttpRequest) -> Response:
        requests.query(request, _Nothing)
        caller, any_id = current_caller.get(), id_of(request)
        given = await requests.body(request, GiveAnswers)
        status = await self._vespera.get_status(caller, any_id)
        answered = await self._vespera.answer_input(caller, any_id, by_key(given, status.inputs))
        return json(answered, status=200 if answered.success else 409)

    async def metrics(self, request: HttpRequest) -> Response:
        requests.query(request, _Nothing)
        return json(await self._vespera.get_metrics(current_caller.get(), id_of(request)))

    async def claim(self, request: HttpRequest) -> Response:
        requests.query(request, _Nothing)
        asked = await requests.body(request, Claim)
        # Given to a client that is gone, a task would wait for the end of its lease.
        claimed = await requests.while_connected(request, self._vespera.workers.claim(current_caller.get(), asked))
        return Response(status_code=204) if claimed is None else json(claimed)

    async def report(self, request: HttpRequest) -> Response:
        requests.query(request, _Nothing)
        asked = await requests.body(request, Report)
        return json(await self._vespera.workers.report(current_caller.get(), asked))

    async def conclude(self, request: HttpRequest) -> Response:
        requests.query(request, _Nothing)
        asked = await requests.body(request, Conclude)
        return json(await self._vespera.workers.conclude(current_caller.get(), asked))

    async def roles(self, request: HttpRequest) -> Response:
        requests.query(request, _Nothing)
        return json(self._vespera.list_roles(current_caller.get()))

    async def daemon(self, request: HttpRequest) -> Response:
        requests.query(request, _Nothing)
        caller, whole = current_caller.get(), self._describe()
        return json(whole if caller.sees_only is None else self._vespera.visit(caller, url=whole.url))

    async def doctor(self, request: HttpRequest) -> Response:
        requests.query(request, _Nothing)
        await requests.body(request, _Nothing)
        return json(await self._vespera.doctor(current_caller.get()))

    async def backup(self, request: HttpRequest) -> Response:
        requests.query(request, _Nothing)
        asked = await requests.body(request, Backup)
        return json(await self._vespera.backup(current_caller.get(), asked), status=201)

    async def create_token(self, request: HttpRequest) -> Response:
        requests.query(request, _Nothing)
        asked = await requests.body(request, NewToken)
        return json(await self._vespera.access.create(current_caller.get(), asked), status=201)

    async def list_tokens(self, request: HttpRequest) -> Response:
        requests.query(request, _Nothing)
        return json(self._vespera.access.listed(current_caller.get()))

    async def revoke_token(self, request: HttpRequest) -> Response:
        requests.query(request, _Nothing)
        return json(await self._vespera.access.revoke(current_caller.get(), id_of(request)))

    async def healthz(self, request: HttpRequest) -> Response:
        requests.query(request, _Nothing)
        return Response(b'{"status":"ok"}', media_type="application/json")

    async def _event_stream(self, request: HttpRequest, cursor: int) -> EventStream:
        caller, any_id = current_caller.get(), id_of(request)
        cursor = resume_cursor(request.headers.get("last-event-id"), cursor)
        # What can be refused is refused before the stream begins: after its first byte there is no status code.
        await self._vespera.read_events(caller, any_id, cursor=cursor, max_events=1)
        last = cursor

        async def events() -> AsyncIterator[LogEvent]:
            nonlocal last
            async for event in self._vespera.follow_events(caller, any_id, cursor=cursor):
                last = event.cursor
                yield event

        async def summary() -> dict[str, Json]:
            status = await self._vespera.get_status(caller, any_id)
            return {"done": True, "next_cursor": last, "status": status.status, "session_id": status.session_id}

        return EventStream(events(), summary)


async def _no_such_route(request: HttpRequest, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    code = {404: "NOT_FOUND", 405: "METHOD_NOT_ALLOWED"}.get(error.status_code, "HTTP_ERROR")
    return problem(error.status_code, code, f"{request.method} leads nowhere here", headers=error.headers)
