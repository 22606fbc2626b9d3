"""The process that owns a data directory: one `Vespera` behind every door, until it is told to go or idle."""

from __future__ import annotations

import argparse
import gc
import os
import sqlite3
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from vespera_exec import garbage, paths
from vespera_exec.app.owning import check_unserved
from vespera_exec.errors import DataDirectoryInUse, VesperaError
from vespera_exec.server.launch import PASSING, not_writable
from vespera_exec.settings import Settings

if TYPE_CHECKING:
    from collections.abc import Sequence

_PASSING_IN_SQLITE = {sqlite3.SQLITE_FULL, sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED, sqlite3.SQLITE_NOMEM}


def main(argv: Sequence[str] | None = None) -> int:
    """Run until SIGTERM, SIGINT or idleness. Exit code 0 then.

    When it could not start or go on: 75 (`EX_TEMPFAIL`) where trying again later may help, else 1.
    """
    parser = argparse.ArgumentParser(prog="vespera_exec.server.daemon", description=__doc__)
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--expect-mcp", action="store_true", help="an MCP client is about to come: be ready for it")
    arguments = parser.parse_args(argv)
    try:
        settings = Settings.load(data_dir=arguments.data_dir.resolve())
        check_unserved(settings.data_dir, os.environ)  # before the imports: most of what a refusal would take
        _serve(settings, expect_mcp=arguments.expect_mcp)
    except VesperaError as error:
        sys.stderr.write(f"vespera-exec: {error.message} ({error.error_code}); {error.hint}\n")
        return os.EX_TEMPFAIL if _may_pass(error) else 1
    return 0


def _may_pass(error: VesperaError) -> bool:
    """Waiting may help: somebody else is in the way, or the machine is short of something."""
    if isinstance(error, DataDirectoryInUse):
        return True
    match error.__cause__:
        case OSError(errno=number):
            return number in PASSING
        case sqlite3.Error() as fault:
            return getattr(fault, "sqlite_errorcode", 0) & 0xFF in _PASSING_IN_SQLITE
        case _:
            return False


def _serve(settings: Settings, *, expect_mcp: bool) -> None:
    # Imports make no garbage worth looking for: a tenth of the start. What they leave stays for good.
    gc.disable()
    import anyio

    from vespera_exec.server import logs
    from vespera_exec.server.doors import serve

    garbage.settle()
    gc.enable()
    paths.create_data_dir(settings.data_dir)
    try:
        logs.configure(settings.log_level, file=settings.data_dir / paths.DAEMON_LOG)
    except OSError as fault:
        raise not_writable(settings.data_dir, fault) from fault
    anyio.run(partial(serve, settings, expect_mcp=expect_mcp))


if __name__ == "__main__":
    sys.exit(main())
