"""The way into the log: one writer thread, and one commit for all that waits."""

from __future__ import annotations

import asyncio
import logging
import math
import threading
import time
from collections import deque
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self, TypeVar, TypeVarTuple

import anyio

from vespera_exec.errors import StoreError, StoreUnavailable, VesperaError
from vespera_exec.store.database import identity
from vespera_exec.store.decisions import Decision, Fact, prepared
from vespera_exec.store.writer import Sample, Writer

if TYPE_CHECKING:
    import sqlite3
    from collections.abc import AsyncGenerator, Callable, Sequence
    from pathlib import Path

    from vespera_exec.model.ledger import Batch

_GROUP = 4096
"""Decisions in one transaction at most."""
_IDLE_SECONDS = 0.2
_PASSIVE_PAGES = 1024
_RESTART_PAGES = 8192  # 32 MiB: somebody reads on without end, so the writer waits for him a moment
_READERS_WAIT_MS = 50
_PATIENT_PAGES = 11_264  # 44 MiB: that was not enough; the WAL must not grow without end
_PATIENT_MS = 2000
_BACK_OFF = (0.1, 2.0)
_CLOSING_SECONDS = 5.0
_SAMPLES_WAITING = 2000
_REFUSALS_KEPT = 256
_log = logging.getLogger(__name__)
_Arguments = TypeVarTuple("_Arguments")
_Result = TypeVar("_Result")


@dataclass(frozen=True, slots=True, kw_only=True)
class JournalStatistics:
    """What the journal has done since it was opened. `queued` decisions wait now; `pages_in_wal` is an estimate."""

    head: int
    queued: int
    events: int
    groups: int
    largest_group: int
    refused: int
    checkpoints: int
    pages_in_wal: int
    dropped_samples: int


@dataclass(slots=True)
class _Counts:
    events: int = 0
    groups: int = 0
    largest_group: int = 0
    refused: int = 0
    dropped_samples: int = 0


# Plain tuples: one of each is made for every append and sync.
_Waiting = tuple[Decision, object]
"""A decision, and the asyncio task that made it, or None."""
_Syncer = tuple[int, object, asyncio.Future[int]]
"""The ticket that it waits for, who it is, and how it is told."""
_Job = tuple["Callable[[sqlite3.Connection], Any]", asyncio.Future[Any]]


