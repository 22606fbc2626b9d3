"""A role: who does the work, with what inputs, under which limits, and who may ask for it."""

from __future__ import annotations

import inspect
import os
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final, Literal, NoReturn, Protocol

import anyio.to_thread

from roles import inputs as schema
from roles.runners import call
from vespera_exec.errors import ExecutionError, InvalidInput, PermissionDenied
from vespera_exec.model.principal import LOCAL, Caller

if TYPE_CHECKING:
    from roles.inputs import InputSpec
    from vespera_exec.model.capacity import CapacityRequirement
    from vespera_exec.model.events import Json

NAME: Final = re.compile(r"[a-z][a-z0-9_-]{0,63}\Z")

Runner = Literal["python", "process", "external"]
ProgressCallback = Callable[..., None]


class TaskLike(Protocol):
    """What a role sees of a task: a `Task` of the model, or the `Work` of the engine."""

    @property
    def task_id(self) -> str: ...
    @property
    def title(self) -> str: ...
    @property
    def description(self) -> str: ...
    @property
    def inputs(self) -> Mapping[str, Json]: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class RetryPolicy:
    """When a failed attempt is followed by another: only for the error codes in `retry_on`."""

    max_retries: int = 0
    retry_on: tuple[str, ...] = ()
    backoff_seconds: float = 1.0
    backoff_factor: float = 2.0
    backoff_max_seconds: float = 60.0

    def applies(self, error_code: str, failed_attempts: int) -> bool:
        """Whether the run goes on after its `failed_attempts`-th failure (1 for the first)."""
        return error_code in self.retry_on and failed_attempts <= self.max_retries

    def delay(self, failed_attempts: int) -> float:
        """Seconds to wait before the next attempt."""
        exponent = min(failed_attempts - 1, 64)
        return min(self.backoff_seconds * self.backoff_factor**exponent, self.backoff_max_seconds)


