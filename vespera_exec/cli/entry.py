"""The console script: picks bridge, in-process server, report or command line, and imports only that one."""

import sys


def main() -> int:
    """What `vespera-exec` does; returns the exit code.

    Without arguments: the stdio bridge when stdin is not a terminal, else the help of the command line.
    """
    arguments = sys.argv[1:]
    if not arguments and sys.stdin is not None and not sys.stdin.isatty():
        from vespera_exec.server import bridge

        return bridge.main()
    first = arguments[0] if arguments else ""
    if first == "--in-process":
        from vespera_exec.server import inprocess

        return inprocess.main()
    if first == "report":
        from vespera_exec import report

        return report.main(arguments[1:])
    from vespera_exec.cli import app

    return app.main()
