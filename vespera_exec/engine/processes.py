"""Processes of one execution, each under a shim, started and ended together.

Linux is where every promise holds. On macOS (no /proc, no subreaper) the ladder reaches the work's process group
only: what left the group, or outlives the work by itself, is not found, and nothing can be paused. Windows has no
shim: importing this module fails there.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import importlib.util
import marshal
import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import AsyncExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Self

if sys.platform == "win32":
    raise ImportError("vespera-exec runs processes on Linux and macOS only; on Windows use roles that run in the loop")

import anyio
import anyio.to_thread

from vespera_exec.engine import pipes, proctree, shim
from vespera_exec.engine.work import ProcessExit, ProcessSpec
from vespera_exec.errors import CancellationException, ExecutionError, PauseUnsupported

if TYPE_CHECKING:
    from collections.abc import Iterable
    from types import TracebackType

    from anyio.abc import TaskGroup

_CANCEL_SECONDS = 5.0
_SPARE_SECONDS = 0.4  # what the shim may need after the last signal, before it is given up as stuck
_SHIM_SECONDS = 2.0  # to end, once its socket is closed
_ORPHAN_SECONDS = 1.0

_Command = tuple[list[bytes], dict[bytes, bytes], bytes]
"""argv, environment, working directory."""


class RunningProcess:
    """A process under its shim. Its streams are read for as long as it runs, also when nobody waits."""

    def __init__(self, launcher: ProcessLauncher, spec: ProcessSpec, command: _Command) -> None:
        self.spec = spec
        self.pid = 0
        """Of the work itself; 0 until it has started."""
        self.shim_pid = 0
        """Everything below it is the work; 0 until that has started."""
        self.start_time = 0
        """In clock ticks since boot: with `pid` it names this process and no later one."""
        self.exit: ProcessExit | None = None
        """None until `wait` returns."""
        self.highest_rung: str | None = None
        """Of the ladder, on the process or on what it left."""
        self.refusal: tuple[str, int] | None = None
        """What could not be started, with its errno."""
        self.settled = anyio.Event()
        """It has started, or never will."""
        self.done = anyio.Event()
        self._launcher = launcher
        self._status: int | None = None
        self._rung: str | None = None
        self._leftover = 0
        self._gone = False
        self._unending = False
        self._swept = False
        self._pauses = 0
        self._stopped: anyio.Event | None = None
        self._lines = pipes.Lines(spec.on_report, spec.on_report_dropped) if spec.on_report is not None else None
        self._plumbing = pipes.Plumbing()
        try:
            self._plumbing.open(spec)
            self._child = _start_shim(launcher.python, launcher.execution_id, self._plumbing)
        except BaseException:
            self._plumbing.close()
            raise
        order: shim.Order = (*command, self._plumbing.far, os.fsencode(launcher.execution_id))
        frame = marshal.dumps(order)
        self._outbox = bytearray(len(frame).to_bytes(4, "big") + frame)
        self._plumbing.close_far_ends()

    def __repr__(self) -> str:
        return f"<RunningProcess {self.pid} {self.spec.argv[0]!r} {self.exit or 'running'}>"

    @property
    def guardian_pid(self) -> int:
        """Of the shim's parent; of the shim itself where there are no subreapers."""
        return self._child.pid

    async def wait(self) -> ProcessExit:
        """How it ended, once it and everything it started is gone and all its output has been delivered.

        What has been written by then is all there; a process elsewhere that got hold of the pipes is not waited
        for. Cancelling the wait does not end the process.
        """
        await self.done.wait()
        assert self.exit is not None
        return self.exit

    def cancel(self, grace_seconds: float) -> None:
        """Begin the ladder."""
        self._order(f"cancel {grace_seconds:.3f}")

    def kill(self) -> None:
        """SIGKILL for the whole tree, now; `wait` tells when it is gone."""
        self._order("kill")

    def kill_shim(self) -> None:
        """End it without its shim, which does not do its duty."""
        with contextlib.suppress(ProcessLookupError):
            self._child.kill()
        with contextlib.suppress(OSError):  # a shim that is stopped would keep it open
            self._plumbing.control.shutdown(socket.SHUT_RDWR)

    def pause(self) -> anyio.Event:
        """Stop the tree. The event comes when it has stopped, has ended, or has been resumed."""
        if self._stopped is None:
            self._stopped = anyio.Event()
            self._pauses += 1
            self._order(f"pause {self._pauses}")
        return self.done if self.done.is_set() else self._stopped

    def resume(self) -> None:
        self._order("resume")
        if self._stopped is not None:
            self._stopped.set()
            self._stopped = None

    async def attend(self) -> None:
        """Everything from the order to the shim to the end of its tree. Cancelled, it kills the tree at once."""
        feeding = anyio.CancelScope()
        try:
            async with anyio.create_task_group() as group:
                pumps = self._pumps()
                for pump in pumps:
                    group.start_soon(pump.run)
                group.start_soon(pipes.feed, self._plumbing, self.spec.stdin, feeding)
                while not self._flush():
                    await anyio.wait_writable(self._plumbing.control)
                await self._listen()
                if not self._gone and self.refusal is None:
                    await self._end_without_shim()
                for pump in pumps:
                    pump.stop()
                feeding.cancel()
            self._finish()
        finally:
            # Closing the socket is the order to kill at once; only the end of the shim says that nothing is left.
            self._plumbing.close()
            with anyio.CancelScope(shield=True):  # bounded, and nobody else knows of these processes
                await self._bury()
            self._finish()

    def _pumps(self) -> list[pipes.Pump]:
        found: list[pipes.Pump] = []
        if self.spec.on_output is not None:
            for stream in ("stdout", "stderr"):
                deliver = functools.partial(self.spec.on_output, stream)
                found.append(pipes.Pump(self._plumbing.take(stream), deliver))
        if self._lines is not None:
            fd, interval = self._plumbing.take("progress"), self._launcher.read_interval
            found.append(pipes.LinePump(fd, self._lines, interval=interval))
        return found

    def _order(self, line: str) -> None:
        self._outbox += line.encode() + b"\n"
        self._flush()

    def _flush(self) -> bool:
        """Whether the shim has been sent everything, or is past hearing it.

        One that is stuck with a full buffer is dealt with by whoever waits for the effect of an order.
        """
        try:
            while self._outbox:
                del self._outbox[: self._plumbing.control.send(self._outbox)]
        except BlockingIOError:
            return False
        except OSError:
            self._outbox.clear()
        return True

    async def _listen(self) -> None:
        """Hear the shim until it says that all is gone, or is heard no more."""
        rest = ""
        while not self._gone:
            try:
                data = self._plumbing.control.recv(4096)
            except BlockingIOError:
                await anyio.wait_readable(self._plumbing.control)
                continue
            except ConnectionError:
                return
            if not data:
                return
            *lines, rest = (rest + data.decode()).split("\n")
            for line in lines:
                self._hear(line)

    def _hear(self, line: str) -> None:
        word, *rest = line.split(" ")
        match word:
            case "started":
                self.pid, self.start_time, self.shim_pid = map(int, rest)
                self.settled.set()
            case "failed":
                self.refusal = rest[0], int(rest[1])
            case "exit" if self._status is None:
                self._status = os.waitstatus_to_exitcode(int(rest[0]))
                self._rung = None if rest[1] == "-" else rest[1]
            case "reaped" if self._status is None and int(rest[0]) == self.pid:
                self._status, self._rung = os.waitstatus_to_exitcode(int(rest[1])), "sweep"
            case "paused" if self._stopped is not None and int(rest[0]) == self._pauses:
                self._stopped.set()
            case "gone":
                self._gone = True
                self._leftover = int(rest[0])
                self._unending = int(rest[2]) > 0
                self.highest_rung = None if rest[1] == "-" else rest[1]
            case _:
                pass

    def _finish(self) -> None:
        if self.exit is None:
            if self._status is None:
                self._status, self._rung = -signal.SIGKILL, "sweep" if self._swept else "sigkill"
            self.exit = ProcessExit(returncode=self._status, rung=self._rung, leftover=self._leftover)
        for event in (self.settled, self.done, self._stopped):
            if event is not None:
                event.set()

    async def _end_without_shim(self) -> None:
        """The shim or its guardian has been killed: end from here what is left, and reap it."""
        with anyio.move_on_after(_ORPHAN_SECONDS):
            await _ended(self._child)
        self._swept = True
        if not self._gone:
            self.highest_rung = "sweep"
        orphans = proctree.Orphans(
            self._launcher.execution_id,
            self.pid,
            self.start_time,
            guardian=self.guardian_pid,
            adopts=self._launcher.adopts_orphans,
        )
        await anyio.to_thread.run_sync(orphans.end, _ORPHAN_SECONDS)
        if self._status is None and orphans.status is not None:
            self._status, self._rung = orphans.status, "sweep"

    async def _bury(self) -> None:
        """Wait for the end of shim and guardian, whose socket is closed; make sure that they have done their duty."""
        with anyio.move_on_after(_SHIM_SECONDS):
            await _ended(self._child)
        if self._child.poll() is None:
            if self._unending:
                return  # they stay with what nobody can end, and `proctree.guardians` goes on knowing them
            self.kill_shim()
            await self._end_without_shim()
            if self._child.poll() is None:
                return
        elif self._child.returncode and not self._swept:
            await self._end_without_shim()
        proctree.guardians.discard(self.guardian_pid)


