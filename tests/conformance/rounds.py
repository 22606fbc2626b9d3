"""Tools that answer with questions of their own, round by round, as 2026-07-28 has it (SEP-2322)."""

import json
from typing import Any

from mcp.server.mcpserver import Context, MCPServer
from mcp_types import (
    CreateMessageRequest,
    CreateMessageRequestParams,
    CreateMessageResult,
    ElicitRequest,
    ElicitRequestFormParams,
    ElicitResult,
    InputRequests,
    InputRequiredResult,
    ListRootsRequest,
    ListRootsResult,
    SamplingMessage,
    TextContent,
)

Request = Context[Any, Any]


def form(message: str, **properties: str) -> ElicitRequest:
    """A form of required properties, given as name=JSON type."""
    shape = {name: {"type": kind} for name, kind in properties.items()}
    schema: dict[str, Any] = {"type": "object", "properties": shape, "required": list(shape)}
    return ElicitRequest(params=ElicitRequestFormParams(message=message, requested_schema=schema))


def sample(prompt: str) -> CreateMessageRequest:
    message = SamplingMessage(role="user", content=TextContent(type="text", text=prompt))
    return CreateMessageRequest(params=CreateMessageRequestParams(messages=[message], max_tokens=50))


def answered(context: Request, key: str, name: str) -> Any:
    """What the accepted form `key` says of `name`; None where it says nothing, or was not accepted."""
    given = (context.input_responses or {}).get(key)
    if not isinstance(given, ElicitResult) or given.action != "accept":
        return None
    return (given.content or {}).get(name)


def text_answer(context: Request, key: str, name: str) -> str | None:
    said = answered(context, key, name)
    return said if isinstance(said, str) else None


def offer(server: MCPServer[Any]) -> None:
    _offer_single_rounds(server)
    _offer_rounds_with_state(server)

    @server.tool()
    async def test_input_required_result_capabilities(context: Request) -> str | InputRequiredResult:
        """Asks only for what the client can answer."""
        if context.input_responses:
            return f"Received {', '.join(context.input_responses)}."
        can = context.client_capabilities
        asked: InputRequests = {
            **({"form": form("A value?", value="string")} if can and can.elicitation else {}),
            **({"sample": sample("A value?")} if can and can.sampling else {}),
        }
        return InputRequiredResult(input_requests=asked) if asked else "The client can answer nothing."


def _offer_single_rounds(server: MCPServer[Any]) -> None:
    @server.tool()
    async def test_input_required_result_elicitation(context: Request) -> str | InputRequiredResult:
        """Asks for a name."""
        name = text_answer(context, "user_name", "name")
        if name is None:
            return InputRequiredResult(input_requests={"user_name": form("What is your name?", name="string")})
        return f"Hello, {name}!"

    @server.tool()
    async def test_input_required_result_sampling(context: Request) -> str | InputRequiredResult:
        """Asks the client's model."""
        given = (context.input_responses or {}).get("capital")
        if not isinstance(given, CreateMessageResult):
            return InputRequiredResult(input_requests={"capital": sample("What is the capital of France?")})
        return given.content.text if isinstance(given.content, TextContent) else "It was not said in words."

    @server.tool()
    async def test_input_required_result_list_roots(context: Request) -> str | InputRequiredResult:
        """Asks for the roots."""
        given = (context.input_responses or {}).get("client_roots")
        if not isinstance(given, ListRootsResult):
            return InputRequiredResult(input_requests={"client_roots": ListRootsRequest()})
        return f"{len(given.roots)} roots."


def _offer_rounds_with_state(server: MCPServer[Any]) -> None:
    @server.tool()
    async def test_input_required_result_request_state(context: Request) -> str | InputRequiredResult:
        """Asks, and knows that it has asked."""
        if context.request_state == "asked" and answered(context, "confirm", "ok") is True:
            return "state-ok"
        return InputRequiredResult(input_requests={"confirm": form("Sure?", ok="boolean")}, request_state="asked")

    @server.tool()
    async def test_input_required_result_tampered_state(context: Request) -> str | InputRequiredResult:
        """The SDK seals the state and refuses one that it has not sealed, before this is called."""
        if context.request_state == "sealed" and answered(context, "confirm", "ok") is True:
            return "integrity-ok"
        return InputRequiredResult(input_requests={"confirm": form("Sure?", ok="boolean")}, request_state="sealed")

    @server.tool()
    async def test_input_required_result_multiple_inputs(context: Request) -> str | InputRequiredResult:
        """Asks three things at once."""
        asked = {
            "user_name": form("What is your name?", name="string"),
            "greeting": sample("Write a greeting."),
            "client_roots": ListRootsRequest(),
        }
        given = context.input_responses or {}
        if context.request_state != "three" or not asked.keys() <= given.keys():
            return InputRequiredResult(input_requests=asked, request_state="three")
        return f"Received {', '.join(asked)}."

    @server.tool()
    async def test_input_required_result_multi_round(context: Request) -> str | InputRequiredResult:
        """Asks two things, one after the other."""
        state: dict[str, str] = json.loads(context.request_state or "{}")
        color = text_answer(context, "step2", "color")
        if "name" in state and color is not None:
            return f"{state['name']} likes {color}."
        name = state.get("name") or (text_answer(context, "step1", "name") if state else None)
        if name is not None:
            return InputRequiredResult(
                input_requests={"step2": form("Which color?", color="string")},
                request_state=json.dumps({"name": name}),
            )
        return InputRequiredResult(
            input_requests={"step1": form("What is your name?", name="string")},
            request_state=json.dumps({"round": "1"}),
        )
