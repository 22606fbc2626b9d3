"""The routes of plans: their steps, checkpoints, what failed for good, and the capacity that steps share."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import orjson
from pydantic import Field
from starlette.responses import Response

from vespera_exec.app.callers import current_caller, require
from vespera_exec.app.checkpoints.views import NewCheckpoint, Restore
from vespera_exec.app.dead_letters.views import DecideDeadLetters
from vespera_exec.app.plans.views import CheckPlan, ExecutePlan
from vespera_exec.app.shapes import Request
from vespera_exec.server.http import requests
from vespera_exec.server.http.answering import id_of, json, route

if TYPE_CHECKING:
    from starlette.requests import Request as HttpRequest
    from starlette.routing import BaseRoute

    from vespera_exec.app.service import Vespera


class _Nothing(Request):
    pass


class _Steps(Request):
    status: str | None = None
    after: Annotated[int, Field(ge=-1, le=2**31)] = -1
    limit: Annotated[int, Field(ge=1, le=1000)] = 100


class _Control(Request):
    reason: str = "User requested"


class _Checkpoints(Request):
    limit: Annotated[int, Field(ge=1, le=200)] = 50
    before: str | None = None


class _DeadLetters(Request):
    role: str | None = None
    limit: Annotated[int, Field(ge=1, le=200)] = 50
    page: str | None = None


class PlanRoutes:
    def __init__(self, vespera: Vespera) -> None:
        self._vespera = vespera

    def routes(self) -> list[BaseRoute]:
        step = "/tasks/{id}/steps/{step}"
        return [
            route("POST", "/plans", self.execute),
            route("POST", "/plans/check", self.check),
            route("GET", "/plans/schema", self.schema),
            route("GET", "/tasks/{id}/steps", self.steps),
            route("POST", step + "/cancel", self.cancel),
            route("POST", step + "/pause", self.pause),
            route("POST", step + "/resume", self.resume),
            route("POST", "/tasks/{id}/checkpoints", self.create_checkpoint),
            route("GET", "/tasks/{id}/checkpoints", self.checkpoints),
            route("POST", "/tasks/{id}/restore", self.restore_last),
            route("GET", "/checkpoints/{id}", self.checkpoint),
            route("POST", "/checkpoints/{id}/restore", self.restore),
            route("GET", "/dead-letters", self.dead_letters),
            route("POST", "/dead-letters/requeue", self.requeue),
            route("POST", "/dead-letters/discard", self.discard),
            route("GET", "/capacity", self.capacity),
        ]

    async def execute(self, request: HttpRequest) -> Response:
        requests.query(request, _Nothing)
        asked = await requests.body(request, ExecutePlan)
        handle = await self._vespera.plans.execute(current_caller.get(), asked)
        return json(handle, status=200 if handle.done else 202)

    async def check(self, request: HttpRequest) -> Response:
        """200 also for a plan that is not valid: what is wrong with it is the answer."""
        requests.query(request, _Nothing)
        asked = await requests.body(request, CheckPlan)
        return json(await self._vespera.plans.check(current_caller.get(), asked))

    async def schema(self, request: HttpRequest) -> Response:
        from vespera_exec.app.plans.files import plan_schema

        requests.query(request, _Nothing)
        require(current_caller.get(), "read")
        return Response(orjson.dumps(plan_schema()), media_type="application/schema+json")

    async def steps(self, request: HttpRequest) -> Response:
        asked = requests.query(request, _Steps)
        page = await self._vespera.list_steps(
            current_caller.get(), id_of(request), status=asked.status, after=asked.after, limit=asked.limit
        )
        return json(page)

    async def cancel(self, request: HttpRequest) -> Response:
        any_id, step, reason = await _step(request)
        answer = await self._vespera.plans.cancel_step(any_id, step, current_caller.get(), reason=reason)
        return json(answer, status=200 if answer.success else 409)

    async def pause(self, request: HttpRequest) -> Response:
        any_id, step, reason = await _step(request)
        answer = await self._vespera.plans.pause_step(any_id, step, current_caller.get(), reason=reason)
        return json(answer, status=202 if answer.pending else 200 if answer.success else 409)

    async def resume(self, request: HttpRequest) -> Response:
        any_id, step, reason = await _step(request)
        answer = await self._vespera.plans.resume_step(any_id, step, current_caller.get(), reason=reason)
        return json(answer, status=200 if answer.success else 409)

    async def create_checkpoint(self, request: HttpRequest) -> Response:
        requests.query(request, _Nothing)
        asked = await requests.body(request, NewCheckpoint)
        made = await self._vespera.checkpoints.create(current_caller.get(), id_of(request), metadata=asked.metadata)
        return json(made, status=201)

    async def checkpoints(self, request: HttpRequest) -> Response:
        asked = requests.query(request, _Checkpoints)
        listed = await self._vespera.checkpoints.list(
            current_caller.get(), id_of(request), limit=asked.limit, before=asked.before
        )
        return json(listed)

    async def checkpoint(self, request: HttpRequest) -> Response:
        requests.query(request, _Nothing)
        return json(await self._vespera.checkpoints.get(current_caller.get(), id_of(request)))

    async def restore(self, request: HttpRequest) -> Response:
        requests.query(request, _Nothing)
        asked = await requests.body(request, Restore)
        restored = await self._vespera.checkpoints.restore(current_caller.get(), id_of(request), wait_ms=asked.wait_ms)
        return json(restored, status=200 if restored.done else 202)

    async def restore_last(self, request: HttpRequest) -> Response:
        requests.query(request, _Nothing)
        asked = await requests.body(request, Restore)
        restored = await self._vespera.checkpoints.restore(
            current_caller.get(), any_id=id_of(request), wait_ms=asked.wait_ms
        )
        return json(restored, status=200 if restored.done else 202)

    async def dead_letters(self, request: HttpRequest) -> Response:
        asked = requests.query(request, _DeadLetters)
        listed = await self._vespera.dead_letters.list(
            current_caller.get(), role=asked.role, limit=asked.limit, page=asked.page
        )
        return json(listed)

    async def requeue(self, request: HttpRequest) -> Response:
        requests.query(request, _Nothing)
        asked = await requests.body(request, DecideDeadLetters)
        requeued = await self._vespera.dead_letters.requeue(
            current_caller.get(), asked.task_ids, all=asked.all, role=asked.role, limit=asked.limit
        )
        return json(requeued)

    async def discard(self, request: HttpRequest) -> Response:
        requests.query(request, _Nothing)
        asked = await requests.body(request, DecideDeadLetters)
        discarded = await self._vespera.dead_letters.discard(
            current_caller.get(), asked.task_ids, all=asked.all, role=asked.role, limit=asked.limit
        )
        return json(discarded)

    async def capacity(self, request: HttpRequest) -> Response:
        requests.query(request, _Nothing)
        return json(self._vespera.capacity.view(current_caller.get()))


async def _step(request: HttpRequest) -> tuple[str, str, str]:
    requests.query(request, _Nothing)
    asked = await requests.body(request, _Control)
    return id_of(request), request.path_params["step"], asked.reason