class ProcessLauncher:
    """Starts the processes of one execution; `async with` is its lifetime, leaving it kills what is left.

    `python` runs the shims. `adopts_orphans` says that this process is a subreaper (`proctree.become_subreaper`).
    `read_interval`, in seconds, is the least time between two reads of a progress descriptor, so that a flood
    comes in few large pieces; the first line after a quiet time is delivered at once.

    An exception out of a callback of a `ProcessSpec` cancels the body of the `async with` and comes out of it, in
    an exception group.
    """

    def __init__(
        self,
        *,
        execution_id: str,
        python: str = sys.executable,
        adopts_orphans: bool = False,
        read_interval: float = 0.02,
    ) -> None:
        self.execution_id = execution_id
        self.python = python
        self.adopts_orphans = adopts_orphans
        self.read_interval = read_interval
        self._processes: list[RunningProcess] = []
        self._launched = False
        self._closing: str | None = None
        self._resumed: anyio.Event | None = None
        """While paused: what a launch waits for."""
        self._stack = AsyncExitStack()
        self._tasks: TaskGroup | None = None

    async def __aenter__(self) -> Self:
        await self._stack.__aenter__()
        self._tasks = await self._stack.enter_async_context(anyio.create_task_group())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool | None:
        self._closing = self._closing or "the execution has ended"
        self._let_launch()
        if self._tasks is not None:
            self._tasks.cancel_scope.cancel()
        if isinstance(error, anyio.get_cancelled_exc_class()):
            return await self._stack.__aexit__(kind, error, trace)
        await self._stack.__aexit__(None, None, None)  # the group would wrap the body's own error
        return None

    @property
    def running(self) -> tuple[RunningProcess, ...]:
        return tuple(process for process in self._processes if not process.done.is_set())

    @property
    def roots(self) -> tuple[int, ...]:
        """The shims' pids: everything below them is the work."""
        return tuple(process.shim_pid for process in self.running if process.shim_pid)

    async def launch(self, spec: ProcessSpec) -> RunningProcess:
        """The process, started. While the execution is paused this waits.

        Raises:
            ExecutionError: code BAD_COMMAND, BAD_WORKING_DIRECTORY, PROGRAM_NOT_FOUND, NOT_EXECUTABLE, or
                LAUNCH_FAILED when the system has no room for another process.
            CancellationException: the execution is being cancelled, or its launcher is closed.
        """
        if self._tasks is None:
            raise RuntimeError("enter the launcher with `async with` before launching")
        command = _encode(spec, self.execution_id)
        while self._resumed is not None and self._closing is None:
            await self._resumed.wait()
        if self._closing is not None:
            raise CancellationException(self._closing)
        try:
            process = RunningProcess(self, spec, command)
        except OSError as error:
            raise _no_room(spec, error.strerror) from error
        self._launched = True
        self._processes.append(process)
        self._tasks.start_soon(self._attend, process)
        try:
            await process.settled.wait()
        except anyio.get_cancelled_exc_class():
            process.kill()  # nobody has it, so nobody else would end it
            raise
        if process.refusal is not None:
            raise _refusal(spec, *process.refusal)
        if process.pid:
            return process
        if self._closing is not None:
            raise CancellationException(self._closing)
        raise _no_room(spec, "its shim has ended")

    async def cancel(self, grace_seconds: float | None = None) -> str | None:
        """End everything by the ladder: SIGINT, at two thirds of the grace SIGTERM, at its end SIGKILL, a sweep.

        The grace is that of each process's spec unless given. Returns when all is gone, after 5 seconds at most,
        with the highest rung that was used: "sigint", "sigterm", "sigkill", "sweep", or None when nothing ran.
        Nothing can be launched afterwards. A second call while the first is under way can only shorten the grace.
        """
        self._closing = "the execution is being cancelled"
        if not self._launched:
            self._let_launch()
            return None
        began = time.monotonic()
        processes = self.running
        longest = 0.0
        for process in processes:
            wanted = process.spec.grace_seconds if grace_seconds is None else grace_seconds
            grace = min(max(wanted, 0.0), _CANCEL_SECONDS - 2 * _SPARE_SECONDS)
            longest = max(longest, grace)
            process.cancel(grace)
        self._let_launch()
        await _all_done(processes, longest + _SPARE_SECONDS)
        for process in processes:
            if not process.done.is_set():
                process.kill_shim()  # stopped by its own tree, say
        await _all_done(processes, _CANCEL_SECONDS - (time.monotonic() - began))
        strays = await anyio.to_thread.run_sync(proctree.strays.end, self.execution_id, abandon_on_cancel=True)
        used = [process.highest_rung for process in processes] + ["sweep" if strays else None]
        return max((rung for rung in used if rung), key=shim.RUNGS.index, default=None)

    def check_stoppable(self) -> None:
        """
        Raises:
            PauseUnsupported: something runs, and this system does not show what belongs to it.
        """
        if self.running and not proctree.can_see():
            raise PauseUnsupported("Processes cannot be paused on this system, which has no /proc")

    async def pause(self) -> None:
        """Returns when every process of every tree has really stopped, or has ended, or was resumed meanwhile."""
        if self._closing is not None:
            return
        if self._resumed is None:
            self._resumed = anyio.Event()
        for stopped in [process.pause() for process in self.running]:
            await stopped.wait()

    async def resume(self) -> None:
        """Let everything that `pause` has stopped go on."""
        for process in self.running:
            process.resume()
        self._let_launch()

    def _let_launch(self) -> None:
        if self._resumed is not None:
            self._resumed.set()
            self._resumed = None

    async def _attend(self, process: RunningProcess) -> None:
        try:
            await process.attend()
        finally:
            self._processes.remove(process)


