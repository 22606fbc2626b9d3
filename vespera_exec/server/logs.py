"""One structured log: a JSON object a line, ours and the libraries'. On stderr, and in a file that cannot grow long."""

from __future__ import annotations

import logging
import logging.handlers
import os
import re
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

import orjson

from vespera_exec.model.tokens import FORM
from vespera_exec.server.launch import LOG_LIMIT_BYTES, open_own

if TYPE_CHECKING:
    from io import TextIOWrapper

# What every record has; whatever else one carries came with `extra`.
_OWN = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}
_MASK = "***"
_TOKEN = re.compile(FORM.pattern.decode())
_secrets: list[str] = []


def configure(level: str = "info", *, file: Path | None = None, limit_bytes: int = LOG_LIMIT_BYTES) -> None:
    """Send every log record to stderr, and to `file`. stdout belongs to the protocol.

    A `file` of more than `limit_bytes` becomes `<file>.1`, in place of an earlier one. Where stderr is that file
    already, as in a daemon that a client started, a record is written once, and stderr moves on to the new file.

    Raises:
        DaemonUnavailable: `file` is a link, no regular file, or another user's.
    """
    handlers: list[logging.Handler] = []
    if file is not None:
        handlers.append(_Rotating(file, limit_bytes))
    if file is None or not _is_stderr(file):
        handlers.append(logging.StreamHandler(sys.stderr))
    root = logging.getLogger()
    for handler in handlers:
        handler.setFormatter(_Lines())
    root.handlers = handlers
    root.setLevel(level.upper())
    for noisy in ("uvicorn.access", "mcp", "asyncio", "httpx"):
        logging.getLogger(noisy).setLevel(max(logging.WARNING, root.level))


def mask(secret: str) -> None:
    """From now on it is written as `***`, wherever a line has it."""
    if secret and secret not in _secrets:
        _secrets.append(secret)


class _Rotating(logging.handlers.RotatingFileHandler):
    def __init__(self, path: Path, limit_bytes: int) -> None:
        super().__init__(path, maxBytes=limit_bytes, backupCount=1, encoding="utf-8")

    def _open(self) -> TextIOWrapper:
        descriptor = open_own(Path(self.baseFilename), os.O_WRONLY | os.O_APPEND)
        return os.fdopen(descriptor, "a", encoding="utf-8", errors="backslashreplace")

    def doRollover(self) -> None:
        followed = _is_stderr(Path(self.baseFilename))
        super().doRollover()
        if followed and self.stream is not None:  # what the interpreter says when it dies belongs into the new file
            os.dup2(self.stream.fileno(), 2)


class _Lines(logging.Formatter):
    """`{event, level, logger, timestamp}`, what came with `extra`, and `exception` where there is one."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, object] = {
            "event": record.getMessage(),
            "level": record.levelname.lower(),
            "logger": record.name,
            "timestamp": datetime.fromtimestamp(record.created, UTC).isoformat().replace("+00:00", "Z"),
        }
        line |= {name: value for name, value in vars(record).items() if name not in _OWN and name not in line}
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        try:
            text = orjson.dumps(line, default=str, option=orjson.OPT_NON_STR_KEYS).decode()
        except TypeError:  # half a surrogate pair in somebody's title must not cost the line
            text = orjson.dumps({name: ascii(value) for name, value in line.items()}).decode()
        for secret in _secrets:
            text = text.replace(secret, _MASK)
        return _TOKEN.sub(_MASK, text)


def _is_stderr(path: Path) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(2))
    except OSError:
        return False
