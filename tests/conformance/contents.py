"""What the suite reads: prompts, resources, completion, and the handlers of the 2025 revisions around them."""

# Annotations are read at run time by the SDK, so this module has them as they are.
import json
from typing import Any

from mcp.server.context import ServerRequestContext
from mcp.server.mcpserver import Context, MCPServer
from mcp.server.mcpserver.prompts.base import UserMessage
from mcp_types import (
    Completion,
    EmbeddedResource,
    EmptyResult,
    ImageContent,
    InputRequiredResult,
    SetLevelRequestParams,
    SubscribeRequestParams,
    TextResourceContents,
    UnsubscribeRequestParams,
)

from tests.conformance.rounds import form, text_answer
from vespera_exec.server.mcp.adapter import lowlevel

Request = Context[Any, Any]
Handled = ServerRequestContext[Any, Any]

PNG = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
"""One pixel."""


def offer(server: MCPServer[Any]) -> None:
    _offer_resources(server)
    _offer_prompts(server)
    _offer_older_handlers(server)


def _offer_resources(server: MCPServer[Any]) -> None:
    @server.resource("test://static-text", mime_type="text/plain")
    async def static_text() -> str:
        return "This is the content of the static text resource."

    @server.resource("test://static-binary", mime_type="image/png")
    async def static_binary() -> bytes:
        return PNG.encode()

    @server.resource("test://watched-resource", mime_type="text/plain")
    async def watched() -> str:
        return "Nothing has happened."

    @server.resource("test://template/{id}/data", mime_type="application/json")
    async def of_template(id: str) -> str:
        return json.dumps({"id": id, "data": f"Data for ID: {id}"})


def _offer_prompts(server: MCPServer[Any]) -> None:
    @server.prompt()
    async def test_simple_prompt() -> str:
        """Takes nothing."""
        return "A prompt without arguments."

    @server.prompt()
    async def test_prompt_with_arguments(arg1: str, arg2: str) -> str:
        """Takes two arguments."""
        return f"The first is '{arg1}', the second is '{arg2}'."

    @server.prompt()
    async def test_prompt_with_embedded_resource(resourceUri: str) -> list[UserMessage]:
        """Has a resource in it."""
        resource = TextResourceContents(uri=resourceUri, mime_type="text/plain", text="A resource within a prompt.")
        return [UserMessage(EmbeddedResource(type="resource", resource=resource)), UserMessage("Read it.")]

    @server.prompt()
    async def test_prompt_with_image() -> list[UserMessage]:
        """Has an image in it."""
        return [UserMessage(ImageContent(type="image", data=PNG, mime_type="image/png")), UserMessage("Look at it.")]

    @server.prompt()
    async def test_input_required_result_prompt(context: Request) -> str | InputRequiredResult:
        """Asks before it answers."""
        said = text_answer(context, "user_context", "context")
        if said is None:
            return InputRequiredResult(input_requests={"user_context": form("Which context?", context="string")})
        return f"In the context of {said}."


def _offer_older_handlers(server: MCPServer[Any]) -> None:
    @server.completion()
    async def complete(ref: object, argument: object, context: object) -> Completion:
        return Completion(values=[], total=0, has_more=False)

    async def accept(context: Handled, params: object) -> EmptyResult:
        return EmptyResult()

    low = lowlevel(server)
    low.add_request_handler("resources/subscribe", SubscribeRequestParams, accept)
    low.add_request_handler("resources/unsubscribe", UnsubscribeRequestParams, accept)
    low.add_request_handler("logging/setLevel", SetLevelRequestParams, accept)