async def _all_done(processes: Iterable[RunningProcess], seconds: float) -> None:
    with anyio.move_on_after(max(0.0, seconds)):
        for process in processes:
            await process.done.wait()


async def _ended(child: subprocess.Popen[bytes]) -> None:
    """When it has, and its children have been given to the next subreaper. Does not reap it."""
    if child.poll() is not None:
        return
    if not hasattr(os, "pidfd_open"):
        await anyio.to_thread.run_sync(child.wait, abandon_on_cancel=True)
        return
    fd = os.pidfd_open(child.pid)
    try:
        await anyio.wait_readable(fd)
    finally:
        os.close(fd)


def _start_shim(python: str, execution_id: str, plumbing: pipes.Plumbing) -> subprocess.Popen[bytes]:
    environment = {shim.SHIM_MARKER[:-1].decode(): execution_id}
    if "LD_LIBRARY_PATH" in os.environ:
        environment["LD_LIBRARY_PATH"] = os.environ["LD_LIBRARY_PATH"]  # some interpreters do not start without
    image = _compiled_shim() if python == sys.executable else -1
    program = shim.__file__ if image < 0 else f"/proc/self/fd/{image}"
    inherited = [image, plumbing.far_control, *plumbing.far]
    with proctree.starting:
        child = subprocess.Popen(
            [python, "-I", "-S", program, str(plumbing.far_control), str(image)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            cwd="/",
            env=environment,
            pass_fds=[fd for fd in inherited if fd >= 0],
            start_new_session=True,
        )
        proctree.guardians.add(child.pid)
    return child


@functools.cache
def _compiled_shim() -> int:
    """A file in memory with the compiled shim, which saves a third of its start; -1 where there is none.

    Not the one in `__pycache__`: it may be missing, or no longer be of this version.
    """
    if not os.path.exists("/proc/self/fd"):
        return -1
    try:
        fd = os.memfd_create("shim")
    except (AttributeError, OSError):
        return -1
    code = compile(Path(shim.__file__).read_bytes(), shim.__file__, "exec", dont_inherit=True)
    with open(fd, "wb", closefd=False) as file:
        file.write(importlib.util.MAGIC_NUMBER + bytes(12) + marshal.dumps(code))
    return fd


def _encode(spec: ProcessSpec, execution_id: str) -> _Command:
    """argv, environment and working directory as the system takes them."""
    if not spec.argv or not spec.argv[0]:
        raise _bad_command("The command is empty", "name a program and its arguments")
    environment = {key: value for key, value in spec.env.items() if key != "VESPERA_PROGRESS_FD"}
    environment["VESPERA_EXECUTION_ID"] = execution_id
    if spec.on_report is not None:
        environment["VESPERA_PROGRESS_FD"] = str(pipes.PROGRESS_FD)
    if any(not key or "=" in key for key in environment):
        raise _bad_command("A name in the environment is empty or holds '='", "give names without '='")
    try:
        argv = [os.fsencode(part) for part in spec.argv]
        env = {os.fsencode(key): os.fsencode(value) for key, value in environment.items()}
        cwd = os.fsencode(os.path.abspath(spec.cwd))
    except UnicodeEncodeError as error:
        raise _bad_command("The command holds characters that no program can be given", "leave them out") from error
    if any(b"\0" in part for part in (*argv, *env, *env.values(), cwd)):
        raise _bad_command("The command holds a NUL byte", "leave it out")
    return argv, env, cwd


def _bad_command(message: str, hint: str) -> ExecutionError:
    return ExecutionError(message, code="BAD_COMMAND", recoverable=False, hint=hint)


def _no_room(spec: ProcessSpec, reason: str | None) -> ExecutionError:
    return ExecutionError(
        f"No process could be started for {spec.argv[0]!r}: {reason}",
        code="LAUNCH_FAILED",
        hint="look for a lack of file descriptors, memory or processes",
    )


def _refusal(spec: ProcessSpec, what: str, number: int) -> ExecutionError:
    """The error for what the shim, or the system, has against this command."""
    program, reason = spec.argv[0], os.strerror(number)
    match what, number:
        case "cwd", _:
            code, message = "BAD_WORKING_DIRECTORY", f"Cannot run in {spec.cwd}: {reason}"
            hint = "name a folder that exists and that this user may enter"
        case "interpreter", _:
            code, message = "NOT_EXECUTABLE", f"The interpreter that {program!r} names in its first line is missing"
            hint = "install it, or correct the line that starts with #!"
        case _, errno.ENOENT | errno.ENOTDIR:
            code, message = "PROGRAM_NOT_FOUND", f"Program not found: {program!r}"
            hint = "give its full path, or a PATH that has it"
        case _, errno.E2BIG:
            code, message = "BAD_COMMAND", f"The arguments and environment of {program!r} are too long"
            hint = "pass the data by stdin or in a file"
        case _, errno.EAGAIN | errno.ENOMEM | errno.EMFILE | errno.ENFILE:
            return _no_room(spec, reason)
        case _:
            code, message = "NOT_EXECUTABLE", f"Cannot execute {program!r}: {reason}"
            hint = "check its permissions and that it is a program for this machine"
    context = {"program": program, "cwd": str(spec.cwd), "reason": reason}
    return ExecutionError(message, code=code, recoverable=False, hint=hint, context=context)
