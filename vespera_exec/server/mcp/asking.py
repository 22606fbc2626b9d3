"""Questions of the work, put to the user by the client's own host: in a dialog, or between two rounds of a call."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, Final, Literal

import anyio
from mcp.shared.exceptions import MCPError
from mcp_types import ElicitRequest, ElicitRequestFormParams, ElicitResult, InputRequiredResult
from mcp_types.version import MODERN_PROTOCOL_VERSIONS
from pydantic import ValidationError

from vespera_exec.app.callers import current_caller
from vespera_exec.app.views import InputAnswer
from vespera_exec.errors import InvalidInput
from vespera_exec.server.mcp.adapter import elicit
from vespera_exec.server.mcp.tasks import is_declared, takes_forms

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    from mcp.server.mcpserver import Context

    from vespera_exec.app.service import Vespera
    from vespera_exec.app.views import InputView, Status
    from vespera_exec.model.principal import Caller

Way = Literal["dialog", "rounds"]

DIALOG_SECONDS: Final = 600.0
"""How long a user may take where the client sees that the call is alive."""
SILENT_SECONDS: Final = 50.0
"""How long a call lasts in all where it does not: many clients give up after 60 s."""
_LEAST_LEFT_MS = 2000


class NextRound(Exception):
    """The call ends here, with questions for the host's user; the client calls again with the answers."""

    def __init__(self, result: InputRequiredResult) -> None:
        super().__init__()
        self.result = result


class Board:
    """What is before a user now, over all connections: no question is put to two at a time."""

    def __init__(self) -> None:
        self._until: dict[tuple[str, str], float] = {}

    def take(self, run_id: str, key: str, *, seconds: float) -> bool:
        """False where somebody is asked already. Whoever does not come back loses it after `seconds`."""
        now = anyio.current_time()
        if self._until.get((run_id, key), now) > now:
            return False
        self._until = {each: until for each, until in self._until.items() if until > now}
        self._until[run_id, key] = now + seconds
        return True

    def leave(self, run_id: str, key: str) -> None:
        self._until.pop((run_id, key), None)


@dataclass(frozen=True, slots=True)
class Round:
    """What a call knows of the one that it goes on from: the run, where it was followed from, the time left.

    `put` are the questions that were put to the user in between, `asked` those of earlier rounds, too.
    """

    task_id: str
    run_id: str
    cursor: int
    left_ms: int
    put: list[str]
    asked: list[str]

    def text(self) -> str:
        """The SDK encrypts it on its way, and binds it to the principal, the tool and its arguments."""
        return json.dumps(asdict(self))

    @classmethod
    def read(cls, text: str) -> Round:
        return cls(**json.loads(text))


@dataclass(slots=True)
class Host:
    """The client of one call, as one who may ask its user. Nobody is asked the same thing twice in a call."""

    way: Way | None
    board: Board
    elicit: Callable[[str, dict[str, Any]], Awaitable[ElicitResult]]
    sees_progress: bool = False
    round: Round | None = None
    replies: dict[str, InputAnswer] = field(default_factory=dict[str, InputAnswer])
    """What came with this call for questions of the round before."""
    refused: str | None = None
    """Why the last reply was not taken."""
    _asked: set[str] = field(default_factory=set[str])

    def __post_init__(self) -> None:
        if self.round is not None:
            self._asked.update(self.round.asked)

    def askable(self, inputs: Sequence[InputView]) -> list[InputView]:
        return [each for each in inputs if self.way is not None and each.key not in self._asked]

    async def take_replies(self, vespera: Vespera, caller: Caller) -> None:
        """Record what the user said between the rounds. A question that was dismissed stays open."""
        if self.round is None:
            return
        for key in self.round.put:
            self.board.leave(self.round.run_id, key)
            if (reply := self.replies.get(key)) is not None:
                await self._record(vespera, caller, self.round.run_id, key, reply)

    def ask_between_rounds(self, status: Status, inputs: Sequence[InputView], *, cursor: int, left_ms: float) -> None:
        """
        Raises:
            NextRound: with those of the questions that nobody else is asked.
        """
        assert status.session is not None
        run_id = status.session.run_id
        taken = [each for each in inputs if self.board.take(run_id, each.key, seconds=DIALOG_SECONDS)]
        put = [each.key for each in taken]
        state = Round(
            status.task_id, run_id, cursor, max(round(left_ms), _LEAST_LEFT_MS), put, sorted({*self._asked, *put})
        )
        self._asked.update(each.key for each in inputs)
        if not taken:
            return
        asked = {
            each.key: ElicitRequest(
                params=ElicitRequestFormParams(message=each.message, requested_schema=dict(each.schema_))
            )
            for each in taken
        }
        raise NextRound(InputRequiredResult(input_requests=dict(asked), request_state=state.text()))

    async def ask_in_dialog(
        self,
        vespera: Vespera,
        caller: Caller,
        run_id: str,
        question: InputView,
        *,
        seconds: float,
        answered: Callable[[], Awaitable[None]],
    ) -> bool:
        """Put one question to the user, for `seconds` at most, and record what he says. False: another client does.

        `answered` returns when another door has had the answer: the dialog is closed then.
        """
        self._asked.add(question.key)
        if not self.board.take(run_id, question.key, seconds=seconds + 1):
            return False
        reply: ElicitResult | None = None
        try:
            async with anyio.create_task_group() as group:

                async def watch() -> None:
                    await answered()
                    group.cancel_scope.cancel()

                group.start_soon(watch)
                with anyio.move_on_after(seconds):
                    reply = await self._reply(question)
                group.cancel_scope.cancel()
        finally:
            self.board.leave(run_id, question.key)
        if reply is not None and (given := answer_of(reply)) is not None:
            await self._record(vespera, caller, run_id, question.key, given)
        return True

    async def _reply(self, question: InputView) -> ElicitResult | None:
        try:
            return await self.elicit(question.message, dict(question.schema_))
        except (MCPError, ValidationError):
            return None  # a client that cannot after all, or answers with something else: as one that dismissed it

    async def _record(self, vespera: Vespera, caller: Caller, run_id: str, key: str, reply: InputAnswer) -> None:
        try:
            await vespera.answer_input(caller, run_id, {key: reply})
        except InvalidInput as error:
            self.refused = error.message


def host_of(context: Context[Any, Any], board: Board) -> Host:
    """How the client of this call can ask its user.

    Raises:
        InvalidInput: it answers questions without saying of which call.
    """
    request = context.request_context
    meta: Any = request.meta or {}
    way = _way(context)

    if context.request_state is None and context.input_responses:
        raise InvalidInput(
            "inputResponses without the requestState of the call that they answer", hint="send both back"
        )
    return Host(
        way,
        board,
        partial(elicit, context.session),
        sees_progress=meta.get("progress_token") is not None,
        round=Round.read(context.request_state) if context.request_state is not None else None,
        replies={
            key: given
            for key, reply in (context.input_responses or {}).items()
            if isinstance(reply, ElicitResult) and (given := answer_of(reply)) is not None
        },
    )


def answer_of(reply: ElicitResult) -> InputAnswer | None:
    """None of a question that was only dismissed: it stays open."""
    return InputAnswer(action=reply.action, content=reply.content) if reply.action != "cancel" else None


def _way(context: Context[Any, Any]) -> Way | None:
    if not takes_forms(context.client_capabilities) or "operate" not in current_caller.get().scopes:
        return None
    if context.protocol_version in MODERN_PROTOCOL_VERSIONS:
        return None if is_declared(context.request_context) else "rounds"
    return "dialog" if context.session.can_send_request else None
