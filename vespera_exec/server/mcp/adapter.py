"""The one place that leans on parts of the MCP SDK which it may change: kept small, pinned by contract tests."""

from __future__ import annotations

import uuid
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from mcp.server.auth.middleware.bearer_auth import authorization_context
from mcp.server.mcpserver import MCPServer
from mcp.server.mcpserver import server as sdk
from mcp.server.mcpserver.tools import Tool
from mcp.server.mcpserver.utilities.func_metadata import ArgModelBase, FuncMetadata
from mcp.shared.exceptions import MCPError
from mcp.shared.inbound import MCP_NAME_HEADER, decode_header_value
from mcp_types import (
    HEADER_MISMATCH,
    INVALID_PARAMS,
    ElicitRequest,
    ElicitRequestFormParams,
    ElicitResult,
    SubscriptionsAcknowledgedNotification,
)
from pydantic import BaseModel

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Generator, Mapping

    from mcp.server.auth.middleware.bearer_auth import AuthenticatedUser
    from mcp.server.context import ServerRequestContext
    from mcp.server.lowlevel import Server
    from mcp.server.mcpserver import Context
    from mcp.server.session import ServerSession
    from mcp.server.streamable_http_manager import StreamableHTTPSessionManager
    from mcp_types import (
        CallToolResult,
        GetPromptResult,
        InputRequiredResult,
        RequestId,
        ServerNotification,
        ToolAnnotations,
    )

    Answering = Callable[[dict[str, Any], Context[Any, Any]], Awaitable[CallToolResult | InputRequiredResult]]


def lowlevel(server: MCPServer[Any]) -> Server[Any]:
    """The SDK's server for single connections: `run(read, write, options)` may be called many times at once."""
    return server._lowlevel_server  # pyright: ignore[reportPrivateUsage]  # 2.3 has no public name for it


async def end_session(manager: StreamableHTTPSessionManager, session_id: str, shown: AuthenticatedUser) -> None:
    """End a session of the streamable transport, with the calls that it still serves, where `shown` opened it."""
    transport = manager._server_instances.get(session_id)  # pyright: ignore[reportPrivateUsage]
    owner = manager._session_owners.get(session_id)  # pyright: ignore[reportPrivateUsage]
    if transport is not None and owner == authorization_context(shown):
        await manager._discard_session(session_id, transport)  # pyright: ignore[reportPrivateUsage]


class OwnTool(Tool):
    """A tool that is given its arguments as they came and answers with the result as it goes out.

    The SDK's own way in (a model made of a signature, which ignores unknown arguments) and out (the text
    pretty-printed beside the structured content, errors as prose) does not fit what our tools promise.
    """

    async def run(
        self, arguments: dict[str, Any], context: Context[Any, Any], convert_result: bool = False
    ) -> CallToolResult | InputRequiredResult:
        return await self.fn(arguments, context)


def own_tool(
    answer: Answering,
    *,
    name: str,
    title: str,
    description: str,
    arguments: dict[str, Any],
    output: dict[str, Any],
    annotations: ToolAnnotations,
    meta: dict[str, Any] | None = None,
) -> OwnTool:
    """`arguments` and `output` are the JSON Schemas that are listed, `meta` its `_meta`; `answer` checks for itself."""
    return OwnTool(
        fn=answer,
        name=name,
        title=title,
        description=description,
        parameters=arguments,
        fn_metadata=FuncMetadata(arg_model=ArgModelBase, output_schema=output),
        is_async=True,
        context_kwarg=None,
        annotations=annotations,
        meta=meta,
    )


async def elicit(session: ServerSession, message: str, schema: dict[str, Any]) -> ElicitResult:
    """What the client's user says to a form. As the SDK's `elicit_form`, under an id that is never used again.

    The SDK counts from 1 in each process: behind a bridge that outlives us, the reply to a dialog of our predecessor
    would answer one of ours.

    Raises:
        MCPError: the client refuses, or has no way to be asked.
        ValidationError: its reply is none.
    """
    request = ElicitRequest(params=ElicitRequestFormParams(message=message, requested_schema=schema))
    sent = request.model_dump(by_alias=True, mode="json", exclude_none=True)
    channel = session._request_outbound  # pyright: ignore[reportPrivateUsage]  # only it takes an id
    reply = await channel.send_raw_request(sent["method"], sent["params"], {"request_id": f"ask-{uuid.uuid4().hex}"})
    return ElicitResult.model_validate(reply, by_name=False)


