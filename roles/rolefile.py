"""Role files: bounded YAML in, a `Role` out, every complaint with its file and line."""

from __future__ import annotations

import re
from pathlib import PurePath
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final, NoReturn, cast

from roles import inputs as schema
from roles.definition import NAME, PatternSpec, Permissions, RetryPolicy, Role
from roles.inputs import InputSpec, near
from roles.regex import compile_bounded
from roles.yamlfile import Limits, Where, YamlFile
from vespera_exec.errors import InvalidInput, InvalidRoleFile
from vespera_exec.model.capacity import requirements
from vespera_exec.model.inputs import MAX_MESSAGE_CHARACTERS
from vespera_exec.model.principal import LOCAL

if TYPE_CHECKING:
    from collections.abc import Mapping

    from vespera_exec.model.capacity import CapacityRequirement

MAX_BYTES: Final = 64 * 1024
MAX_NODES: Final = 4000
MAX_ARGUMENTS: Final = 256
_LIMITS: Final = Limits(bytes=MAX_BYTES, values=MAX_NODES)
_SHELLS: Final = frozenset({"sh", "bash", "dash", "zsh", "ksh", "fish"})
PIECES: Final = re.compile(r"\{\{|\}\}|\{(inputs\.[a-z][a-z0-9_]*|scratch)\}")
"""What is special in an argument: a doubled brace, or a placeholder (group 1)."""

_KEYS: Final = (
    "name", "description", "runner", "target", "argv", "inputs", "progress", "timeout_seconds",
    "wait_timeout_seconds", "grace_seconds", "retry", "on_interrupt", "permissions", "reads_paths", "env", "stdin",
    "workers", "lease_seconds", "approval", "pure", "capacity",
)  # fmt: skip
_NOT_EXTERNAL: Final = ("target", "argv", "progress", "on_interrupt", "env", "stdin", "approval")
_ONLY_EXTERNAL: Final = ("workers", "lease_seconds")
_BUILTIN_KEYS: Final = (*_KEYS, "argv_input")
_DAY: Final = 86_400.0


def parse_role(data: bytes, *, file: str, builtin: bool = False) -> Role:
    """The role that `data` defines. `file` is its name for messages; its stem must be the role's name.

    Raises:
        InvalidRoleFile: "file:line: what is wrong".
    """
    document = YamlFile(file, data, kind="role file", limits=_LIMITS, error=InvalidRoleFile)
    return _RoleReader(document, builtin=builtin).read()


