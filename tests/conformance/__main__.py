"""`python -m tests.conformance --port N`: serves, says in one line that it is ready, ends on SIGTERM or EOF."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import tempfile
from contextlib import suppress
from pathlib import Path

import anyio

from tests.conformance.serving import served

_STDIN = 0


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.conformance", description=__doc__)
    parser.add_argument("--port", type=int, default=0, help="0 takes a free one")
    port: int = parser.parse_args().port
    with tempfile.TemporaryDirectory(prefix="conformance-") as folder:
        anyio.run(_serve, Path(folder), port)


async def _serve(folder: Path, port: int) -> None:
    async with served(folder, port) as url, anyio.create_task_group() as group:
        group.start_soon(_until_signalled, group.cancel_scope)
        group.start_soon(_until_closed, group.cancel_scope)
        sys.stdout.write(f"ready {url}\n")
        sys.stdout.flush()


async def _until_signalled(scope: anyio.CancelScope) -> None:
    with anyio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
        async for _ in signals:
            scope.cancel()
            return


async def _until_closed(scope: anyio.CancelScope) -> None:
    """A pipe on stdin is held open by whoever wants us. Files and /dev/null cannot be waited for, and end nothing."""
    with suppress(PermissionError):
        while True:
            await anyio.wait_readable(_STDIN)
            if not os.read(_STDIN, 4096):
                scope.cancel()
                return


if __name__ == "__main__":
    main()
