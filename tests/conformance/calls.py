"""Tools that answer at once: every kind of content, log and progress messages, and questions over a back-channel."""

from typing import Any

import anyio
from mcp.server.mcpserver import Context, MCPServer
from mcp.server.mcpserver.tools import Tool
from mcp.shared.exceptions import MCPError
from mcp_types import (
    MISSING_REQUIRED_CLIENT_CAPABILITY,
    AudioContent,
    CallToolResult,
    ContentBlock,
    EmbeddedResource,
    ImageContent,
    SamplingMessage,
    TextContent,
    TextResourceContents,
    ToolAnnotations,
)

from tests.conformance.contents import PNG
from vespera_exec.server.mcp.adapter import own_tool

Request = Context[Any, Any]

WAV = "UklGRiYAAABXQVZFZm10IBAAAAABAAEAQB8AAAB9AAACABAAZGF0YQIAAAAAAA=="
"""One sample of silence."""

_RICH_SCHEMA: dict[str, Any] = {
    "$schema": "https://json-schema.org/draft/2020-12/schema",
    "type": "object",
    "$defs": {
        "address": {
            "$anchor": "addressDef",
            "type": "object",
            "properties": {"street": {"type": "string"}, "city": {"type": "string"}},
        }
    },
    "properties": {
        "name": {"type": "string"},
        "address": {"$ref": "#/$defs/address"},
        "contactMethod": {"type": "string", "enum": ["phone", "email"]},
        "phone": {"type": "string"},
        "email": {"type": "string"},
    },
    "allOf": [{"anyOf": [{"required": ["phone"]}, {"required": ["email"]}]}],
    "if": {"properties": {"contactMethod": {"const": "phone"}}, "required": ["contactMethod"]},
    "then": {"required": ["phone"]},
    "else": {"required": ["email"]},
    "additionalProperties": False,
}
_SCHEMAS: dict[str, dict[str, Any]] = {
    "json_schema_2020_12_tool": _RICH_SCHEMA,
    "test_custom_header": {
        "type": "object",
        "properties": {"region": {"type": "string", "x-mcp-header": "Region"}},
        "required": ["region"],
    },
}
_DEFAULTS: dict[str, Any] = {
    "name": {"type": "string", "default": "John Doe"},
    "age": {"type": "integer", "default": 30},
    "score": {"type": "number", "default": 95.5},
    "status": {"type": "string", "enum": ["active", "inactive", "pending"], "default": "active"},
    "verified": {"type": "boolean", "default": True},
}
_TITLED = [{"const": f"value{n}", "title": f"Choice {n}"} for n in (1, 2, 3)]
_PLAIN = ["option1", "option2", "option3"]
_ENUMS: dict[str, Any] = {
    "untitledSingle": {"type": "string", "enum": _PLAIN},
    "titledSingle": {"type": "string", "oneOf": _TITLED},
    "legacyEnum": {"type": "string", "enum": ["opt1", "opt2"], "enumNames": ["Option One", "Option Two"]},
    "untitledMulti": {"type": "array", "minItems": 1, "maxItems": 3, "items": {"type": "string", "enum": _PLAIN}},
    "titledMulti": {"type": "array", "minItems": 1, "maxItems": 3, "items": {"anyOf": _TITLED}},
}


def offer(server: MCPServer[Any]) -> None:
    _offer_contents(server)
    _offer_messages(server)
    _offer_questions(server)
    _offer_changes(server)


def _answer(*content: ContentBlock) -> CallToolResult:
    return CallToolResult(content=list(content))


def _text(text: str) -> TextContent:
    return TextContent(type="text", text=text)


def _embedded(uri: str, text: str) -> EmbeddedResource:
    return EmbeddedResource(type="resource", resource=TextResourceContents(uri=uri, mime_type="text/plain", text=text))


def _offer_contents(server: MCPServer[Any]) -> None:
    @server.tool()
    async def greet(name: str) -> CallToolResult:
        """Greets at once."""
        return _answer(_text(f"Hello, {name}!"))

    @server.tool()
    async def test_simple_text() -> CallToolResult:
        """Answers with text."""
        return _answer(_text("This is a simple text response for testing."))

    @server.tool()
    async def test_image_content() -> CallToolResult:
        """Answers with an image."""
        return _answer(ImageContent(type="image", data=PNG, mime_type="image/png"))

    @server.tool()
    async def test_audio_content() -> CallToolResult:
        """Answers with a sound."""
        return _answer(AudioContent(type="audio", data=WAV, mime_type="audio/wav"))

    @server.tool()
    async def test_embedded_resource() -> CallToolResult:
        """Answers with a resource."""
        return _answer(_embedded("test://embedded-resource", "A resource within an answer."))

    @server.tool()
    async def test_multiple_content_types() -> CallToolResult:
        """Answers with text, an image and a resource."""
        image = ImageContent(type="image", data=PNG, mime_type="image/png")
        return _answer(_text("All of them:"), image, _embedded("test://mixed-content-resource", "Data."))

    @server.tool()
    async def test_error_handling() -> CallToolResult:
        """Fails."""
        return CallToolResult(content=[_text("This tool always fails.")], is_error=True)


