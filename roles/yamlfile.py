"""Bounded YAML: plain values, nothing else, and the line of each; every complaint with its file and line."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, NoReturn, cast

import yaml

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from vespera_exec.errors import VesperaError

MAX_DEPTH: Final = 32

Where = tuple[Any, ...]
"""Keys and indexes, from the root."""

_Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_CONTROL: Final = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ufeff\ufffe\uffff\ud800-\udfff]")


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Of one file."""

    bytes: int
    values: int


class YamlFile:
    """A mapping in YAML as plain values (`root`), with the line of each. Anchors, aliases and tags are refused.

    `file` is its name for messages, `kind` what it should be; a complaint is `error("file:line: what is wrong")`.
    """

    def __init__(
        self, file: str, data: bytes, *, kind: str, limits: Limits, error: Callable[[str], VesperaError]
    ) -> None:
        self.file = file
        self._limits = limits
        self._error = error
        self._lines: dict[Where, int] = {}
        text = self._decoded(data)
        self._check_events(text)
        node = self._guarded(lambda: yaml.compose(text, Loader=_Loader))
        value = self._value(node, ()) if node is not None else None
        if not isinstance(value, dict):
            self.fail((), f"a {kind} is a mapping of keys to values")
        self.root = cast("dict[str, Any]", value)

    def fail(self, where: Where, message: str) -> NoReturn:
        """At the line of `where`, or of the nearest thing around it."""
        while where and where not in self._lines:
            where = where[:-1]
        self._fail_at(self._lines.get(where, 1), message)

    def _fail_at(self, line: int, message: str) -> NoReturn:
        raise self._error(f"{self.file}:{line}: {message}")

    def _decoded(self, data: bytes) -> str:
        if len(data) > self._limits.bytes:
            self._fail_at(1, f"the file has {len(data)} bytes; at most {self._limits.bytes} are allowed")
        try:
            text = data.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            self._fail_at(data.count(b"\n", 0, error.start) + 1, "not UTF-8")
        if (found := _CONTROL.search(text)) is not None:
            line = text.count("\n", 0, found.start()) + 1
            self._fail_at(line, f"the control character {ord(found[0]):#04x} is not allowed")
        return text

    def _check_events(self, text: str) -> None:
        depth = nodes = 0

        def check() -> None:
            nonlocal depth, nodes
            for event in cast("Iterable[Any]", yaml.parse(text, Loader=_Loader)):
                line = event.start_mark.line + 1
                if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None):
                    self._fail_at(line, "anchors and aliases are not allowed")
                if getattr(event, "tag", None):
                    self._fail_at(line, "tags are not allowed")
                nodes += 1
                if nodes > self._limits.values:
                    self._fail_at(line, f"more than {self._limits.values} values")
                if isinstance(event, yaml.CollectionStartEvent):
                    depth += 1
                    if depth > MAX_DEPTH:
                        self._fail_at(line, f"nested deeper than {MAX_DEPTH}")
                elif isinstance(event, yaml.CollectionEndEvent):
                    depth -= 1

        self._guarded(check)

    def _guarded(self, read: Callable[[], Any]) -> Any:
        try:
            return read()
        except yaml.MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark
            self._fail_at(mark.line + 1 if mark is not None else 1, str(error.problem or error.context))
        except yaml.YAMLError as error:
            self._fail_at(1, str(error).partition("\n")[0])

    def _value(self, node: yaml.Node, where: Where) -> Any:
        self._lines[where] = node.start_mark.line + 1
        if isinstance(node, yaml.MappingNode):
            return self._mapping(node, where)
        if isinstance(node, yaml.SequenceNode):
            return [self._value(each, (*where, index)) for index, each in enumerate(node.value)]
        return self._scalar(cast("yaml.ScalarNode", node), where)

    def _mapping(self, node: yaml.MappingNode, where: Where) -> dict[Any, Any]:
        values: dict[Any, Any] = {}
        for key_node, value_node in node.value:
            line = key_node.start_mark.line + 1
            if not isinstance(key_node, yaml.ScalarNode) or not key_node.tag.endswith(":str"):
                self._fail_at(line, "a key must be a plain word")
            key = str(key_node.value)
            if key in values:
                self._fail_at(line, f"the key {key!r} stands here twice")
            self._lines[(*where, key)] = line
            values[key] = self._value(value_node, (*where, key))
            self._lines[(*where, key)] = line
        return values

    def _scalar(self, node: yaml.ScalarNode, where: Where) -> Any:
        text = str(node.value)
        kind = node.tag.rpartition(":")[2]
        constructor = yaml.constructor.SafeConstructor()
        try:
            match kind:
                case "int":
                    return constructor.construct_yaml_int(node)
                case "float":
                    number = constructor.construct_yaml_float(node)
                    return number if math.isfinite(number) else self.fail(where, f"{text[:40]!r} is no number of JSON")
                case "bool":
                    return constructor.construct_yaml_bool(node)
                case "null":
                    return None
                case _:  # a date stays the text that it is
                    if (found := _CONTROL.search(text)) is not None:
                        self.fail(where, f"the control character {ord(found[0]):#04x} is not allowed")
                    return text
        except (ValueError, OverflowError):
            self.fail(where, f"{text[:40]!r} is no number")
