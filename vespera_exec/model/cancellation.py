"""How work is asked to stop: a token, linked to others, with deadlines judged when read."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, NoReturn

from vespera_exec.errors import CancellationException, InvalidInput
from vespera_exec.model.clock import SYSTEM_CLOCK, Clock
from vespera_exec.model.events import new_id

if TYPE_CHECKING:
    from datetime import datetime

    from vespera_exec.model.events import Json

Listener = Callable[["CancellationToken"], None]

_log = logging.getLogger(__name__)
# One for all tokens, since it is held for some assignments only; an own one would double the size of a token.
# A signal handler may cancel while its thread holds it.
_lock = threading.RLock()


class CancellationToken:
    """Thread-safe, first reason wins, never un-cancelled.

    A child (`child`, `with_timeout`) is cancelled with its parent; `with_timeout` links both ways, so
    it stands for the same request with a deadline added. A deadline needs no thread: it is judged
    whenever one of the tokens it concerns is read, and `deadline` tells a loop when to look.
    """

    __slots__ = (
        "__weakref__", "_cancelled_at", "_children", "_clock", "_deadline_text", "_id", "_listeners", "_parent",
        "_reason", "_timed_out", "_two_way", "deadline", "timeout_seconds",
    )  # fmt: skip

    def __init__(self, token_id: str | None = None, *, clock: Clock = SYSTEM_CLOCK) -> None:
        self._id = token_id or None
        self.timeout_seconds: float | None = None
        """What `with_timeout` was given for this token."""
        self.deadline: float | None = None
        """The earliest that concerns this token, on the clock's monotonic scale, in seconds; None without one."""
        self._deadline_text = ""
        self._clock = clock
        self._cancelled_at: datetime | None = None
        self._reason = ""
        self._timed_out = False
        self._parent: CancellationToken | None = None
        self._two_way = False
        self._children: tuple[CancellationToken, ...] = ()
        self._listeners: tuple[Listener, ...] = ()

    def __repr__(self) -> str:
        state = f"cancelled: {self._reason!r}" if self._cancelled_at else "live"
        return f"<CancellationToken {self.token_id[:8]} {state}>"

    @property
    def token_id(self) -> str:
        """Made when it is first read, where none was given."""
        with _lock:
            if self._id is None:
                self._id = new_id()
            return self._id

    def __reduce__(self) -> NoReturn:
        raise TypeError("a cancellation token cannot be copied or pickled: nobody would cancel the copy")

    @property
    def is_cancelled(self) -> bool:
        return self.is_cancellation_requested()

    @property
    def cancellation_reason(self) -> str:
        return self._reason

    @property
    def cancelled_at(self) -> datetime | None:
        return self._cancelled_at

    @property
    def timed_out(self) -> bool:
        """It was a deadline that cancelled it, not a person."""
        return self.is_cancellation_requested() and self._timed_out

    def cancel(self, reason: str = "") -> bool:
        """Cancel, and all that is linked. True for the call that did it, False when it was cancelled before."""
        return self._cancel(reason, timed_out=False)

    def is_cancellation_requested(self) -> bool:
        if self._cancelled_at is not None:
            return True
        if self.deadline is not None and self._clock.monotonic() >= self.deadline:
            self._cancel(self._deadline_text, timed_out=True)
            return True
        return False

    def throw_if_cancelled(self) -> None:
        """
        Raises:
            CancellationException: with the reason.
        """
        if self.is_cancellation_requested():
            raise CancellationException(self._reason)

    def child(self) -> CancellationToken:
        """A token that is cancelled with this one, and may be cancelled alone."""
        return self._link(two_way=False)

    def with_timeout(self, seconds: float) -> CancellationToken:
        """The same request with a deadline, `seconds` from now; 0 is over at once.

        Raises:
            InvalidInput: `seconds` is negative or not a number.
        """
        if not seconds >= 0:
            raise InvalidInput(f"a timeout must not be negative: {seconds}")
        child = self._link(two_way=True)
        child.timeout_seconds = seconds
        child._limit(self._clock.monotonic() + seconds, f"Timeout after {seconds:g} seconds")
        child.is_cancellation_requested()
        return child

    def on_cancel(self, listener: Listener) -> Callable[[], None]:
        """Call `listener(token)` once, when cancelled, outside the lock; at once if it is. Returns the undo."""
        with _lock:
            if self._cancelled_at is None:
                self._listeners = (*self._listeners, listener)
                return lambda: self.forget(listener)
        self._tell(listener)
        return lambda: None

    def adopt(self, token: CancellationToken) -> None:
        """Make an existing token, with what it is linked to both ways, follow this one; one that follows another
        already is linked through that."""
        while token._parent is not None:
            if token._parent is self:
                return
            token = token._parent
        if token is self:
            return
        token._parent = self
        with _lock:
            live = self._cancelled_at is None
            if live:
                self._children = (*self._children, token)
        if not live:
            token._cancel(self._reason, timed_out=self._timed_out)
        elif self.deadline is not None:
            token._limit(self.deadline, self._deadline_text)

    def detach(self) -> None:
        """Leave the parent: a long-lived token need not keep the children of what has ended."""
        parent = self._parent
        if parent is not None:
            parent._disown(self)

    def to_dict(self) -> dict[str, Json]:
        """Its state, for reports; a token itself cannot be stored."""
        return {
            "token_id": self.token_id,
            "is_cancelled": self.is_cancelled,
            "cancellation_reason": self._reason,
            "cancelled_at": self._cancelled_at.isoformat() if self._cancelled_at else None,
            "timeout_seconds": self.timeout_seconds,
        }

    def _limit(self, deadline: float, text: str) -> None:
        """Take over an earlier deadline, and hand it on to whoever it concerns."""
        with _lock:
            if self.deadline is not None and self.deadline <= deadline:
                return
            self.deadline, self._deadline_text = deadline, text
            children = self._children
        for child in children:
            child._limit(deadline, text)
        if self._two_way and self._parent is not None:
            self._parent._limit(deadline, text)

    def forget(self, listener: Listener) -> None:
        """As the undo of `on_cancel`, for whoever does not want to keep one."""
        with _lock:
            left = list(self._listeners)
            if listener in left:
                left.remove(listener)
                self._listeners = tuple(left)

    def _link(self, *, two_way: bool) -> CancellationToken:
        child = CancellationToken(self.token_id if two_way else None, clock=self._clock)
        child._parent = self
        child._two_way = two_way
        with _lock:
            if self._cancelled_at is None:
                child.deadline, child._deadline_text = self.deadline, self._deadline_text
                self._children = (*self._children, child)
                return child
        child._cancel(self._reason, timed_out=self._timed_out)
        return child

    def _cancel(self, reason: str, *, timed_out: bool) -> bool:
        if self._cancelled_at is not None:
            return False
        now = self._clock.now()  # a stranger's clock, which may wait for another thread, is not read under the lock
        with _lock:
            if self._cancelled_at is not None:
                return False
            self._reason = reason
            self._timed_out = timed_out
            # Last: whoever reads without the lock and sees it cancelled sees the reason, too.
            self._cancelled_at = now
            listeners, self._listeners = self._listeners, ()
            children, self._children = self._children, ()
        for child in children:
            child._cancel(reason, timed_out=timed_out)
        if self._parent is not None:
            if self._two_way:
                self._parent._cancel(reason, timed_out=timed_out)
            self._parent._disown(self)
        for listener in listeners:
            self._tell(listener)
        return True

    def _tell(self, listener: Listener) -> None:
        try:
            listener(self)
        except Exception:  # noqa: BLE001 - the boundary to a stranger's listener: the others hear of it all the same
            _log.exception("A listener of the cancellation token %s failed", self.token_id)

    def _disown(self, child: CancellationToken) -> None:
        with _lock:
            self._children = tuple(each for each in self._children if each is not child)
