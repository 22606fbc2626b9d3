"""What a child process is called for by `test_network_faults`."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from roles.definition import TaskLike


class Hung(ConnectionResetError):
    """As a library would raise it."""


def elsewhere(task: TaskLike) -> None:
    raise Hung("the other side is gone")