def _offer_messages(server: MCPServer[Any]) -> None:
    @server.tool()
    async def test_tool_with_logging(context: Request) -> str:
        """Logs three lines."""
        for line in ("Tool execution started", "Tool processing data", "Tool execution completed"):
            await _log(context, line)
        return "It has logged three lines."

    @server.tool()
    async def test_logging_tool(context: Request) -> str:
        """Logs a line for those who asked for it."""
        await _log(context, "For those only who asked for it.")
        return "It has logged one line."

    @server.tool()
    async def test_tool_with_progress(context: Request) -> str:
        """Reports its progress."""
        for percentage in (0, 50, 100):
            await context.report_progress(percentage, 100, f"{percentage} of 100")
        return "It has reported three times."

    @server.tool()
    async def test_streaming_elicitation(context: Request) -> str:
        """Reports its progress, and asks nothing on the way."""
        await context.report_progress(50, 100)
        return "Nothing but progress came before this."

    @server.tool()
    async def test_reconnection(context: Request) -> str:
        """Closes its stream where that can be resumed, then answers."""
        await context.close_sse_stream()
        await anyio.sleep(0.1)
        return "Whoever reads this has come back."


async def _log(context: Request, line: str) -> None:
    session = context.session
    await session.send_log_message("info", line, related_request_id=context.request_id)  # pyright: ignore[reportDeprecated]


def _offer_questions(server: MCPServer[Any]) -> None:
    async def ask(context: Request, message: str, properties: dict[str, Any], required: list[str]) -> str:
        schema: dict[str, Any] = {"type": "object", "properties": properties, "required": required}
        answer = await context.session.elicit_form(message, schema, related_request_id=context.request_id)
        return f"action={answer.action}, content={answer.content}"

    @server.tool()
    async def test_sampling(prompt: str, context: Request) -> str:
        """Lets the client's model speak."""
        message = SamplingMessage(role="user", content=_text(prompt))
        answer = await context.session.create_message(  # pyright: ignore[reportDeprecated]
            [message], max_tokens=100, related_request_id=context.request_id
        )
        return f"LLM response: {answer.content.text if isinstance(answer.content, TextContent) else answer.content}"

    @server.tool()
    async def test_elicitation(message: str, context: Request) -> str:
        """Asks the client's user."""
        return "User response: " + await ask(context, message, {"response": {"type": "string"}}, ["response"])

    @server.tool()
    async def test_elicitation_sep1034_defaults(context: Request) -> str:
        """Asks with a default of each type."""
        return "Elicitation completed: " + await ask(context, "Is this right?", _DEFAULTS, [])

    @server.tool()
    async def test_elicitation_sep1330_enums(context: Request) -> str:
        """Asks with each way to write a choice."""
        return "Elicitation completed: " + await ask(context, "Which of these?", _ENUMS, [])

    @server.tool()
    async def test_missing_capability(context: Request) -> str:
        """Serves only clients that can sample."""
        can = context.client_capabilities
        if can is None or can.sampling is None:
            raise MCPError(
                code=MISSING_REQUIRED_CLIENT_CAPABILITY,
                message="The client must be able to sample",
                data={"requiredCapabilities": {"sampling": {}}},
            )
        return "The client can sample."


def schema_tools() -> list[Tool]:
    """Tools whose listed schema is written by hand, keywords that no Python signature has included."""

    async def say(arguments: dict[str, Any], context: Request) -> CallToolResult:
        return CallToolResult(content=[_text(str(arguments))], structured_content={"arguments": arguments})

    return [
        own_tool(
            say,
            name=name,
            title=name,
            description="Says what it was given.",
            arguments=schema,
            output={"type": "object"},
            annotations=ToolAnnotations(read_only_hint=True),
        )
        for name, schema in _SCHEMAS.items()
    ]


def _offer_changes(server: MCPServer[Any]) -> None:
    async def come_and_go() -> str:
        """Is not always there."""
        return "I come and go."

    listed: set[str] = set()

    @server.tool()
    async def test_trigger_tool_change(context: Request) -> str:
        """Adds a tool, or takes it away again."""
        if "coming_and_going" in listed:
            server.remove_tool("coming_and_going")
            listed.clear()
        else:
            server.add_tool(come_and_go, name="coming_and_going")
            listed.add("coming_and_going")
        await context.notify_tools_changed()
        return "The list of tools is another."

    @server.tool()
    async def test_trigger_prompt_change(context: Request) -> str:
        """Says that the prompts have changed."""
        await context.notify_prompts_changed()
        return "The list of prompts is another."
