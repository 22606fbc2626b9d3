"""Answers to questions as people give them: by key, or just the one, where only one question is open."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vespera_exec.app.views import GiveAnswers, InputAnswer
from vespera_exec.errors import Conflict, InvalidInput

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vespera_exec.app.views import InputView


def by_key(given: GiveAnswers, inputs: Sequence[InputView] | None) -> dict[str, InputAnswer]:
    """What was answered, by the keys of the questions; `inputs` are those that are open.

    Raises:
        InvalidInput: nothing was answered, in both ways at once, or it is not clear which question is meant.
        Conflict: a question without a name was answered, and none is open.
    """
    keys = [each.key for each in inputs or ()]
    one = given.key is not None or given.action is not None or given.content is not None
    if given.answers and one:
        raise InvalidInput("answers, and one answer beside them", hint="give answers, or key, action and content")
    if given.answers:
        return dict(given.answers)
    named = f"open: {', '.join(keys)}" if keys else "no question is open"
    if given.action is None and not given.content:
        raise InvalidInput("nothing is answered", hint=f"give action and content, or answers; {named}")
    if given.key is not None:
        key = given.key
    elif len(keys) == 1:
        key = keys[0]
    elif keys:
        raise InvalidInput(f"{len(keys)} questions are open", hint=f"name one with key; {named}")
    else:
        raise Conflict("no question is open", hint="its status says how it stands")
    return {key: InputAnswer(action=given.action or "accept", content=given.content)}
