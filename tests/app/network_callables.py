"""What a child process is called for by `test_network_faults`."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from roles.definition import TaskLike


held: list[int] = []


class Hung(ConnectionResetError):
    """As a library would raise it."""


def elsewhere(task: TaskLike) -> None:
    raise Hung("the other side is gone")


def leaking(task: TaskLike) -> None:
    while True:
        held.append(os.open(os.devnull, os.O_RDONLY))
