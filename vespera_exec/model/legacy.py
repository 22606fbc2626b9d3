"""The execution record that documents before 000 knew, and its fields as a view of the log."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Protocol, Self, cast

from vespera_exec.model.events import new_id

if TYPE_CHECKING:
    from collections.abc import Callable

    from vespera_exec.model.events import Json
    from vespera_exec.model.lifecycle import Lifecycle
    from vespera_exec.model.record import TaskRecord


@dataclass
class TaskExecution:
    """The record of a task's executions by hand. Its API is kept exactly."""

    assigned_role: str | None = None
    execution_history: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    current_execution_id: str | None = None
    retry_count: int = 0
    max_retries: int = 3
    last_error: str | None = None
    execution_context: dict[str, Any] = field(default_factory=dict[str, Any])

    def add_execution_record(
        self,
        role_name: str,
        status: str,
        output: str = "",
        error: str | None = None,
        metadata: dict[str, Any] | None = None,
    ) -> None:
        """Append a record; "failed" with an error counts as a retry, and nothing else does."""
        self.execution_history.append(
            {
                "execution_id": new_id(),
                "timestamp": datetime.now(UTC).isoformat(),
                "role_name": role_name,
                "status": status,
                "output": output,
                "error": error,
                "metadata": metadata or {},
            }
        )
        if status == "failed" and error:
            self.last_error = error
            self.retry_count += 1

    def can_retry(self) -> bool:
        return self.retry_count < self.max_retries

    def reset_retries(self) -> None:
        self.retry_count = 0
        self.last_error = None

    def to_dict(self) -> dict[str, Any]:
        """The seven legacy fields."""
        values: dict[str, Any] = {name: getattr(self, name) for name in LEGACY_FIELDS}
        values["execution_history"] = [dict(each) for each in self.execution_history]
        values["execution_context"] = dict(self.execution_context)
        return values

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """The inverse of `to_dict`; keys that are missing or null take their defaults, others are ignored."""
        return cls(**{name: data[name] for name in LEGACY_FIELDS if data.get(name) is not None})


def legacy_record(life: Lifecycle, summary: Mapping[str, Json], output: str) -> dict[str, Any]:
    """The entry of `execution_history` for an execution that has ended."""
    return {
        "execution_id": life.execution_id,
        "timestamp": life.completed_at.isoformat() if life.completed_at else None,
        "role_name": life.role_name,
        "status": life.status.value,
        "output": output,
        "error": life.error.get("message"),
        "metadata": {},
        "session_summary": dict(summary),
    }


LEGACY_FIELDS = tuple(each.name for each in fields(TaskExecution))


class _Recorded(Protocol):
    @property
    def record(self) -> TaskRecord: ...

    def change(self, **fields: Json) -> None: ...


class FoldedField:
    """A legacy field over the task's record: reading shows the fold, assigning records an event."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __get__(self, owner: _Recorded | None, kind: type) -> Any:
        if owner is None:
            return self
        value = getattr(owner.record, self._name)
        if not isinstance(value, Mapping):
            return value
        return _FoldedDict(cast("Mapping[str, Any]", value), lambda now: owner.change(**{self._name: now}))

    def __set__(self, owner: _Recorded, value: Any) -> None:
        owner.change(**{self._name: value})


def _unheard(_now: dict[str, Any]) -> None:
    """Stands for the log where a copy of a mapping is changed."""


class _FoldedDict(dict[str, Any]):
    """A legacy mapping: reading shows the fold, every change to it records an event."""

    def __init__(self, value: Any = (), record: Callable[[dict[str, Any]], None] = _unheard) -> None:
        super().__init__(value)
        self._record = record

    def __reduce__(self) -> tuple[type[dict[str, Any]], tuple[dict[str, Any]]]:
        return dict, (dict(self),)

    def __setitem__(self, key: str, value: Any) -> None:
        super().__setitem__(key, value)
        self._record(dict(self))

    def __delitem__(self, key: str) -> None:
        super().__delitem__(key)
        self._record(dict(self))

    def __ior__(self, other: Any) -> Self:
        super().update(other)
        self._record(dict(self))
        return self

    def update(self, *args: Any, **more: Any) -> None:
        super().update(*args, **more)
        self._record(dict(self))

    def setdefault(self, key: str, default: Any = None) -> Any:
        if key not in self:
            self[key] = default
        return self[key]

    def pop(self, key: str, *default: Any) -> Any:
        value = super().pop(key, *default)
        self._record(dict(self))
        return value

    def popitem(self) -> tuple[str, Any]:
        item = super().popitem()
        self._record(dict(self))
        return item

    def clear(self) -> None:
        super().clear()
        self._record({})
