"""A process tree that does not want to die: `nasty.py KIND REGISTER`, where REGISTER gets a line for every pid."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections import deque
from itertools import repeat
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import FrameType

LIFETIME = 60  # seconds; a test that fails leaves nothing behind for ever


def stay(register: Path) -> None:
    """Be there, deaf, and say so."""
    go_deaf()
    enlist(register)
    while True:
        signal.pause()


def go_deaf() -> None:
    signal.alarm(LIFETIME)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)


def enlist(register: Path) -> None:
    fd = os.open(register, os.O_WRONLY | os.O_APPEND)
    os.write(fd, f"{os.getpid()}\n".encode())
    os.close(fd)


def fork(body: Callable[[], None]) -> int:
    pid = os.fork()
    if pid == 0:
        try:
            body()
        finally:
            os._exit(1)
    return pid


def drop_streams() -> None:
    null = os.open(os.devnull, os.O_RDWR)
    for fd in (0, 1, 2, 3):
        os.dup2(null, fd)


def deaf(register: Path) -> int:
    return 0


def spinning(register: Path) -> int:
    def child() -> None:
        go_deaf()
        enlist(register)
        spin()

    fork(child)
    return 1


def spin() -> None:
    """Be busy in C, where no handler of Python's ever has its turn, with all signals blocked."""
    signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals() - {signal.SIGALRM})
    deque(repeat(None), maxlen=0)


def new_session(register: Path) -> int:
    def grandchild() -> None:
        os.setsid()
        stay(register)

    def child() -> None:
        fork(grandchild)
        stay(register)

    fork(child)
    return 2


def daemonized(register: Path) -> int:
    def grandchild() -> None:
        drop_streams()
        stay(register)

    def child() -> None:
        os.setsid()
        fork(grandchild)

    os.waitpid(fork(child), 0)
    return 1


def cleared_environment(register: Path) -> int:
    def child() -> None:
        os.setsid()
        os.execve(sys.executable, [sys.executable, "-S", __file__, "deaf", str(register)], {})

    fork(child)
    return 1


def vanished(register: Path) -> int:
    """Without the environment, the session and the parents that could tell where it comes from."""

    def child() -> None:
        os.setsid()
        fork(grandchild)

    def grandchild() -> None:
        drop_streams()
        os.execve(sys.executable, [sys.executable, "-S", __file__, "deaf", str(register)], {})

    os.waitpid(fork(child), 0)
    return 1


def respawner(register: Path) -> int:
    def body() -> None:
        os.setsid()

        def again(number: int, frame: object) -> None:
            fork(body)
            os._exit(0)

        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, again)
        signal.alarm(LIFETIME)
        enlist(register)
        while True:  # and a new child for every one that is killed
            fork(lambda: stay(register))
            os.wait()

    fork(body)
    return 2


def holds_stdout(register: Path) -> int:
    def grandchild() -> None:
        os.setsid()
        sys.stdout.write("held")
        sys.stdout.flush()
        stay(register)

    def child() -> None:
        fork(grandchild)

    os.waitpid(fork(child), 0)
    return 1


def stopped(register: Path) -> int:
    def child() -> None:
        signal.alarm(LIFETIME)
        enlist(register)
        os.kill(os.getpid(), signal.SIGSTOP)
        stay(register)

    fork(child)
    return 1


def traps_signals(register: Path) -> int:
    """Whenever it hears CONT or TERM it starts another of its kind, in a session of its own."""

    def body() -> None:
        os.setsid()
        signal.alarm(LIFETIME)

        def again(number: int, frame: FrameType | None) -> None:
            fork(body)

        for number in (signal.SIGCONT, signal.SIGTERM):
            signal.signal(number, again)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        enlist(register)
        while True:
            signal.pause()

    fork(body)
    return 1


KINDS = {
    tree.__name__: tree
    for tree in (
        deaf,
        spinning,
        new_session,
        daemonized,
        cleared_environment,
        vanished,
        respawner,
        holds_stdout,
        stopped,
        traps_signals,
    )
}


def main() -> None:
    kind, register = sys.argv[1], Path(sys.argv[2])
    signal.alarm(LIFETIME)
    expected = KINDS[kind](register)
    if kind != "stopped":
        go_deaf()
    enlist(register)
    deadline = time.monotonic() + 60
    while len(register.read_text().splitlines()) <= expected and time.monotonic() < deadline:
        time.sleep(0.005)
    if "VESPERA_PROGRESS_FD" in os.environ:
        os.write(int(os.environ["VESPERA_PROGRESS_FD"]), b"ready\n")
    if kind == "spinning":
        spin()
    if kind == "stopped":
        os.kill(os.getpid(), signal.SIGSTOP)
    while True:
        signal.pause()


if __name__ == "__main__":
    main()