class _RoleReader:
    """Turns a document into a role, or says at which line it cannot."""

    def __init__(self, document: YamlFile, *, builtin: bool) -> None:
        self._document = document
        self._root = document.root
        self._fail = document.fail
        self._builtin = builtin

    def read(self) -> Role:
        self._only((), self._root, _BUILTIN_KEYS if self._builtin else _KEYS)
        name = self._name()
        runner = self._choice((), "runner", ("python", "process", "external"), "python")
        self._fitting(runner)
        specs = self._inputs()
        argv_input = self._text((), "argv_input") or None
        patterns, own = self._progress()
        return Role(
            name=name,
            description=self._text((), "description", limit=4000),
            runner=runner,
            target=self._target(runner),
            argv=self._argv(runner, specs) if argv_input is None else (),
            argv_input=argv_input,
            inputs=MappingProxyType(specs),
            patterns=patterns,
            own_patterns=own,
            timeout_seconds=self._seconds("timeout_seconds", 0.0, 365 * _DAY),
            wait_timeout_seconds=self._seconds("wait_timeout_seconds", 0.0, 365 * _DAY),
            grace_seconds=self._seconds("grace_seconds", 3.0, 4.0),
            retry=self._retry(),
            approval=self._approval(),
            capacity=self._capacity(),
            on_interrupt=self._choice((), "on_interrupt", ("fail", "resume"), "fail"),
            pure=self._pure(),
            permissions=self._permissions(runner),
            reads_paths=self._flag("reads_paths", default=True),
            env=MappingProxyType(self._env()),
            stdin=self._choice((), "stdin", ("none", "task"), "none"),
            workers=self._workers(),
            lease_seconds=self._seconds("lease_seconds", 0.0, _DAY),
            source="builtin" if self._builtin else self._document.file,
        )

    def _name(self) -> str:
        name = self._text((), "name")
        if not NAME.match(name):
            self._fail(("name",), f"{name[:80]!r} is no role name: a lower-case letter, then letters, digits, _ or -")
        stem = PurePath(self._document.file).stem
        if name != stem:
            self._fail(("name",), f"the role is named {name!r}, its file {stem!r}; they must be the same")
        return name

    def _fitting(self, runner: str) -> None:
        external = runner == "external"
        for key in _NOT_EXTERNAL if external else _ONLY_EXTERNAL:
            if key in self._root:
                why = "its work is done elsewhere" if external else "it is for `runner: external`"
                self._fail((key,), f"a role with `runner: {runner}` takes no `{key}`: {why}")

    def _pure(self) -> bool:
        pure = self._flag("pure", default=False)
        if pure and self._root.get("approval"):
            self._fail(("pure",), "a result that was kept would pass the approval over; a role has one of the two")
        return pure

    def _approval(self) -> str | bool:
        raw = self._root.get("approval", False)
        if isinstance(raw, bool) or (isinstance(raw, str) and 0 < len(raw) <= MAX_MESSAGE_CHARACTERS):
            return raw
        self._fail(("approval",), f"approval is true, or a text of at most {MAX_MESSAGE_CHARACTERS} characters")

    def _capacity(self) -> tuple[CapacityRequirement, ...]:
        try:
            return requirements(self._root.get("capacity"))
        except InvalidInput as error:
            self._fail(("capacity",), error.message)

    def _workers(self) -> tuple[str, ...]:
        raw = self._mapping("workers")
        self._only(("workers",), raw, ("principals",))
        return self._words(("workers",), raw, "principals", ())

    def _target(self, runner: str) -> str | None:
        target = self._text((), "target") or None
        if runner == "python" and target is None:
            self._fail((), "a python role needs a `target`: module:callable, or an entry point")
        if runner == "process" and target is not None:
            self._fail(("target",), "a process role has an `argv`, not a `target`")
        if target is not None and not re.fullmatch(r"[A-Za-z_][\w.-]*(:[A-Za-z_][\w.]*)?", target):
            self._fail(("target",), f"{target[:80]!r} is neither module:callable nor the name of an entry point")
        return target

    def _refuse_shell_code(self, arguments: list[Any]) -> None:
        """A value inside the text that a shell is given to run would be run by it."""
        if str(arguments[0]).rpartition("/")[2] not in _SHELLS:
            return
        for index, argument in enumerate(arguments[1:-1], start=1):
            option = str(argument)
            if option.startswith("-") and not option.startswith("--") and "c" in option:
                if any(found[1] for found in PIECES.finditer(str(arguments[index + 1]))):
                    self._fail(("argv", index + 1), 'the shell would run the value; write "$1" and pass it behind')
                return

    def _argv(self, runner: str, specs: Mapping[str, InputSpec]) -> tuple[str, ...]:
        if runner == "external":
            return ()
        if runner == "python":
            if "argv" in self._root:
                self._fail(("argv",), "a python role has a `target`, not an `argv`")
            return ()
        argv = self._root.get("argv")
        if not isinstance(argv, list) or not argv:
            self._fail(("argv",), "a process role needs an `argv`: a list of arguments, never a shell line")
        arguments = cast("list[Any]", argv)
        if len(arguments) > MAX_ARGUMENTS:
            self._fail(("argv",), f"at most {MAX_ARGUMENTS} arguments are allowed")
        for index, each in enumerate(arguments):
            self._argument(index, each, specs)
        self._refuse_shell_code(arguments)
        return tuple(str(each) for each in arguments)

    def _argument(self, index: int, argument: Any, specs: Mapping[str, InputSpec]) -> None:
        where = ("argv", index)
        if isinstance(argument, bool) or not isinstance(argument, str | int | float):
            self._fail(where, "an argument is a text or a number; quote it")
        text = str(argument)
        if not text and index == 0:
            self._fail(where, "the program has no name")
        names = [found[1] for found in PIECES.finditer(text) if found[1]]
        if names and index == 0:
            self._fail(where, "the program itself is the operator's choice and takes no placeholder")
        if re.search(r"[{}]", PIECES.sub("", text)):
            self._fail(where, "a placeholder is {inputs.NAME} or {scratch}; write {{ and }} for braces")
        for name in names:
            spec = specs.get(name.removeprefix("inputs."))
            if name == "scratch":
                continue
            if spec is None:
                self._fail(where, f"{{{name}}} names no input{near(name.removeprefix('inputs.'), specs)}")
            if spec.type in ("list", "object"):
                self._fail(where, f"{{{name}}} is a {spec.type}; one argument takes one value")

    def _inputs(self) -> dict[str, InputSpec]:

        def fail(path: schema.Path, message: str) -> NoReturn:
            self._fail(("inputs", *path), message)

        return schema.read_specs(self._mapping("inputs"), fail)

    def _progress(self) -> tuple[bool, tuple[PatternSpec, ...]]:
        raw = self._root.get("progress", "descriptor")
        builtin, own = False, list[PatternSpec]()
        for index, each in enumerate(cast("list[Any]", raw) if isinstance(raw, list) else [raw]):
            where = ("progress", index)
            if each == "patterns":
                builtin = True
            elif isinstance(each, dict):
                own.append(self._own_pattern(where, cast("dict[str, Any]", each)))
            elif each != "descriptor":
                self._fail(where, "progress is `descriptor`, `patterns`, or a mapping with a `regex`")
        if len(own) > 8:
            self._fail(("progress",), "at most 8 expressions are allowed")
        return builtin, tuple(own)

    def _own_pattern(self, where: Where, given: Mapping[str, Any]) -> PatternSpec:
        self._only(where, given, ("regex", "kind"))
        regex = given.get("regex")
        if not isinstance(regex, str) or not regex:
            self._fail(where, "a pattern needs a `regex`")
        try:
            groups = compile_bounded(regex).groupindex
        except ValueError as error:
            self._fail((*where, "regex"), str(error))
        found = "percent" if "percent" in groups else "steps" if {"done", "total"} <= groups.keys() else None
        if found is None:
            self._fail((*where, "regex"), "name its groups: (?P<percent>...), or (?P<done>...) and (?P<total>...)")
        kind = given.get("kind", found)
        if kind != found:
            self._fail((*where, "kind"), f"the groups of the expression say {found}, not {kind!r}")
        return PatternSpec(regex=regex, kind=kind)

    def _retry(self) -> RetryPolicy:
        raw = self._mapping("retry")
        where = ("retry",)
        self._only(where, raw, ("max_retries", "retry_on", "backoff_seconds", "backoff_factor", "backoff_max_seconds"))
        default = RetryPolicy()
        policy = RetryPolicy(
            max_retries=int(self._number(where, raw, "max_retries", default.max_retries, 0, 100)),
            retry_on=self._words(where, raw, "retry_on", default.retry_on),
            backoff_seconds=self._number(where, raw, "backoff_seconds", default.backoff_seconds, 0, _DAY),
            backoff_factor=self._number(where, raw, "backoff_factor", default.backoff_factor, 1, 100),
            backoff_max_seconds=self._number(where, raw, "backoff_max_seconds", default.backoff_max_seconds, 0, _DAY),
        )
        if policy.max_retries and not policy.retry_on:
            self._fail(where, "retries happen only for the error codes in `retry_on`; name them")
        return policy

    def _permissions(self, runner: str) -> Permissions:
        raw = self._mapping("permissions")
        self._only(("permissions",), raw, ("principals", "scopes"))
        # What starts a process serves our own uid alone unless the operator says otherwise.
        scopes = () if runner == "process" or raw else ("operate",)
        return Permissions(
            principals=self._words(("permissions",), raw, "principals", (LOCAL,)),
            scopes=self._words(("permissions",), raw, "scopes", scopes),
        )

    def _env(self) -> dict[str, str]:
        raw = self._mapping("env")
        for name, value in raw.items():
            if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]{0,127}", name):
                self._fail(("env", name), f"{name[:40]!r} is no name of a variable")
            if name.startswith("VESPERA_"):
                self._fail(("env", name), "VESPERA_ variables are set by the server")
            if isinstance(value, bool) or not isinstance(value, str | int | float):
                self._fail(("env", name), "a variable is a text; quote it")
        return {name: str(value) for name, value in raw.items()}

    def _mapping(self, key: str) -> dict[str, Any]:
        raw = self._root.get(key)
        if raw is None:
            return {}
        if not isinstance(raw, dict):
            self._fail((key,), f"{key} is a mapping")
        return cast("dict[str, Any]", raw)

    def _only(self, where: Where, given: Mapping[str, Any], known: tuple[str, ...]) -> None:
        for key in given:
            if key not in known:
                self._fail((*where, key), f"unknown key {key[:64]!r}{near(key, known)}")

    def _text(self, where: Where, key: str, *, limit: int = 200) -> str:
        value = self._root.get(key, "")
        if not isinstance(value, str) or len(value) > limit:
            self._fail((*where, key), f"{key} is a text of at most {limit} characters")
        return value

    def _flag(self, key: str, *, default: bool) -> bool:
        value = self._root.get(key, default)
        if not isinstance(value, bool):
            self._fail((key,), f"{key} is true or false")
        return value

    def _choice(self, where: Where, key: str, choices: tuple[str, ...], default: str) -> Any:
        value = self._root.get(key, default)
        if value not in choices:
            self._fail((*where, key), f"{key} is one of {', '.join(choices)}")
        return value

    def _seconds(self, key: str, default: float, most: float) -> float:
        return self._number((), self._root, key, default, 0, most)

    def _number(
        self, where: Where, given: Mapping[str, Any], key: str, default: float, least: float, most: float
    ) -> float:
        value = given.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value <= most:
            self._fail((*where, key), f"{key} is a number from {least:g} to {most:g}")
        return value

    def _words(self, where: Where, given: Mapping[str, Any], key: str, default: tuple[str, ...]) -> tuple[str, ...]:
        value = given.get(key)
        if value is None:
            return default
        words = cast("list[Any]", value) if isinstance(value, list) else []
        if not isinstance(value, list) or not all(isinstance(each, str) and 0 < len(each) <= 200 for each in words):
            self._fail((*where, key), f"{key} is a list of words")
        return tuple(words)
