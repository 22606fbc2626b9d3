"""Brings one execution to a stand, and lets it go on."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Protocol

import anyio

from vespera_exec.engine.done import Done
from vespera_exec.model.enums import ExecutionStatus
from vespera_exec.model.transitions import AT_WORK

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sized

    from vespera_exec.model.session import ExecutionSession

S = ExecutionStatus


class Stoppable(Protocol):
    """What runs apart from the work in the loop: its processes, or the children of a plan."""

    @property
    def running(self) -> Sized:
        """Empty where `pause` has stopped nothing, since there is nothing."""
        ...

    def check_stoppable(self) -> None:
        """
        Raises:
            PauseUnsupported: this system cannot stop what runs.
        """
        ...

    async def pause(self) -> None:
        """Returns when all of it stands still. May be cancelled, and called again."""
        ...

    async def resume(self) -> None: ...


class Gate:
    """`PauseGate`. `reached` is called whenever work comes to a stop at it."""

    __slots__ = ("_opened", "_reached", "waiting")

    def __init__(self, reached: Callable[[], None]) -> None:
        self._reached = reached
        self._opened: anyio.Event | None = None
        """None while it is open."""
        self.waiting = 0
        """How many parts of the work stand here."""

    def close(self) -> None:
        if self._opened is None:
            self._opened = anyio.Event()

    def open(self) -> None:
        if self._opened is not None:
            self._opened.set()
            self._opened = None

    async def passed(self) -> None:
        while self._opened is not None:
            self.waiting += 1
            self._reached()
            try:
                await self._opened.wait()
            finally:
                self.waiting -= 1


class Pauses:
    """Whether one execution is to stand still, and whether it does.

    It stands when all its processes are stopped, or, where it has none, when its work waits at the gate. PAUSED is
    recorded then and not before. A resume is on disk (`on_disk`) before anything goes on. To be called on the loop.
    """

    def __init__(
        self, session: ExecutionSession, launcher: Stoppable, on_disk: Callable[[], Awaitable[object]]
    ) -> None:
        self.gate = Gate(self._turn)
        self._session = session
        self._launcher = launcher
        self._on_disk = on_disk
        self._wanted = False
        self._reason = ""
        self._closed = False
        self._turned = asyncio.Event()
        """Set by whatever `keep` has to look at."""
        self._asked: Done | None = None
        """The last request; done when it is settled."""
        self._step: anyio.CancelScope | None = None

    @property
    def pending(self) -> bool:
        """A pause is wanted and has not taken effect."""
        return self._wanted and not self._closed and self._session.lifecycle.status is not S.PAUSED

    @property
    def wanted(self) -> str | None:
        """Why it is to stand still, whether it does or not; None where it is not to."""
        return self._reason if self._wanted else None

    @property
    def is_settled(self) -> bool:
        """It stands or goes on, as was asked last."""
        return self._asked is None or self._asked.is_set()

    async def settled(self) -> None:
        """Returns when the last request has taken effect, is replaced by another, or never will."""
        if self._asked is not None:
            await self._asked.wait()

    def pause(self, reason: str) -> bool:
        """Ask it to stand still; False when its work is over or is being ended.

        Raises:
            PauseUnsupported: this system cannot stop what runs.
        """
        if self._closed:
            return False
        if not self._wanted:
            self._launcher.check_stoppable()
            self._wanted, self._reason = True, reason
            self.gate.close()
            self._ask()
        return True

    def resume(self, reason: str) -> bool:
        """Record that it goes on, or take back what has not taken effect; False as for `pause`."""
        if self._closed:
            return False
        with self._session.ledger:
            if self._session.lifecycle.status is S.PAUSED:
                self._session.resume(reason)
        if self._wanted:
            self._wanted = False
            self._ask()
        return True

    def close(self) -> None:
        """Its work is over, or is to be ended: no pause takes effect any more. The gate stays as it is."""
        if not self._closed:
            self._closed = True
            self._settle()
            self._turn()

    async def keep(self) -> None:
        """Makes it so, until `close`."""
        while not self._closed:
            self._turned.clear()
            with anyio.CancelScope() as self._step:
                await (self._stand() if self._wanted else self._go_on())
            await self._turned.wait()

    def _ask(self) -> None:
        self._settle()
        self._asked = Done()
        self._turn()

    def _settle(self) -> None:
        if self._asked is not None:
            self._asked.set()

    def _turn(self) -> None:
        self._turned.set()
        if self._step is not None:
            self._step.cancel()

    async def _stand(self) -> None:
        await self._launcher.pause()
        stands = bool(self._launcher.running) or self.gate.waiting > 0
        if stands and self._wanted and not self._closed and self._recorded():
            self._settle()

    def _recorded(self) -> bool:
        """Whether it is PAUSED now; a cancel from another thread may have been first."""
        with self._session.ledger:
            if self._session.lifecycle.status in AT_WORK:
                self._session.pause(self._reason)
            return self._session.lifecycle.status is S.PAUSED

    async def _go_on(self) -> None:
        await self._on_disk()
        if not self._wanted and not self._closed:
            await self._launcher.resume()
            self.gate.open()
            self._settle()
