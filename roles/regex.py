"""Regular expressions from role files, refused where a line of output could make them run away."""

from __future__ import annotations

import re
from importlib import import_module
from typing import Any, Final

MAX_LENGTH: Final = 200
MAX_SUBJECT: Final = 512
"""Characters of a line that a role's own expression is applied to."""
_MAX_REPEATS: Final = 6
_WIDE: Final = 16
"""A repetition of more than this counts as unbounded."""

_parser: Any = import_module("re._parser")


def compile_bounded(pattern: str) -> re.Pattern[str]:
    """The compiled pattern; matching it against `MAX_SUBJECT` characters takes milliseconds at worst.

    Refused are what backtracks without end: a repetition inside a repetition, more than six
    repetitions, more than one `.*`, back-references.

    Raises:
        ValueError: with what is wrong and what to write instead.
    """
    if len(pattern) > MAX_LENGTH:
        raise ValueError(f"the expression has {len(pattern)} characters; at most {MAX_LENGTH} are allowed")
    try:
        compiled = re.compile(pattern)
        tree: Any = _parser.parse(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        raise ValueError(f"the expression does not compile: {error}") from None
    cost = _Cost()
    cost.walk(tree, inside=False)
    if cost.repeats > _MAX_REPEATS:
        raise ValueError(f"the expression repeats {cost.repeats} times; at most {_MAX_REPEATS} repetitions are allowed")
    if cost.dots > 1:
        raise ValueError("the expression has more than one `.*`; name the characters instead, as in `[^ ]*`")
    return compiled


class _Cost:
    """What a parsed pattern can cost: counted over the tree that `re` itself makes."""

    def __init__(self) -> None:
        self.repeats = 0
        self.dots = 0

    def walk(self, node: Any, *, inside: bool) -> None:
        if isinstance(node, _parser.SubPattern):
            for operator, argument in node:
                self._operator(str(operator), argument, inside=inside)
        elif isinstance(node, list | tuple):
            for each in node:  # pyright: ignore[reportUnknownVariableType]
                self.walk(each, inside=inside)

    def _operator(self, operator: str, argument: Any, *, inside: bool) -> None:
        if operator in ("GROUPREF", "GROUPREF_EXISTS"):
            raise ValueError("back-references are not allowed in the expression")
        if not operator.endswith("REPEAT"):
            self.walk(argument, inside=inside)
            return
        _, most, body = argument
        wide = int(most) > _WIDE
        if wide and inside:
            raise ValueError("a repetition inside a repetition is not allowed, as in `(a+)+`")
        if wide:
            self.repeats += 1
            self.dots += any(str(each) == "ANY" for each, _ in body)
        # A narrow repetition multiplies what is in it as well: (a{0,16}){0,16}.
        self.walk(body, inside=inside or int(most) > 1)
