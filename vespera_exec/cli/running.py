"""Follows a run to its end: events, output and usage at once, in one thread, with Ctrl-C in between."""

from __future__ import annotations

import math
import os
import signal
import time
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from vespera_exec.cli.client import LONG_WAIT_MS, Polls

if TYPE_CHECKING:
    from collections.abc import Mapping
    from types import FrameType
    from typing import TextIO

    from vespera_exec.cli.answering import Prompter
    from vespera_exec.cli.client import Daemon
    from vespera_exec.cli.display import Display
    from vespera_exec.cli.state import Shown
    from vespera_exec.model.events import Json

_REFRESH_SECONDS = 0.2
_STATUS_SECONDS = 1.0
_PIECE_BYTES = 65_536
_TERMINATED_SECONDS = 10.0


class ReaderGone(Exception):
    """Nobody reads our stdout any more."""


class Interrupts:
    """Notes Ctrl-C and the signals in `also` instead of dying of them, while the block lasts.

    Its descriptor becomes readable at each. The second Ctrl-C, or the second of another, raises
    KeyboardInterrupt: it leaves at once, whatever we are stuck in. What is ignored stays so (nohup, a
    background job of a script).
    """

    def __init__(self, *also: signal.Signals) -> None:
        self.count = 0
        """Of all that came."""
        self.told: set[signal.Signals] = set()
        self._signals = (signal.SIGINT, *also)

    def __enter__(self) -> Interrupts:
        self._reader, self._writer = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._wakeup = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        self._before = {each: signal.getsignal(each) for each in self._signals}
        for each, before in self._before.items():
            if before is not signal.SIG_IGN:
                signal.signal(each, self._interrupted)
        return self

    def __exit__(self, *_: object) -> None:
        for each, before in self._before.items():
            if before is not signal.SIG_IGN:
                signal.signal(each, before)
        signal.set_wakeup_fd(self._wakeup)
        os.close(self._reader)
        os.close(self._writer)

    @property
    def exit_code(self) -> int:
        """As a shell says of who died of the signal; SIGTERM and SIGHUP count more than Ctrl-C."""
        return 128 + next((each for each in reversed(self._signals) if each in self.told), signal.SIGINT)

    def fileno(self) -> int:
        return self._reader

    def drain(self) -> None:
        with suppress(BlockingIOError):
            while os.read(self._reader, 512):
                pass

    def _interrupted(self, number: int, frame: FrameType | None) -> None:
        self.count += 1
        again = number in self.told
        self.told.add(signal.Signals(number))
        if again:
            raise KeyboardInterrupt


@dataclass(slots=True)
class _Stream:
    """One stream of the work's output, session by session."""

    name: str
    target: TextIO
    session: int = 0
    offset: int = 0
    dropped: int = 0


@dataclass(slots=True)
class Follower:
    """One run, followed from `cursor`. With `cancels`, Ctrl-C and SIGTERM cancel the work; else they only leave."""

    daemon: Daemon
    task_id: str
    state: Shown
    display: Display
    cursor: int = 0
    cancels: bool = True
    prompter: Prompter | None = None
    """Asks what the work asks; without one it is only shown that it does."""
    done: bool = False
    cancelling: bool = False
    """We have asked for its end."""
    _streams: list[_Stream] = field(default_factory=list[_Stream])
    _handled: int = 0
    _next_status: float = 0.0
    _leave_at: float = math.inf

    def pass_output(self, stdout: TextIO, stderr: TextIO) -> None:
        """Have the work's own output written there, as it comes."""
        self._streams = [_Stream("stdout", stdout), _Stream("stderr", stderr)]

    def follow(self, interrupts: Interrupts) -> Shown:
        """Returns when the run has ended and all its output is written.

        Raises:
            KeyboardInterrupt: the second Ctrl-C, the first where it does not cancel, or SIGHUP; or the work
                has not ended 10 s after SIGTERM.
            ReaderGone: stdout was closed by its reader.
            CannotWrite: stdout takes no more.
            DaemonError, DaemonUnavailable: the daemon cannot be asked any more; the work may go on.
        """
        with Polls(self.daemon) as polls:
            while not self.done or self._streams:
                self._ask(polls)
                pause = _REFRESH_SECONDS if self.display.moving else 3600.0
                typed = self.prompter.descriptors if self.prompter is not None else ()
                arrived = polls.wait(min(pause, self._leave_at - time.monotonic()), interrupts.fileno(), *typed)
                interrupts.drain()
                self._obey(interrupts)
                for name, body in arrived.items():
                    self._take(name, body)
                if self.prompter is not None:
                    self.prompter.listen()
                if self.prompter is None or not self.prompter.is_asking:
                    self.display.update(self.state)
        return self.state

    def _ask(self, polls: Polls) -> None:
        if not self.done and not polls.asked("events"):
            path = f"/tasks/{self.task_id}/events"
            polls.ask("events", path, cursor=self.cursor, wait_ms=LONG_WAIT_MS, max_events=500)
        for stream in self._streams:
            if stream.session < len(self.state.sessions) and not polls.asked(stream.name):
                path = f"/executions/{self.state.sessions[stream.session]}/output"
                polls.ask(
                    stream.name,
                    path,
                    stream=stream.name,
                    offset=stream.offset,
                    limit=_PIECE_BYTES,
                    wait_ms=LONG_WAIT_MS,
                )
        now = time.monotonic()
        if self.display.moving and not self.done and now >= self._next_status and not polls.asked("status"):
            self._next_status = now + _STATUS_SECONDS
            polls.ask("status", f"/tasks/{self.task_id}", detail="true")

    def _take(self, name: str, body: Json) -> None:
        match name:
            case "events":
                for event in body["events"]:
                    self.state.take_event(event)
                self.cursor, self.done = body["next_cursor"], body["done"]
                if self.prompter is not None:
                    self.prompter.take_events(body["events"])
            case "status":
                self.state.take_measures(body)
            case _:
                self._pass(next(each for each in self._streams if each.name == name), body)
        if self.done:
            last = len(self.state.sessions) - 1
            self._streams = [each for each in self._streams if each.session <= last]

    def _pass(self, stream: _Stream, page: Mapping[str, Json]) -> None:
        if page["text"]:
            try:
                self.display.output(stream.target, page["text"])
            except BrokenPipeError as fault:
                raise ReaderGone from fault
        stream.offset = page["next_offset"]
        stream.dropped = page["dropped_bytes"]
        if page["eof"]:
            if stream.dropped:
                self.display.say(f"vespera-exec: {stream.dropped} bytes of {stream.name} were not kept (size limit)")
            stream.session, stream.offset = stream.session + 1, 0

    def _obey(self, interrupts: Interrupts) -> None:
        if time.monotonic() >= self._leave_at:
            raise KeyboardInterrupt
        if interrupts.count <= self._handled:
            return
        self._handled = interrupts.count
        if not self.cancels or signal.SIGHUP in interrupts.told:
            raise KeyboardInterrupt
        if self.done:
            return
        terminated = signal.SIGTERM in interrupts.told
        if terminated:
            self._leave_at = time.monotonic() + _TERMINATED_SECONDS
        reason = "SIGTERM" if terminated else "Ctrl-C"
        answer = self.daemon.post(f"/tasks/{self.task_id}/cancel", {"reason": reason}).body
        self.cancelling = True
        if answer["success"]:
            self.display.say(f"vespera-exec: cancelling; {reason} again leaves at once")