@dataclass(frozen=True, slots=True, kw_only=True)
class Permissions:
    """`principals` are named one by one; a token that has every one of `scopes` may too, unless there are none."""

    principals: tuple[str, ...] = (LOCAL,)
    scopes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class PatternSpec:
    """A role's own expression: named groups `percent`, or `done` and `total`."""

    regex: str
    kind: Literal["percent", "steps"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Role:
    """A definition, as data. Files make it through `rolefile.parse_role`, programs through `Role.from_callable`.

    `inputs` None takes any inputs as they are. `timeout_seconds` 0 means none of its own.
    `argv_input` names the input that is the whole argument vector; only the built-in `command` has one.
    """

    name: str
    description: str = ""
    runner: Runner = "python"
    target: str | None = None
    argv: tuple[str, ...] = ()
    argv_input: str | None = None
    inputs: Mapping[str, InputSpec] | None = field(default_factory=lambda: MappingProxyType({}))
    patterns: bool = False
    """The built-in progress patterns are read from the output."""
    own_patterns: tuple[PatternSpec, ...] = ()
    timeout_seconds: float = 0.0
    wait_timeout_seconds: float = 0.0
    grace_seconds: float = 3.0
    retry: RetryPolicy = RetryPolicy()
    capacity: tuple[CapacityRequirement, ...] = ()
    """What its work needs of the pools while it runs, unless the request says otherwise."""
    on_interrupt: Literal["fail", "resume"] = "fail"
    approval: str | bool = False
    """What is asked before its work begins, once in each run; True asks in our words. Rejected, the run ends."""
    pure: bool = False
    """What it returns follows from its inputs alone, so a plan may take it from an earlier execution."""
    permissions: Permissions = Permissions()
    reads_paths: bool = True
    env: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    stdin: Literal["none", "task"] = "none"
    workers: tuple[str, ...] = ()
    """Of runner external: the principals that may claim its tasks; none means every worker."""
    lease_seconds: float = 0.0
    """Of runner external: how long a worker keeps a task without a report; 0 means the setting."""
    source: str = "program"
    """Where it was defined: "builtin", "program", or the name of the file."""
    fn: Callable[..., Any] | None = field(default=None, compare=False)
    in_loop: bool = False
    python_path: str | None = None
    """A folder that the child process adds to its import path; a file when the callable lives in a script."""

    def __post_init__(self) -> None:
        if not NAME.match(self.name):
            raise InvalidInput(f"{self.name[:80]!r} is no role name: a lower-case letter, then letters, digits, _ or -")
        if self.runner == "external" and self.approval:
            raise InvalidInput(f"role {self.name}: nobody asks for the approval of a role with runner external")
        if self.pure and self.approval:
            raise InvalidInput(f"role {self.name}: a result that was kept would pass its approval over; it is not pure")

    @classmethod
    def from_callable(
        cls,
        fn: Callable[..., Any],
        *,
        name: str | None = None,
        description: str = "",
        in_loop: bool = False,
        inputs: Mapping[str, Any] | None = None,
        **policy: Any,
    ) -> Role:
        """A role of an embedding program. `inputs` is as in a role file; None takes any.

        `fn` is called as `roles.runners.call` describes. With `in_loop` it must be async and runs in the
        engine's own loop; else it is run in a child process, for which it must be importable by name.
        A lambda or a function inside a function serves only the in-memory `execute_task`, or in the loop.

        Raises:
            InvalidInput: the name, an input or a policy field is not valid, or `in_loop` does not fit `fn`.
        """
        if in_loop and not inspect.iscoroutinefunction(inspect.unwrap(fn)):
            raise InvalidInput("in_loop=True needs an async callable; a sync one would block the loop")
        shown = getattr(fn, "__name__", type(fn).__name__)
        target, python_path = _importable(fn)
        doc = inspect.getdoc(fn) or ""
        try:
            return cls(
                name=name or re.sub(r"[^a-z0-9_-]", "-", shown.lower()).strip("-"),
                description=description or doc.partition("\n")[0],
                target=target,
                python_path=python_path,
                inputs=None if inputs is None else MappingProxyType(schema.read_specs(inputs, _fail_input)),
                fn=fn,
                in_loop=in_loop,
                **policy,
            )
        except TypeError as error:
            raise InvalidInput(f"role {shown}: {error}") from None

    def validate_inputs(self, given: Mapping[str, Json]) -> dict[str, Json]:
        """`given` with the defaults filled in.

        Raises:
            InvalidInput: names every bad input, and what is expected of it.
        """
        if self.inputs is None:
            return dict(given)
        completed, problems = schema.complete(self.inputs, given)
        if problems:
            shown = "; ".join(problems[:8]) + (f"; and {len(problems) - 8} more" if len(problems) > 8 else "")
            raise InvalidInput(f"inputs of role {self.name}: {shown}", hint="list_roles shows what a role takes")
        return completed

    def resolve_paths(self, inputs: Mapping[str, Json], caller: Caller, roots: tuple[Path, ...]) -> dict[str, Json]:
        """The inputs with those of type `path` made absolute from where the caller stands.

        A local caller's paths are taken as they are. For others every path, its symlinks followed, must be
        inside one of `roots`, where the role reads paths; a relative one starts at the first root.

        Raises:
            PermissionDenied: a path is outside the roots.
        """
        resolved = dict(inputs)
        for name, spec in (self.inputs or {}).items():
            if name not in inputs:
                continue
            if spec.type == "path":
                resolved[name] = self._resolve(inputs[name], caller, roots)
            elif spec.type == "list" and spec.of == "path":
                resolved[name] = [self._resolve(each, caller, roots) for each in inputs[name]]
        return resolved

    def permits(self, caller: Caller) -> bool:
        """Whether `caller` may use this role. "local" is our own uid over the socket, never a name in a token."""
        if caller.is_local:
            return LOCAL in self.permissions.principals
        if caller.principal != LOCAL and caller.principal in self.permissions.principals:
            return True
        return bool(self.permissions.scopes) and caller.scopes.issuperset(self.permissions.scopes)

    def admits(self, worker: Caller) -> bool:
        """Whether `worker` may claim its tasks."""
        if self.runner != "external" or not self.workers:
            return self.runner == "external"
        return worker.principal in self.workers and (worker.is_local or worker.principal != LOCAL)

    def input_schema(self) -> dict[str, Json]:
        """What it takes, as JSON Schema."""
        if self.inputs is None:
            return {"type": "object", "additionalProperties": True}
        schema: dict[str, Json] = {
            "type": "object",
            "properties": {name: spec.json_schema() for name, spec in self.inputs.items()},
            "additionalProperties": False,
        }
        if required := [name for name, spec in self.inputs.items() if spec.required]:
            schema["required"] = required
        return schema

    async def execute_task(self, task: TaskLike, context: Any, progress_callback: ProgressCallback) -> Any:
        """Run the callable here: async in this loop, sync in a worker thread. What it returns.

        `progress_callback(progress, message="")` takes 0 to 100 and may be called from any thread.

        Raises:
            ExecutionError: code NEEDS_ENGINE, the role starts a process; or whatever the callable raises.
        """
        if self.runner != "python" or (self.fn is None and self.target is None):
            raise ExecutionError(
                f"Role {self.name} is done by a process or a worker, which needs the engine",
                code="NEEDS_ENGINE",
                recoverable=False,
                hint="run it through the server, or hand the executor a Work",
            )
        fn = self.fn if self.fn is not None else call.resolve(self.target or "")
        arguments = call.arguments(fn, task, context, progress_callback)
        if inspect.iscoroutinefunction(inspect.unwrap(fn)):
            return await fn(*arguments)
        outcome = await anyio.to_thread.run_sync(lambda: fn(*arguments), abandon_on_cancel=True)
        return await outcome if inspect.isawaitable(outcome) else outcome

    def _resolve(self, given: str, caller: Caller, roots: tuple[Path, ...]) -> str:
        if caller.is_local:
            return os.path.normpath(Path(caller.cwd or Path.cwd()) / _from_home(given))
        if not self.reads_paths:
            return given
        if not roots:
            raise PermissionDenied(
                f"Role {self.name} reads paths, and no folder is open to {caller.principal}",
                hint="the operator lists folders in VESPERA_ALLOWED_ROOTS",
            )
        path = (roots[0] / given).resolve()
        if not any(path.is_relative_to(root.resolve()) for root in roots):
            raise PermissionDenied(f"{given} is outside the folders that are open to {caller.principal}")
        return str(path)


def _fail_input(path: schema.Path, message: str) -> NoReturn:
    raise InvalidInput(f"inputs.{'.'.join(map(str, path))}: {message}" if path else f"inputs: {message}")


def _from_home(given: str) -> Path:
    try:
        return Path(given).expanduser()
    except RuntimeError:  # `~nobody`: then it is a name that starts with a tilde
        return Path(given)


def _importable(fn: Callable[..., Any]) -> tuple[str | None, str | None]:
    """`(target, python_path)` under which a child process finds `fn`; `(None, None)` where it cannot."""
    module: str | None = getattr(fn, "__module__", None)
    name: str | None = getattr(fn, "__qualname__", None)
    loaded = sys.modules.get(module or "")
    if loaded is None or module is None or name is None or getattr(loaded, name, None) is not fn:
        return None, None
    file: str | None = getattr(loaded, "__file__", None)
    if module == "__main__":
        return (f"__main__:{name}", str(Path(file).resolve())) if file else (None, None)
    levels = module.count(".") + (1 if hasattr(loaded, "__path__") else 0)
    return f"{module}:{name}", str(Path(file).resolve().parents[levels]) if file else None
