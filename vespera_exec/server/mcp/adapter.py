"""The one place that leans on parts of the MCP SDK which it may change: kept small, pinned by contract tests."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from mcp.server.mcpserver import MCPServer
from mcp.server.mcpserver import server as sdk
from mcp.server.mcpserver.tools import Tool
from mcp.server.mcpserver.utilities.func_metadata import ArgModelBase, FuncMetadata

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Generator

    from mcp.server.lowlevel import Server
    from mcp.server.mcpserver import Context
    from mcp_types import CallToolResult, InputRequiredResult, ToolAnnotations

    Answering = Callable[[dict[str, Any], Context[Any, Any]], Awaitable[CallToolResult]]


def lowlevel(server: MCPServer[Any]) -> Server[Any]:
    """The SDK's server for single connections: `run(read, write, options)` may be called many times at once."""
    return server._lowlevel_server  # pyright: ignore[reportPrivateUsage]  # 2.3 has no public name for it


class OwnTool(Tool):
    """A tool that is given its arguments as they came and answers with the result as it goes out.

    The SDK's own way in (a model made of a signature, which ignores unknown arguments) and out (the text
    pretty-printed beside the structured content, errors as prose) does not fit what our tools promise.
    """

    async def run(
        self, arguments: dict[str, Any], context: Context[Any, Any], convert_result: bool = False
    ) -> CallToolResult:
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
) -> OwnTool:
    """`arguments` and `output` are the JSON Schemas that are listed; `answer` checks for itself."""
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
    )


class OwnServer(MCPServer[Any]):
    """An `MCPServer` whose answer to an unknown tool is ours, too."""

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
