"""The one guard in front of everything that speaks HTTP: who may come in, with what, and as whom."""

from __future__ import annotations

import base64
import binascii
import hmac
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, cast
from urllib.parse import unquote_to_bytes

import orjson

from vespera_exec.app.callers import current_caller
from vespera_exec.errors import Unauthenticated
from vespera_exec.model.principal import Caller, allowed_env
from vespera_exec.model.tokens import FORM, TOKEN_PRINCIPAL
from vespera_exec.server.http.problems import Refused
from vespera_exec.server.incoming import MOST_VALUES, has_too_many_values

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from anyio import CancelScope
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

    from vespera_exec.app.access import Admission

_TOKEN_PARAMETERS = (b"token", b"access_token")
_CWD = b"x-vespera-cwd"
_ENV = b"x-vespera-env"
_VALUES = dict.fromkeys(("/plans", "/plans/check"), 8 * MOST_VALUES)
"""How many JSON values a body may hold, where that is more than elsewhere: a plan has thousands of steps."""


class Door(Protocol):
    """How one listener tells its callers apart."""

    def admit(self, headers: Headers) -> Pass:
        """Raises Refused."""
        ...


class Tokens(Protocol):
    """Who knows the named tokens: `app.access.Access`."""

    def admit(self, given: bytes) -> Admission:
        """Raises Unauthenticated."""
        ...


@dataclass(frozen=True, slots=True)
class Pass:
    """Who has come in; with a named token for as long as `admission` says."""

    caller: Caller
    admission: Admission | None = None

    def while_valid(self) -> AbstractContextManager[CancelScope | None]:
        return nullcontext() if self.admission is None else self.admission.while_valid()


class Headers:
    """The headers of one request, by lower-case name, and its query string. Values are compared as bytes."""

    __slots__ = ("_raw", "query")

    def __init__(self, scope: Scope) -> None:
        self._raw: list[tuple[bytes, bytes]] = scope["headers"]
        self.query: bytes = scope["query_string"]

    def all(self, name: bytes) -> list[bytes]:
        return [value for key, value in self._raw if key.lower() == name]

    def only(self, name: bytes) -> bytes | None:
        """The value; None when there is none, or more than one."""
        values = self.all(name)
        return values[0] if len(values) == 1 else None


@dataclass(frozen=True, slots=True, kw_only=True)
class TcpDoor:
    """Anything on this machine, and any page in its browsers, can knock here: token, Host and Origin must all fit.

    `token` is the user's own; `named` knows those that he has made for others.
    """

    token: str
    port: int
    host: str = "127.0.0.1"
    named: Tokens | None = None

    def admit(self, headers: Headers) -> Pass:
        names = self._names()
        host = headers.only(b"host")
        if host is None or host.lower() not in names:
            raise Refused(403, "WRONG_HOST", "This server does not answer to that Host", hint="use its own address")
        origins = headers.all(b"origin")
        if origins and not (len(origins) == 1 and origins[0] in {b"http://" + name for name in names}):
            raise Refused(403, "WRONG_ORIGIN", "Pages of other origins may not call this server")
        entry = self._entry(headers.only(b"authorization"))
        if _holds_token(headers.query):
            raise Refused(
                400, "INVALID_INPUT", "A token does not belong into an address", hint="send `Authorization: Bearer`"
            )
        return entry

    def _names(self) -> set[bytes]:
        own = f"[{self.host}]" if ":" in self.host else self.host
        hosts = {"127.0.0.1", "localhost", "[::1]", own.lower()}
        names = {f"{host}:{self.port}".encode() for host in hosts}
        return names | {host.encode() for host in hosts} if self.port == 80 else names

    def _entry(self, authorization: bytes | None) -> Pass:
        scheme, _, given = (authorization or b"").partition(b" ")
        given = given.strip() if scheme.lower() == b"bearer" else b""
        if hmac.compare_digest(given, self.token.encode()):
            return Pass(Caller(principal=TOKEN_PRINCIPAL, over_tcp=True))
        why = "Every request over TCP needs a valid token"
        if self.named is not None:
            try:
                admission = self.named.admit(given)
            except Unauthenticated as error:
                why = error.message
            else:
                return Pass(admission.caller, admission)
        raise unauthenticated(why)


@dataclass(frozen=True, slots=True)
class SocketDoor:
    """Only our own uid can reach this one (0600 in a 0700 folder); it says where it stands in two headers.

    `X-Vespera-Cwd` is a percent-encoded UTF-8 path, `X-Vespera-Env` the base64 of a JSON object of strings.
    """

    def admit(self, headers: Headers) -> Pass:
        if headers.all(b"origin"):
            raise Refused(403, "WRONG_ORIGIN", "Pages may not call this socket")
        return Pass(Caller(cwd=_cwd(headers.only(_CWD)), env=_env(headers.only(_ENV))))


