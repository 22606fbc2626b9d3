"""Every limit and default, each settable by one `VESPERA_*` environment variable.

Standard library only, so that a CLI command which merely asks the daemon starts at once.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from vespera_exec import paths
from vespera_exec.errors import InvalidInput

if TYPE_CHECKING:
    from collections.abc import Mapping

TOOLSETS: Final = ("core", "worker", "operations", "plans")


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """The operator's choices. `max_concurrent` is `VESPERA_MAX_CONCURRENT`, and so on for each field."""

    data_dir: Path
    roles_dir: Path
    # engine
    max_concurrent: int = 4
    max_queued: int = 10_000
    default_timeout_seconds: float = 0.0  # 0: none, unless the role names one
    sla_seconds: float = 3600.0
    sample_seconds: float = 1.0  # 0: no usage sampling
    progress_interval_ms: int = 20
    cancelled_task_status: str = "cancelled"  # or "todo"
    worker_lease_seconds: float = 60.0
    capacity: str = ""  # pools: `cpu=4,gpu=1`, or the path of a file
    # doors
    tcp: bool = True
    tcp_host: str = "127.0.0.1"
    tcp_port: int = 0
    allow_command_over_tcp: bool = False
    allowed_roots: tuple[Path, ...] = ()
    body_limit_bytes: int = 4 * 1024 * 1024
    idle_exit_seconds: float = 900.0  # 0: never
    log_level: str = "info"
    mcp_task_ttl_seconds: float = 0.0  # 0: a task handle answers as long as its run is kept
    mcp_poll_interval_ms: int = 1000
    toolsets: str = "core"  # of `TOOLSETS`, with commas between
    # sizes
    title_limit: int = 500
    description_limit: int = 100_000
    inputs_limit_bytes: int = 262_144
    result_limit_bytes: int = 1024 * 1024
    output_limit_bytes: int = 8 * 1024 * 1024
    linger_ms: float = 2.0
    retention_days: float = 0.0  # 0: nothing is ever removed

    @classmethod
    def load(cls, environ: Mapping[str, str] | None = None, *, cwd: Path | None = None, **given: Any) -> Settings:
        """Settings from the environment; keyword arguments win over it.

        Raises:
            InvalidInput: a variable has a value that its setting cannot take.
        """
        environ = os.environ if environ is None else environ
        cwd = cwd or Path.cwd()
        values: dict[str, Any] = {
            "data_dir": paths.find_data_dir(cwd, environ),
            "roles_dir": paths.roles_dir(environ),
        }
        for field in fields(cls):
            raw = environ.get(f"VESPERA_{field.name.upper()}")
            if raw is not None and field.name not in ("data_dir", "roles_dir"):
                values[field.name] = _parse(field.name, str(field.type), raw)
        values.update(given)
        loaded = cls(**values)
        _check(loaded)
        return loaded

    @property
    def shown_toolsets(self) -> frozenset[str]:
        """The MCP toolsets that are wanted."""
        return frozenset(name.strip() for name in self.toolsets.split(","))

    @property
    def database(self) -> Path:
        return self.data_dir / paths.DATABASE


def _parse(name: str, kind: str, raw: str) -> Any:
    try:
        match kind:
            case "int":
                return int(raw)
            case "float":
                return float(raw)
            case "bool":
                return {"1": True, "true": True, "yes": True, "0": False, "false": False, "no": False}[raw.lower()]
            case "tuple[Path, ...]":
                return tuple(Path(part).expanduser().resolve() for part in raw.split(os.pathsep) if part)
            case _:
                return raw
    except (ValueError, KeyError):
        raise InvalidInput(f"VESPERA_{name.upper()}={raw!r} is not a {kind}") from None


_AT_LEAST_ONE = (
    "max_concurrent",
    "max_queued",
    "title_limit",
    "output_limit_bytes",
    "body_limit_bytes",
    "mcp_poll_interval_ms",
)


def _check(settings: Settings) -> None:
    for field in fields(settings):
        value = getattr(settings, field.name)
        if isinstance(value, int | float) and not 0 <= value < math.inf:
            raise InvalidInput(f"VESPERA_{field.name.upper()} must be a number from 0 on, not {value}")
    for name in _AT_LEAST_ONE:
        if getattr(settings, name) < 1:
            raise InvalidInput(f"VESPERA_{name.upper()} must be at least 1")
    if settings.tcp_port > 65535:
        raise InvalidInput("VESPERA_TCP_PORT must be between 0 and 65535")
    if settings.cancelled_task_status not in ("cancelled", "todo"):
        raise InvalidInput("VESPERA_CANCELLED_TASK_STATUS is 'cancelled' or 'todo'")
    if unknown := settings.shown_toolsets.difference(TOOLSETS):
        named = ", ".join(sorted(map(repr, unknown)))
        raise InvalidInput(f"VESPERA_TOOLSETS names {named}; the toolsets are {', '.join(TOOLSETS)}")
    if settings.worker_lease_seconds < 1:
        raise InvalidInput("VESPERA_WORKER_LEASE_SECONDS must be at least 1")
    if settings.log_level not in ("debug", "info", "warning", "error"):
        raise InvalidInput("VESPERA_LOG_LEVEL is debug, info, warning or error")