class Journal:
    """Takes decisions from any thread and makes them durable, in the order in which they came.

    `sync` and `check_writable` say what became of them. The facts of a committed group, and the cursor of the last,
    go to `publish` on the loop, before any `sync` that covers them returns.
    """

    def __init__(
        self, database: Path, *, linger_ms: float = 2.0, publish: Callable[[Sequence[Fact], int], None] | None = None
    ) -> None:
        self._database = database
        self._linger = linger_ms / 1000
        self._publish = publish
        self._loop = asyncio.get_running_loop()
        self._loop_thread = threading.get_ident()
        self._lock = threading.Lock()
        self._queue: list[_Waiting] = []
        self._samples: list[Sample] = []
        self._jobs: deque[_Job] = deque()
        self._appended = 0
        self._refused: dict[object, VesperaError] = {}
        self._wake = threading.Event()
        self._hurry = threading.Event()
        self._closing = threading.Event()
        self._fault: StoreUnavailable | None = None
        self._broken: StoreError | None = None
        self._identity: tuple[int, int] | None = None
        self._head = 0
        self._page_limit: int | None = None
        self._checkpoint_above = _PASSIVE_PAGES
        self._counts = _Counts()
        self._writer: Writer | None = None
        self._wrote_at = -math.inf
        self._thread = threading.Thread(target=self._main, name="vespera-journal")
        self._opened: asyncio.Future[None] = self._loop.create_future()
        self._ended: asyncio.Future[None] = self._loop.create_future()
        # of the loop alone
        self._settled = 0
        self._syncers: deque[_Syncer] = deque()
        self._shipping = False
        self._seen_in_place = False

    @classmethod
    @asynccontextmanager
    async def open(
        cls, database: Path, *, linger_ms: float = 2.0, publish: Callable[[Sequence[Fact], int], None] | None = None
    ) -> AsyncGenerator[Self]:
        """The journal of `database`, made when it is missing. Leaving the context writes what is queued.

        Raises:
            StoreUnavailable: it cannot be created, opened or written; on leaving, the disk took no more.
            StoreDamaged: it is no database, or damaged.
            StoreTooNew: a newer version wrote it.
        """
        journal = cls(database, linger_ms=linger_ms, publish=publish)
        journal._thread.start()
        try:
            await journal._opened
            yield journal
        finally:
            with anyio.CancelScope(shield=True):  # what was accepted must reach the disk
                await journal._close()
        if journal._fault is not None:
            raise StoreUnavailable(journal._fault.message, hint=journal._fault.hint)

    @property
    def head(self) -> int:
        """The cursor of the last event that is on disk."""
        return self._head

    @property
    def fault(self) -> StoreUnavailable | None:
        """Why nothing can be written at the moment; None again when it can."""
        return self._fault

    @property
    def broken(self) -> StoreError | None:
        """Why nothing will ever be written again; None while it may."""
        return self._broken

    @property
    def refusal(self) -> StoreError | None:
        """Why nothing new should be decided: it could not be written, or only where nobody finds it again."""
        if (known := self._broken or self._fault) is not None:
            return _again(known)
        if self._is_in_place():
            return None
        return StoreUnavailable(
            f"{self._database.name} was removed or replaced under this server",
            hint="put it back; else the server ends by itself, and the next client starts a new one",
        )

    def check_writable(self) -> None:
        """
        Raises:
            StoreError: nothing new should be decided now; as `refusal` says.
        """
        if (refusal := self.refusal) is not None:
            raise refusal

    def append(self, batch: Batch) -> None:
        """Take a decision; from any thread, never blocks. It is on disk when a later `sync` returns.

        Raises:
            StoreError: the journal is closed, or can never write again.
        """
        on_loop = threading.get_ident() == self._loop_thread
        owner = asyncio.current_task(self._loop) if on_loop else None
        waiting = (prepared(batch), owner)
        with self._lock:
            if self._broken is not None:
                raise _again(self._broken)
            self._appended += 1
            self._queue.append(waiting)
        if not self._wake.is_set():
            self._wake.set()

    def append_samples(self, samples: Sequence[Sample]) -> None:
        """Take measurements; dropped where the journal has better to do. From any thread, never blocks."""
        with self._lock:
            room = 0 if self._broken is not None else _SAMPLES_WAITING - len(self._samples)
            self._samples.extend(samples[:room])
            self._counts.dropped_samples += max(0, len(samples) - max(0, room))
        if not self._wake.is_set():
            self._wake.set()

    async def sync(self) -> int:
        """The head, once all that was appended before the call is on disk. Cancelling the wait changes nothing.

        Only on the loop that opened the journal.

        Raises:
            Fenced, Conflict, StoreError: a decision of this asyncio task was refused; the others' stand.
            StoreUnavailable: it cannot be written now. It stays queued, and is written when it can be.
        """
        owner = asyncio.current_task()
        if self._refused:
            with self._lock:
                refused = self._refused.pop(owner, None)
            if refused is not None:
                raise refused
        ticket = self._appended
        if ticket <= self._settled:
            return self._head
        self._check_working()
        future: asyncio.Future[int] = self._loop.create_future()
        self._syncers.append((ticket, owner, future))
        if not self._shipping:
            # Whoever else waits in this turn of the loop joins the same commit.
            self._shipping = True
            self._loop.call_soon(self._ship)
        return await future

    async def perform(self, job: Callable[[sqlite3.Connection], _Result]) -> _Result:
        """What `job` returns. It runs in the writer's thread between two groups, as one transaction.

        Groups wait meanwhile, so a long job is several short ones. Only on the loop that opened the journal.
        Cancelling the wait does not stop a job that has been taken.

        Raises:
            StoreUnavailable: nothing can be written now; unlike a decision, a job is not kept.
            StoreError: the journal is closed, another owner has the database, or SQLite refused; all is undone.
        """
        self._check_working()
        future: asyncio.Future[_Result] = self._loop.create_future()
        with self._lock:
            if self._broken is not None:
                raise _again(self._broken)
            self._jobs.append((job, future))
        self._hurry.set()
        self._wake.set()
        return await future

    def write_for(self, generation: int) -> None:
        """From now on write only while this is the last row of `owners`: a fence against an owner that is unknown.

        Once there is a later one, nothing can be appended any more.
        """
        if self._writer is not None:
            self._writer.tenure = generation

    def limit_pages(self, pages: int) -> None:
        """Let the database file grow to at most `pages` of 4 KiB; beyond, writing fails as on a full disk."""
        self._page_limit = pages
        self._wake.set()

    def statistics(self) -> JournalStatistics:
        counts, writer = self._counts, self._writer
        return JournalStatistics(
            head=self._head,
            queued=len(self._queue),
            events=counts.events,
            groups=counts.groups,
            largest_group=counts.largest_group,
            refused=counts.refused,
            checkpoints=writer.checkpoints if writer else 0,
            pages_in_wal=writer.pages_in_wal if writer else 0,
            dropped_samples=counts.dropped_samples,
        )

    def _is_in_place(self) -> bool:
        """The database is still the file that was opened. On the loop one look serves all who ask in the same turn."""
        if self._seen_in_place:
            return True
        if identity(self._database) != self._identity:
            return False
        if threading.get_ident() == self._loop_thread:
            self._seen_in_place = True
            self._loop.call_soon(self._look_again)
        return True

    def _look_again(self) -> None:
        self._seen_in_place = False

    def _check_working(self) -> None:
        if (known := self._broken or self._fault) is not None:
            raise _again(known)

    # on the loop

    def _ship(self) -> None:
        self._shipping = False
        if self._queue:  # else the writer has it
            self._hurry.set()
            self._wake.set()

    def _group_settled(
        self, facts: list[Fact], head: int, ticket: int, refused: list[tuple[object, VesperaError]]
    ) -> None:
        self._settled = ticket
        if self._publish is not None and facts:
            try:
                self._publish(facts, head)
            except Exception:  # noqa: BLE001 - it is on disk, and whoever waits for that must hear so
                _log.exception("Committed events could not be published")
        errors = dict(refused)
        while self._syncers and self._syncers[0][0] <= ticket:
            _, owner, future = self._syncers.popleft()
            if future.done():
                continue
            if errors and (error := errors.pop(owner, None)) is not None:
                future.set_exception(error)
            else:
                future.set_result(self._head)
        self._keep_refusals(errors)

    def _keep_refusals(self, errors: dict[object, VesperaError]) -> None:
        """For the next `sync` of those who made the refused decisions and have not asked yet."""
        with self._lock:
            for owner, error in errors.items():
                if owner is None:
                    _log.warning("The log refused a decision that nobody waits for: %s", error)
                    continue
                self._refused[owner] = error
                while len(self._refused) > _REFUSALS_KEPT:
                    del self._refused[next(iter(self._refused))]

    def _fail_syncers(self, error: StoreError) -> None:
        while self._syncers:
            _, _, future = self._syncers.popleft()
            if not future.done():
                future.set_exception(_again(error))

    def _set_opened(self, fault: StoreError | None) -> None:
        if self._opened.done():
            return
        if fault is None:
            self._opened.set_result(None)
        else:
            self._opened.set_exception(fault)

    def _set_ended(self) -> None:
        self._ended.set_result(None)

    async def _close(self) -> None:
        self._closing.set()
        self._hurry.set()
        self._wake.set()
        await self._ended
        self._thread.join()

    # in the writer's thread

    def _main(self) -> None:
        writer = None
        try:
            writer = self._writer = Writer(self._database)
            self._head, self._identity = writer.head, identity(self._database)
            self._tell(self._set_opened, None)
            self._serve(writer)
        except StoreError as fault:
            self._stop(fault)
        except Exception as fault:  # noqa: BLE001 - the supervisor of the writer: whoever waits must hear that it died
            _log.exception("The journal's writer died")
            self._stop(StoreError(f"the journal's writer died: {fault!r}", hint="restart the server"))
        try:
            if writer is not None:
                writer.close()
        finally:
            self._stop(_closed())
            self._tell(self._set_ended)

    def _serve(self, writer: Writer) -> None:
        """Group after group, until closed and drained. A group that the disk refuses is kept and tried again."""
        group: list[_Waiting] = []
        delay, give_up_at = 0.0, None
        while True:
            if not group:
                self._rest(writer)
            ticket, last = self._take(group)
            try:
                if self._page_limit is not None:
                    writer.limit_pages(self._page_limit)
                    self._page_limit = None
                self._write(writer, group, ticket)
            except StoreUnavailable as fault:
                self._obstructed(fault)
                delay = min(max(delay * 2, _BACK_OFF[0]), _BACK_OFF[1])
                if self._closing.wait(delay):
                    give_up_at = give_up_at or time.monotonic() + _CLOSING_SECONDS
                    if time.monotonic() > give_up_at:
                        _log.critical("Closing without %d decisions that the disk does not take", len(group))
                        return
                    time.sleep(_BACK_OFF[0])
                continue
            group, delay, self._fault = [], 0.0, None
            self._tidy(writer)
            self._perform_next(writer)
            if last:
                return

    def _rest(self, writer: Writer) -> None:
        """Until there is something to write; while nobody waits for it, not too soon after the last commit."""
        while not self._wake.wait(_IDLE_SECONDS if writer.pages_in_wal else None):
            writer.checkpoint()
        if (left := self._wrote_at + self._linger - time.monotonic()) > 0:
            self._hurry.wait(left)

    def _take(self, group: list[_Waiting]) -> tuple[int, bool]:
        """Add what waits to `group`: the ticket that it reaches to, and whether it is the last there will be."""
        self._hurry.clear()
        self._wake.clear()
        with self._lock:
            room = max(0, _GROUP - len(group))
            group += self._queue[:room]
            del self._queue[:room]
            ticket = self._appended - len(self._queue)
            last = self._closing.is_set() and not self._queue
            if last and self._broken is None:
                self._broken = _closed()
            if self._queue:
                self._hurry.set()
                self._wake.set()
        return ticket, last

    def _write(self, writer: Writer, group: list[_Waiting], ticket: int) -> None:
        refused: list[tuple[object, VesperaError]] = []
        if group:
            written = writer.write([decision for decision, _ in group])
            self._wrote_at = time.monotonic()
            refused = [(group[place][1], error) for place, error in written.refused]
            self._head = writer.head
            self._counts.events += len(written.facts)
            self._counts.groups += 1
            self._counts.refused += len(refused)
            self._counts.largest_group = max(self._counts.largest_group, len(group))
            self._tell(self._group_settled, written.facts, writer.head, ticket, refused)

    def _perform_next(self, writer: Writer) -> None:
        """One job, so that a group comes after it."""
        with self._lock:
            if not self._jobs:
                return
            job, future = self._jobs.popleft()
            if self._jobs:
                self._hurry.set()
                self._wake.set()
        try:
            result = writer.perform(job)
        except Exception as fault:  # noqa: BLE001 - it belongs to whoever waits for the job
            self._tell(_settle, future, None, fault)
        else:
            self._tell(_settle, future, result, None)

    def _obstructed(self, fault: StoreUnavailable) -> None:
        if self._fault is None:
            _log.error("The log cannot be written: %s", fault)
        self._fault = fault
        self._fail_jobs(fault)
        self._tell(self._fail_syncers, fault)

    def _stop(self, fault: StoreError) -> None:
        """Nothing can be appended any more; the first reason counts."""
        with self._lock:
            self._broken = self._broken or fault
        self._fail_jobs(fault)
        self._tell(self._set_opened, fault)
        self._tell(self._fail_syncers, fault)

    def _fail_jobs(self, fault: StoreError) -> None:
        with self._lock:
            jobs, self._jobs = self._jobs, deque()
        for _, future in jobs:
            self._tell(_settle, future, None, _again(fault))

    def _tidy(self, writer: Writer) -> None:
        """What can wait until the acknowledgements are out: measurements, and moving the WAL."""
        with self._lock:
            samples, self._samples = self._samples, []
        if samples:
            kept = writer.write_samples(samples)
            self._counts.dropped_samples += len(samples) - kept
        if writer.pages_in_wal > self._checkpoint_above:
            left = writer.checkpoint()
            # Also where all was moved: the file begins anew only when nobody reads from it.
            if writer.frames_in_wal > _RESTART_PAGES:
                patient = writer.frames_in_wal > _PATIENT_PAGES
                left = writer.checkpoint("RESTART", wait_ms=_PATIENT_MS if patient else _READERS_WAIT_MS)
            # What a reader holds back is not worth asking for at every commit.
            self._checkpoint_above = left + _PASSIVE_PAGES

    def _tell(self, call: Callable[[*_Arguments], object], *arguments: *_Arguments) -> None:
        with suppress(RuntimeError):  # the loop is gone, and with it whoever would listen
            self._loop.call_soon_threadsafe(call, *arguments)


def _settle(future: asyncio.Future[Any], result: object, fault: Exception | None) -> None:
    if future.done():
        return
    if fault is not None:
        future.set_exception(fault)
    else:
        future.set_result(result)


def _again(error: StoreError) -> StoreError:
    """The same error for one more waiter; a shared instance would collect all their tracebacks."""
    return type(error)(error.message, hint=error.hint)


def _closed() -> StoreUnavailable:
    return StoreUnavailable("the journal is closed", hint="open the store again")