class Guard:
    """ASGI: lets pass what `door` admits, within the limits, with the caller in `current_caller`; denies all else.

    A body arrives whole or not at all: more than `body_limit` bytes are 413, declared or counted; more JSON
    values than can be parsed without holding up others are 400. A body must be JSON (`application/json`,
    UTF-8), else 415. When the token of a request ceases to be valid, so does the request: an answer that has
    begun ends where it is, one that has not is the 401 that the next request would be.
    """

    def __init__(self, app: ASGIApp, door: Door, *, body_limit: int) -> None:
        self._app = app
        self._door = door
        self._body_limit = body_limit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        match scope["type"]:
            case "lifespan":
                await self._app(scope, receive, send)
            case "http":
                await self._http(scope, receive, send)
            case "websocket":
                await self._websocket(scope, receive, send)
            case other:
                raise RuntimeError(f"no way in for {other}")

    async def _http(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = Headers(scope)
        answer = _Answer(send)
        try:
            entry = self._door.admit(headers)
            with entry.while_valid() as valid:
                _check_media_type(headers)
                body = await self._body(headers, receive, most=_VALUES.get(scope["path"], MOST_VALUES))
                if body is not None:
                    await self._pass(entry.caller, scope, _replayed(body, receive), answer.send)
            if entry.admission is not None and valid is not None and valid.cancelled_caught:
                await answer.cut(scope, receive, entry.admission.why_over())
        except Refused as refusal:
            await refusal.response()(scope, receive, send)

    async def _websocket(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            entry = self._door.admit(Headers(scope))
        except Refused as refusal:
            await receive()
            if "websocket.http.response" in scope.get("extensions", {}):
                await refusal.response()(scope, receive, send)
            else:
                await send({"type": "websocket.close", "code": 1008})
            return
        with entry.while_valid() as valid:
            await self._pass(entry.caller, scope, receive, send)
        if valid is not None and valid.cancelled_caught:
            await send({"type": "websocket.close", "code": 1008})

    async def _pass(self, caller: Caller, scope: Scope, receive: Receive, send: Send) -> None:
        before = current_caller.set(caller)
        try:
            await self._app(scope, receive, send)
        finally:
            current_caller.reset(before)

    async def _body(self, headers: Headers, receive: Receive, *, most: int) -> bytes | None:
        """The whole body; None when the client went away before its end."""
        declared = headers.only(b"content-length")
        if declared is not None and declared.isdigit() and int(declared) > self._body_limit:
            raise self._too_large()
        chunks: list[bytes] = []
        size = 0
        while True:
            message = await receive()
            if message["type"] != "http.request":
                return None
            chunk: bytes = message.get("body", b"")
            size += len(chunk)
            if size > self._body_limit:
                raise self._too_large()
            chunks.append(chunk)
            if not message.get("more_body", False):
                body = b"".join(chunks)
                if has_too_many_values(body, most=most):
                    raise Refused(400, "INVALID_INPUT", f"A body may hold at most {most} JSON values")
                return body

    def _too_large(self) -> Refused:
        return Refused(413, "BODY_TOO_LARGE", f"A body may have at most {self._body_limit} bytes")


class _Answer:
    """An answer on its way: how much of it has been sent."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self._begun = False
        self._complete = False

    async def send(self, message: Message) -> None:
        self._begun = True
        self._complete = message["type"] == "http.response.body" and not message.get("more_body", False)
        await self._send(message)

    async def cut(self, scope: Scope, receive: Receive, why: str) -> None:
        """End it here: as if it were whole where it has begun, since the client can do no more with it either way."""
        if not self._begun:
            await unauthenticated(why).response()(scope, receive, self._send)
        elif not self._complete:
            await self._send({"type": "http.response.body", "body": b"", "more_body": False})


def unauthenticated(why: str) -> Refused:
    hint = "send `Authorization: Bearer` with a token: the file `token` of the data directory, or one made by its user"
    return Refused(401, "UNAUTHENTICATED", why, hint=hint, headers={"WWW-Authenticate": "Bearer"})


def _holds_token(query: bytes) -> bool:
    names = {part.partition(b"=")[0].lower() for part in query.split(b"&")} if query else set[bytes]()
    return not names.isdisjoint(_TOKEN_PARAMETERS) or FORM.search(query) is not None


def _replayed(body: bytes, receive: Receive) -> Receive:
    """The body as one message, and then what really comes: the disconnect."""
    given = False

    async def replay() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replay


def _check_media_type(headers: Headers) -> None:
    types = headers.all(b"content-type")
    declared = headers.only(b"content-length")
    has_body = bool(headers.all(b"transfer-encoding")) or declared not in (None, b"0")
    if not types and not has_body:
        return
    kind, *parameters = (types[0] if len(types) == 1 else b"").lower().split(b";")
    charsets = {part.strip() for part in parameters if part.strip().startswith(b"charset")}
    if kind.strip() != b"application/json" or not charsets <= {b"charset=utf-8", b'charset="utf-8"'}:
        raise Refused(415, "WRONG_MEDIA_TYPE", "A body is JSON in UTF-8", hint="send `Content-Type: application/json`")


def _cwd(value: bytes | None) -> str | None:
    if value is None:
        return None
    try:
        path = unquote_to_bytes(value).decode()
    except UnicodeDecodeError:
        raise Refused(400, "INVALID_INPUT", "X-Vespera-Cwd is not UTF-8") from None
    if "\0" in path or not path.startswith("/"):
        raise Refused(400, "INVALID_INPUT", "X-Vespera-Cwd is not an absolute path")
    return path


def _env(value: bytes | None) -> dict[str, str]:
    if value is None:
        return {}
    try:
        said: object = orjson.loads(base64.b64decode(value, validate=True))
    except (binascii.Error, orjson.JSONDecodeError):
        said = None
    if not isinstance(said, dict):
        raise Refused(400, "INVALID_INPUT", "X-Vespera-Env is not the base64 of a JSON object")
    pairs = cast("dict[str, object]", said).items()
    return allowed_env({name: given for name, given in pairs if isinstance(given, str) and "\0" not in given})
