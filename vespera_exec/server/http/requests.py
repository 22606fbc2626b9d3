"""What a request carries, read strictly: one meaning or a refusal that says why."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

import anyio
from pydantic import ValidationError

from vespera_exec.app import checks
from vespera_exec.app.views import Request
from vespera_exec.errors import InvalidInput, VesperaError
from vespera_exec.model.jsonable import parsed_json

if TYPE_CHECKING:
    from collections.abc import Awaitable

    from starlette.requests import Request as HttpRequest

_R = TypeVar("_R", bound=Request)
_T = TypeVar("_T")

_LARGE_BYTES = 128 * 1024
"""A body of more is not read in the loop."""


def query(request: HttpRequest, shape: type[_R]) -> _R:
    """The query parameters as a `shape`; a bare `?flag` is true.

    Raises:
        InvalidInput: one is unknown, given twice, or has a value that it cannot take.
    """
    given: dict[str, str] = {}
    for name, value in request.query_params.multi_items():
        if name in given:
            raise InvalidInput(f"query parameter {name!r} is given twice")
        if "\0" in value:
            raise InvalidInput(f"query parameter {name!r} has a NUL")
        given[name] = value or ("true" if _is_flag(shape, name) else "")
    try:
        return shape.model_validate(given)
    except ValidationError as error:
        raise InvalidInput(_complaint(error, "query parameter"), hint=_allowed(shape)) from None


async def body(request: HttpRequest, shape: type[_R]) -> _R:
    """The JSON body as a `shape`; no body at all counts as `{}`.

    Raises:
        InvalidInput: it is not a JSON object in UTF-8, is nested too deeply, or does not fit the shape.
    """
    raw = await request.body()
    if len(raw) <= _LARGE_BYTES:
        return _read(raw, shape)
    return await anyio.to_thread.run_sync(_read, raw, shape)


def _read(raw: bytes, shape: type[_R]) -> _R:
    try:
        given = parsed_json(raw or b"{}")
    except ValueError as error:
        raise InvalidInput(f"the body is not JSON: {error}") from None
    if not isinstance(given, dict):
        raise InvalidInput("the body is not a JSON object")
    checks.plain(given, "the body")
    try:
        return shape.model_validate(given, strict=True)
    except ValidationError as error:
        raise InvalidInput(_complaint(error, "field"), hint=_allowed(shape)) from None


async def while_connected(request: HttpRequest, call: Awaitable[_T]) -> _T | None:
    """What `call` gives; None where the client went away first, and the call with it. The body has been read.

    Raises:
        VesperaError: as `call`.
    """
    given: _T | None = None
    refusal: VesperaError | None = None

    async def until_gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass
        group.cancel_scope.cancel()

    async with anyio.create_task_group() as group:
        group.start_soon(until_gone)
        try:
            given = await call
        except VesperaError as error:
            refusal = error  # raised in here it would come out as a group
        group.cancel_scope.cancel()
    if refusal is not None:
        raise refusal
    return given


def _is_flag(shape: type[Request], name: str) -> bool:
    field = shape.model_fields.get(name)
    return field is not None and field.annotation is bool


def _allowed(shape: type[Request]) -> str:
    return "known: " + (", ".join(shape.model_fields) or "none")


def _complaint(error: ValidationError, noun: str) -> str:
    said: list[str] = []
    for each in error.errors(include_url=False, include_input=False, include_context=False)[:3]:
        where = ".".join(str(part) for part in each["loc"])[:100]
        said.append(f"{noun} {where!r}: {each['msg']}")
    return "; ".join(said)
