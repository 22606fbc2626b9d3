"""A plan drawn as text: its steps level by level, or for Mermaid or Graphviz to draw."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from vespera_exec.cli.text import cells, fit, shown

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

MOST_LEVELS: Final = 40
MOST_OF_A_LEVEL: Final = 20
MOST_NODES: Final = 400
"""Beyond which no drawing can be read."""
_MOST_NEEDS: Final = 6
_MARKS: Final = {
    "pending": "·",
    "running": "▶",
    "waiting": "…",
    "completed": "✓",
    "failed": "✗",
    "skipped": "»",
    "cancelled": "■",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Drawn:
    """A step as it is drawn. `status` is empty where the plan is not executed, `note` what is said beside it."""

    id: str
    role: str
    needs: tuple[str, ...]
    status: str = ""
    note: str = ""


def levels(steps: Sequence[Drawn]) -> list[list[Drawn]]:
    """The steps that may run beside each other, first those that need nothing; each level in the plan's order.

    What is in a cycle, or needs such a step, is left out.
    """
    missing = {each.id: len(set(each.needs)) for each in steps}
    needed_by: dict[str, list[str]] = {}
    for each in steps:
        for need in set(each.needs):
            needed_by.setdefault(need, []).append(each.id)
    position = {each.id: at for at, each in enumerate(steps)}
    found: list[list[Drawn]] = []
    now = [each.id for each in steps if not missing[each.id]]
    while now:
        found.append([steps[position[each]] for each in now])
        free: list[str] = []
        for done in now:
            for each in needed_by.get(done, ()):
                missing[each] -= 1
                if not missing[each]:
                    free.append(each)
        now = sorted(free, key=position.__getitem__)
    return found


def as_text(steps: Sequence[Drawn], width: int | None = None) -> list[str]:
    """A line per step below the number of its level, with its role and what it needs."""
    by_level = levels(steps)
    drawn = [each for level in by_level[:MOST_LEVELS] for each in level[:MOST_OF_A_LEVEL]]
    id_width = max((cells(shown(each.id, 64)) for each in drawn), default=0)
    role_width = max((cells(shown(each.role, 40)) for each in drawn), default=0)
    margin = len(str(len(by_level))) + 2
    lines: list[str] = []
    for number, level in enumerate(by_level[:MOST_LEVELS], 1):
        if number > 1:
            lines.append(" " * margin + "↓")
        for at, each in enumerate(level[:MOST_OF_A_LEVEL]):
            start = f"{number if at == 0 else '':<{margin}}"
            lines.append(_fitted(start + _row(each, id_width, role_width), width))
        if len(level) > MOST_OF_A_LEVEL:
            lines.append(f"{'':<{margin}}… and {len(level) - MOST_OF_A_LEVEL} more beside them")
    if len(by_level) > MOST_LEVELS:
        rest = by_level[MOST_LEVELS:]
        lines += [" " * margin + "↓", f"{'':<{margin}}… and {len(rest)} more levels, {sum(map(len, rest))} steps"]
    return lines


def as_mermaid(steps: Sequence[Drawn]) -> list[str]:
    """A flowchart; a note stands in it as a comment where the plan is too large to be drawn whole."""
    named = _named(steps)
    lines = ["flowchart LR"]
    for each in steps[:MOST_NODES]:
        label = "<br/>".join(_in_mermaid(part) for part in _label(each))
        lines.append(f'  {named[each.id]}["{label}"]')
    lines += [f"  {named[need]} --> {named[each]}" for need, each in _edges(steps, named)]
    return lines + ([f"  %% {_too_many(steps)}"] if len(steps) > MOST_NODES else [])


def as_dot(steps: Sequence[Drawn]) -> list[str]:
    """A digraph for Graphviz."""
    named = _named(steps)
    lines = ["digraph plan {", "  rankdir=LR;", "  node [shape=box];"]
    for each in steps[:MOST_NODES]:
        label = "\\n".join(part.replace("\\", "\\\\").replace('"', '\\"') for part in _label(each))
        lines.append(f'  {named[each.id]} [label="{label}"];')
    lines += [f"  {named[need]} -> {named[each]};" for need, each in _edges(steps, named)]
    return [*lines, *([f"  // {_too_many(steps)}"] if len(steps) > MOST_NODES else []), "}"]


def mark(status: str) -> str:
    """One character for a status."""
    return _MARKS.get(status, "?")


def _row(step: Drawn, id_width: int, role_width: int) -> str:
    name, role = shown(step.id, 64), shown(step.role, 40)
    parts = [f"{mark(step.status)} "] if step.status else []
    parts += [name, " " * (id_width - cells(name) + 2), role]
    if step.needs:
        needs = ", ".join(shown(each, 64) for each in step.needs[:_MOST_NEEDS])
        more = f" and {len(step.needs) - _MOST_NEEDS} more" if len(step.needs) > _MOST_NEEDS else ""
        parts += [" " * (role_width - cells(role) + 2), f"← {needs}{more}"]
    if step.note:
        parts.append(f"   {step.note}")
    return "".join(parts).rstrip()


def _fitted(line: str, width: int | None) -> str:
    return fit(line, width) if width else line


def _label(step: Drawn) -> Iterator[str]:
    yield shown(step.id, 64)
    if step.role != step.id:
        yield shown(step.role, 40)
    if step.status:
        yield step.status


def _named(steps: Sequence[Drawn]) -> dict[str, str]:
    # Numbers: "end" and "graph" are words of the languages themselves.
    return {each.id: f"s{at}" for at, each in enumerate(steps[:MOST_NODES])}


def _edges(steps: Sequence[Drawn], named: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    for each in steps[:MOST_NODES]:
        for need in each.needs:
            if need in named:
                yield need, each.id


def _in_mermaid(text: str) -> str:
    return "".join(each if each.isalnum() or each in " -_.,:/" else f"#{ord(each)};" for each in text)


def _too_many(steps: Sequence[Drawn]) -> str:
    return f"{len(steps) - MOST_NODES} more steps are not drawn"