class OwnServer(MCPServer[Any]):
    """An `MCPServer` whose answers to an unknown tool and to an unknown prompt are ours, too."""

    def __init__(self, *, tools: list[OwnTool], unknown_tool: Callable[[str], CallToolResult], **named: Any) -> None:
        with _logging_left_alone():
            super().__init__(tools=[*tools], **named)
        self._known = frozenset(tool.name for tool in tools)
        self._unknown_tool = unknown_tool

    async def call_tool(
        self, name: str, arguments: dict[str, Any], context: Context[Any, Any] | None = None
    ) -> CallToolResult | InputRequiredResult:
        if name not in self._known:
            return self._unknown_tool(name)
        return await super().call_tool(name, arguments, context)

    async def get_prompt(
        self, name: str, arguments: dict[str, Any] | None = None, context: Context[Any, Any] | None = None
    ) -> GetPromptResult | InputRequiredResult:
        """What the caller has done wrong is told as such: the SDK calls it an internal error.

        Raises:
            MCPError: -32602, there is no such prompt, or an argument is missing.
        """
        prompt = next((prompt for prompt in await self.list_prompts() if prompt.name == name), None)
        if prompt is None:
            raise MCPError(INVALID_PARAMS, f"Unknown prompt: {name[:100]}")
        for argument in prompt.arguments or ():
            if argument.required and argument.name not in (arguments or {}):
                raise MCPError(INVALID_PARAMS, f"The prompt {name} needs the argument {argument.name}")
        return await super().get_prompt(name, arguments, context)


def check_name_header(ctx: ServerRequestContext[Any, Any], name: str) -> None:
    """Over HTTP a request that names something names it in its header `Mcp-Name`, too; the SDK looks at its own only.

    Raises:
        MCPError: -32020, the header is missing or names something else.
    """
    if ctx.request is None:
        return  # no HTTP
    if decode_header_value(ctx.request.headers.get(MCP_NAME_HEADER)) != name:
        raise MCPError(HEADER_MISMATCH, f"{MCP_NAME_HEADER} must be there, and be what the request's body names")


class ListenSession:
    """The session of a `subscriptions/listen` request whose acknowledgement says more than the SDK's handler knows.

    `told` is called once the acknowledgement has gone out, before any other notification.
    """

    def __init__(self, session: ServerSession, agreed: Mapping[str, Any], told: Callable[[], None]) -> None:
        self._session = session
        self._agreed = agreed
        self._told = told

    def __getattr__(self, name: str) -> Any:
        return getattr(self._session, name)

    async def send_notification(
        self, notification: ServerNotification, related_request_id: RequestId | None = None
    ) -> None:
        if not isinstance(notification, SubscriptionsAcknowledgedNotification):
            await self._session.send_notification(notification, related_request_id)
            return
        params = notification.params
        more = params.notifications.model_copy(update=dict(self._agreed))
        said = notification.model_copy(update={"params": params.model_copy(update={"notifications": more})})
        await self._session.send_notification(said, related_request_id)
        self._told()


class OwnNotification(BaseModel):
    """A notification that the SDK has no model for; what is null in its params goes out as null."""

    method: str
    params: dict[str, Any]


async def notify(ctx: ServerRequestContext[Any, Any], method: str, params: dict[str, Any]) -> None:
    """Sends on the stream of this request."""
    notification: Any = OwnNotification(method=method, params=params)
    await ctx.session.send_notification(notification, related_request_id=ctx.request_id)


@contextmanager
def _logging_left_alone() -> Generator[None]:
    """While it runs, an `MCPServer` can be made without a change to the root logger.

    The SDK's own set-up imports rich, a tenth of a daemon's start, for a handler that `server/logs.py` makes
    moot. It offers no way around; where it no longer looks its function up by this name, only time is lost.
    """
    module: Any = sdk  # the name is theirs, and not exported
    theirs = module.configure_logging
    module.configure_logging = _configure_nothing
    try:
        yield
    finally:
        module.configure_logging = theirs


def _configure_nothing(level: str = "INFO") -> None:
    pass
