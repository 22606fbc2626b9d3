"""Processes under shims: started, heard, paused and ended, whatever tree they grow."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import uuid
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anyio
import anyio.lowlevel
import pytest

from vespera_exec.engine import proctree, shim
from vespera_exec.engine.pipes import LINE_LIMIT
from vespera_exec.engine.processes import ProcessLauncher, RunningProcess
from vespera_exec.engine.work import Launcher, ProcessExit, ProcessSpec
from vespera_exec.errors import CancellationException, ExecutionError

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable, Mapping

TREES = Path(__file__).with_name("trees")
KINDS = ["deaf", "new_session", "daemonized", "cleared_environment", "respawner", "holds_stdout", "stopped"]
PATH = {"PATH": os.environ.get("PATH", os.defpath)}


class Heard:
    """What came out of a process."""

    def __init__(self) -> None:
        self.chunks: dict[str, bytearray] = {"stdout": bytearray(), "stderr": bytearray()}
        self.reports: list[bytes] = []
        self._changed = anyio.Event()

    @property
    def stdout(self) -> bytes:
        return bytes(self.chunks["stdout"])

    @property
    def stderr(self) -> bytes:
        return bytes(self.chunks["stderr"])

    def output(self, stream: str, chunk: bytes) -> None:
        self.chunks[stream] += chunk
        self._change()

    def report(self, line: bytes) -> None:
        self.reports.append(line)
        self._change()

    def _change(self) -> None:
        self._changed.set()
        self._changed = anyio.Event()

    async def until(self, predicate: Callable[[], bool]) -> None:
        with anyio.fail_after(20):
            while not predicate():
                await self._changed.wait()


class Register:
    """The pids that a tree has written down, and their start times as soon as they are looked at."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.touch()

    def processes(self) -> dict[int, int]:
        rows = {pid: shim.look(pid) for pid in map(int, self.path.read_text().splitlines())}
        return {pid: row[3] for pid, row in rows.items() if row is not None}

    def left(self, known: Mapping[int, int], execution_id: str) -> set[int]:
        """Who still lives: of `known`, of those written down since, and of those with the marker."""
        since = set(map(int, self.path.read_text().splitlines())) - set(known)
        found = {pid for pid, start in known.items() if _lives(pid, start)}
        found |= {pid for pid in since if _lives(pid, None)}
        return found | set(shim.marked([shim.MARKER + execution_id.encode()]))


def _lives(pid: int, start: int | None) -> bool:
    row = shim.look(pid)
    return row is not None and row[4] not in "ZX" and start in (None, row[3])


def _state(pid: int) -> str:
    row = shim.look(pid)
    return row[4] if row else ""


def _name(pid: int) -> str:
    return Path(f"/proc/{pid}/comm").read_text().strip()


@pytest.fixture
def execution_id() -> str:
    return uuid.uuid4().hex


@pytest.fixture
def register(tmp_path: Path) -> Register:
    return Register(tmp_path / "register")


def sh(script: str, *args: str, heard: Heard | None = None, stdin: bytes = b"", grace: float = 3.0) -> ProcessSpec:
    return _spec(("sh", "-c", script, "sh", *args), heard, stdin=stdin, grace=grace)


def py(script: str, *args: str, heard: Heard | None = None, stdin: bytes = b"") -> ProcessSpec:
    return _spec((sys.executable, "-S", "-c", script, *args), heard, stdin=stdin)


def _spec(argv: tuple[str, ...], heard: Heard | None, *, stdin: bytes = b"", grace: float = 3.0) -> ProcessSpec:
    return ProcessSpec(
        argv=argv,
        cwd=Path("/"),
        env=PATH,
        stdin=stdin,
        on_output=heard.output if heard else None,
        on_report=heard.report if heard else None,
        grace_seconds=grace,
    )


async def run(spec: ProcessSpec, execution_id: str = "unnamed") -> ProcessExit:
    async with ProcessLauncher(execution_id=execution_id) as launcher:
        process = await launcher.launch(spec)
        with anyio.fail_after(30):
            return await process.wait()


async def eventually(predicate: Callable[[], bool], *, seconds: float) -> float:
    """Seconds until it was true."""
    began = time.monotonic()
    with anyio.fail_after(seconds):
        while not predicate():  # noqa: ASYNC110 - /proc has no events
            await anyio.sleep(0.005)
    return time.monotonic() - began


async def plant(launcher: ProcessLauncher, kind: str, register: Register) -> tuple[RunningProcess, dict[int, int]]:
    """The tree, standing, and who is in it."""
    heard = Heard()
    argv = (sys.executable, "-S", str(TREES / "nasty.py"), kind, str(register.path))
    process = await launcher.launch(_spec(argv, heard))
    await heard.until(lambda: bool(heard.reports))
    if kind == "stopped":
        await eventually(lambda: _state(process.pid) == "T", seconds=10)
    return process, register.processes()


@asynccontextmanager
async def holder(
    execution_id: str, kind: str, register: Register, *, adopts: bool
) -> AsyncGenerator[tuple[Any, Callable[[], Any]]]:
    """A daemon's stand-in whose tree stands; yields its process and what reads its next fact."""
    argv = [sys.executable, str(TREES / "holder.py"), execution_id, kind, str(register.path), "yes" if adopts else "no"]
    async with await anyio.open_process(argv, stderr=None) as process:
        assert process.stdout is not None
        stream = process.stdout
        buffer = b""

        async def fact() -> dict[str, Any]:
            nonlocal buffer
            with anyio.fail_after(20):
                while b"\n" not in buffer:
                    buffer += await stream.receive()
            line, _, buffer = buffer.partition(b"\n")
            return json.loads(line)

        try:
            yield process, fact
        finally:
            if process.returncode is None:
                process.kill()


@pytest.mark.parametrize("kind", KINDS)
async def test_nothing_is_left_of_a_tree_after_cancel(kind: str, execution_id: str, register: Register) -> None:
    async with ProcessLauncher(execution_id=execution_id) as launcher:
        process, known = await plant(launcher, kind, register)
        began = time.monotonic()
        rung = await launcher.cancel(0.3)
        took = time.monotonic() - began
        assert register.left(known, execution_id) == set()
        assert process.exit is not None
        assert rung == process.exit.rung == ("sigterm" if kind == "stopped" else "sigkill")
        assert 0.2 <= took <= 5


@pytest.mark.parametrize("kind", KINDS)
async def test_nothing_is_left_of_a_tree_when_its_launcher_is_left(
    kind: str, execution_id: str, register: Register
) -> None:
    async with ProcessLauncher(execution_id=execution_id) as launcher:
        process, known = await plant(launcher, kind, register)
        began = time.monotonic()
    assert register.left(known, execution_id) == set()
    assert time.monotonic() - began <= 1
    assert process.exit is not None
    assert process.exit.returncode == -signal.SIGKILL


@pytest.mark.parametrize("kind", KINDS)
async def test_nothing_is_left_of_a_tree_when_the_daemon_is_killed(
    kind: str, execution_id: str, register: Register
) -> None:
    async with holder(execution_id, kind, register, adopts=True) as (daemon, fact):
        stands = await fact()
        known = register.processes() | {stands["shim"]: shim.table()[stands["shim"]][3]}
        daemon.kill()
        took = await eventually(lambda: not register.left(known, execution_id), seconds=5)
    assert took <= 1


@pytest.mark.parametrize("kind", KINDS)
async def test_nothing_is_left_of_a_tree_when_its_shim_is_killed(
    kind: str, execution_id: str, register: Register
) -> None:
    async with holder(execution_id, kind, register, adopts=True) as (_, fact):
        stands = await fact()
        known = register.processes()
        began = time.monotonic()
        os.kill(stands["shim"], signal.SIGKILL)
        ended = await fact()
        assert register.left(known, execution_id) == set()
        assert time.monotonic() - began <= 1
        assert ended == {"returncode": -signal.SIGKILL, "rung": "sweep", "children": []}


async def test_a_killed_shim_loses_no_marked_process_even_where_orphans_are_not_adopted(
    execution_id: str, register: Register
) -> None:
    async with ProcessLauncher(execution_id=execution_id) as launcher:
        process, known = await plant(launcher, "daemonized", register)
        os.kill(process.shim_pid, signal.SIGKILL)
        with anyio.fail_after(3):
            ended = await process.wait()
        assert register.left(known, execution_id) == set()
        assert (ended.returncode, ended.rung) == (-signal.SIGKILL, "sweep")


async def test_a_killed_shim_takes_no_other_process_of_its_execution_with_it(
    execution_id: str, register: Register
) -> None:
    async with ProcessLauncher(execution_id=execution_id) as launcher:
        sibling = await launcher.launch(sh("sleep 50; true"))
        _, known = await plant(launcher, "new_session", register)
        other = launcher.running[1]
        os.kill(other.shim_pid, signal.SIGKILL)
        with anyio.fail_after(3):
            assert (await other.wait()).rung == "sweep"
        row = shim.look(sibling.pid)
        assert launcher.running == (sibling,)
        assert row is not None
        assert row[4] != "T"
        assert register.left(known, execution_id) <= set(shim.descendants(shim.table(), [sibling.shim_pid]))


async def test_cancel_ends_a_tree_whose_shim_is_stopped(execution_id: str, register: Register) -> None:
    async with ProcessLauncher(execution_id=execution_id) as launcher:
        process, known = await plant(launcher, "new_session", register)
        os.kill(process.shim_pid, signal.SIGSTOP)
        began = time.monotonic()
        assert await launcher.cancel(0.2) == "sweep"
        assert time.monotonic() - began <= 5
        assert register.left(known, execution_id) == set()


async def test_an_obedient_process_is_reported_gone_at_once(execution_id: str) -> None:
    heard = Heard()
    script = (
        "import signal, sys\n"
        "signal.signal(2, lambda *_: sys.exit(7))\n"
        "print('up', flush=True)\n"
        "signal.pause()"
    )  # fmt: skip
    async with ProcessLauncher(execution_id=execution_id) as launcher:
        process = await launcher.launch(py(script, heard=heard))
        await heard.until(lambda: b"up" in heard.stdout)
        with anyio.fail_after(5):
            rung = await launcher.cancel(3)
        assert rung == "sigint"
        assert await process.wait() == ProcessExit(returncode=7, rung="sigint")


async def test_the_ladder_goes_on_to_sigterm(execution_id: str) -> None:
    heard = Heard()
    async with ProcessLauncher(execution_id=execution_id) as launcher:
        process = await launcher.launch(sh("trap '' INT; trap 'exit 9' TERM; echo up; sleep 50 & wait", heard=heard))
        await heard.until(lambda: b"up" in heard.stdout)
        began = time.monotonic()
        rung = await launcher.cancel(0.6)
        took = time.monotonic() - began
        assert (rung, await process.wait()) == ("sigterm", ProcessExit(returncode=9, rung="sigterm"))
        assert 0.4 <= took < 0.6


async def test_a_paused_process_hears_the_first_signal_of_a_cancel(execution_id: str) -> None:
    heard = Heard()
    async with ProcessLauncher(execution_id=execution_id) as launcher:
        process = await launcher.launch(sh("trap 'exit 5' INT; echo up; while :; do read x; done", heard=heard))
        await heard.until(lambda: b"up" in heard.stdout)
        await launcher.pause()
        assert await launcher.cancel(2) == "sigint"
        assert (await process.wait()).returncode == 5


async def test_nothing_is_launched_once_cancelled(execution_id: str) -> None:
    async with ProcessLauncher(execution_id=execution_id) as launcher:
        as_roles_know_it: Launcher = launcher
        assert await launcher.cancel(1) is None
        with pytest.raises(CancellationException):
            await as_roles_know_it.launch(sh("true"))


async def test_what_outlives_the_process_gets_a_moment_then_is_ended_and_counted(
    execution_id: str, tmp_path: Path
) -> None:
    kept = tmp_path / "kept"
    script = "(trap 'echo bye >\"$1\"; exit' TERM; while :; do sleep 0.02; done) & (trap '' TERM; sleep 50) & echo main"
    heard = Heard()
    spec = sh(script, str(kept), heard=heard)
    began = time.monotonic()
    ended = await run(spec, execution_id)
    assert (ended.returncode, ended.rung) == (0, None)
    assert ended.leftover >= 2
    assert kept.read_text() == "bye\n"
    assert 0.5 <= time.monotonic() - began < 3
    assert list(shim.marked([shim.MARKER + execution_id.encode()])) == []


async def test_the_far_end_of_a_pipe_may_finish_after_the_process(execution_id: str) -> None:
    heard = Heard()
    ended = await run(sh("(sleep 0.01; echo late) & echo early", heard=heard), execution_id)
    assert heard.stdout == b"early\nlate\n"
    assert ended == ProcessExit(returncode=0)


async def test_a_holder_of_the_output_elsewhere_is_not_waited_for(execution_id: str) -> None:
    heard = Heard()
    async with ProcessLauncher(execution_id=execution_id) as launcher:
        process = await launcher.launch(sh("echo up; exec sleep 50", heard=heard))
        await heard.until(lambda: heard.stdout == b"up\n")
        await eventually(lambda: _name(process.pid) == "sleep", seconds=10)
        thief = os.open(f"/proc/{process.pid}/fd/1", os.O_WRONLY)  # as if passed on over a socket
        try:
            os.write(thief, b"written before the end\n")
            with anyio.fail_after(3):
                assert await launcher.cancel(1) == "sigint"
                await process.wait()
        finally:
            os.close(thief)
    assert heard.stdout == b"up\nwritten before the end\n"


@pytest.mark.parametrize(
    ("script", "returncode"), [("exit 0", 0), ("exit 3", 3), ("kill -9 $$", -9), ("kill -15 $$", -15)]
)
async def test_the_exit_status_is_that_of_the_process(script: str, returncode: int) -> None:
    assert await run(sh(script)) == ProcessExit(returncode=returncode)


async def test_all_output_is_there_in_order_when_the_wait_returns() -> None:
    script = "import os\nfor i in range(16384):\n    os.write(1, b'%063d\\n' % i); os.write(2, b'%063d\\n' % -i)\n"
    heard = Heard()
    await run(py(script, heard=heard))
    assert len(heard.stdout) == len(heard.stderr) == 1 << 20
    assert [int(line) for line in heard.stdout.splitlines()] == list(range(16384))
    assert [int(line) for line in heard.stderr.splitlines()] == [-i for i in range(16384)]


async def test_stdin_larger_than_a_pipe_arrives_whole_and_ends() -> None:
    heard = Heard()
    data = os.urandom(1 << 20)
    assert (await run(sh("cat", heard=heard, stdin=data))).returncode == 0
    assert heard.stdout == data


async def test_a_process_that_does_not_read_its_stdin_is_no_fault() -> None:
    assert await run(sh("exit 2", stdin=bytes(1 << 20))) == ProcessExit(returncode=2)
    assert await run(sh("exec <&-; sleep 0.05; exit 2", stdin=bytes(1 << 20))) == ProcessExit(returncode=2)


async def test_without_input_stdin_is_empty() -> None:
    heard = Heard()
    await run(sh("wc -c", heard=heard))
    assert heard.stdout.strip() == b"0"


async def test_the_process_has_the_given_environment_with_the_marker_and_nothing_else() -> None:
    heard = Heard()
    env = {"PATH": PATH["PATH"], "GIVEN": "1", "VESPERA_EXECUTION_ID": "outer", "VESPERA_PROGRESS_FD": "9"}
    spec = ProcessSpec(argv=("env",), cwd=Path("/"), env=env, on_output=heard.output)
    await run(spec, "inner")
    assert set(heard.stdout.decode().splitlines()) == {f"PATH={env['PATH']}", "GIVEN=1", "VESPERA_EXECUTION_ID=inner"}


async def test_the_process_starts_with_default_signals_in_a_session_of_its_own_and_no_foreign_descriptor(
    tmp_path: Path,
) -> None:
    heard = Heard()
    script = (
        "import os, signal\n"
        "ignored = [n for n in range(1, 32) if n not in (9, 13, 19, 25) and signal.getsignal(n) == signal.SIG_IGN]\n"
        "print(ignored, os.getsid(0) == os.getpid(), os.getcwd(), sorted(map(int, os.listdir('/proc/self/fd')))[:-1])"
    )
    spec = ProcessSpec(
        argv=(sys.executable, "-S", "-c", script),
        cwd=tmp_path,
        env=PATH,
        on_output=heard.output,
        on_report=heard.report,
    )
    await run(spec)
    assert heard.stderr == b""
    assert heard.stdout.decode().strip() == f"[] True {tmp_path} [0, 1, 2, 3]"


async def test_the_shim_holds_no_descriptor_of_the_work(execution_id: str) -> None:
    async with ProcessLauncher(execution_id=execution_id) as launcher:
        process = await launcher.launch(sh("exec sleep 50", heard=Heard(), stdin=bytes(1 << 20)))
        works, shims = _open_files(process.pid), _open_files(process.shim_pid)
        assert len([name for name in works if name.startswith("pipe:")]) == 4
        assert works & shims == set()


def _open_files(pid: int) -> set[str]:
    return {os.readlink(entry) for entry in Path(f"/proc/{pid}/fd").iterdir()} - {os.devnull}


async def test_the_program_is_looked_up_in_the_path_that_it_gets(tmp_path: Path) -> None:
    for folder, text in (("first", "no"), ("second", "yes")):
        (tmp_path / folder).mkdir()
        program = tmp_path / folder / "prog"
        program.write_text(f"#!/bin/sh\necho {text}\n")
        program.chmod(0o755 if text == "yes" else 0o644)
    heard = Heard()
    env = {"PATH": f"{tmp_path / 'none'}:{tmp_path / 'first'}:{tmp_path / 'second'}"}
    await run(ProcessSpec(argv=("prog",), cwd=Path("/"), env=env, on_output=heard.output))
    assert heard.stdout == b"yes\n"


@pytest.mark.parametrize(
    ("argv", "code"),
    [
        (("no-such-program",), "PROGRAM_NOT_FOUND"),
        (("./none",), "PROGRAM_NOT_FOUND"),
        (("./plain",), "NOT_EXECUTABLE"),
        (("./text",), "NOT_EXECUTABLE"),
        (("./lost",), "NOT_EXECUTABLE"),
        (("/",), "NOT_EXECUTABLE"),
        ((), "BAD_COMMAND"),
        (("",), "BAD_COMMAND"),
        (("echo", "a\0b"), "BAD_COMMAND"),
        (("echo", "\ud800"), "BAD_COMMAND"),
        (("echo", "x" * 3_000_000), "BAD_COMMAND"),
    ],
    ids=lambda value: str(value)[:20].encode("ascii", "backslashreplace").decode(),
)
async def test_a_command_that_cannot_run_is_refused_with_what_to_do(
    argv: tuple[str, ...], code: str, tmp_path: Path
) -> None:
    for name, text, mode in (("plain", "", 0o644), ("text", "words", 0o755), ("lost", "#!/no/interpreter\n", 0o755)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(mode)
    async with ProcessLauncher(execution_id="refused") as launcher:
        with pytest.raises(ExecutionError) as refused:
            await launcher.launch(ProcessSpec(argv=argv, cwd=tmp_path, env=PATH))
        assert refused.value.failure_code == code
        assert refused.value.hint
        assert not refused.value.recoverable
        # The launcher is none the worse.
        assert (await (await launcher.launch(sh("exit 6"))).wait()).returncode == 6


@pytest.mark.parametrize("folder", ["missing", "file"])
async def test_a_working_directory_that_is_none_is_refused(folder: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    async with ProcessLauncher(execution_id="refused") as launcher:
        with pytest.raises(ExecutionError) as refused:
            await launcher.launch(ProcessSpec(argv=("true",), cwd=tmp_path / folder, env=PATH))
    assert refused.value.failure_code == "BAD_WORKING_DIRECTORY"


async def test_progress_lines_come_whole_and_in_order_however_they_were_written() -> None:
    script = (
        "import os\n"
        "for part in (b'{\"a\"', b': 1}\\n\\xff\\x00garb', b'age\\n\\n', b'x' * 262144 + b'\\n',"
        " b'y' * 262145 + b'\\n', b'z' * 2_000_000 + b'\\n', b'after\\n', b'unended'):\n"
        "    while part: part = part[os.write(3, part):]"
    )
    heard = Heard()
    async with ProcessLauncher(execution_id="lines") as launcher:
        process = await launcher.launch(py(script, heard=heard))
        await process.wait()
    expected = [b'{"a": 1}', b"\xff\x00garbage", b"", b"x" * LINE_LIMIT, b"after", b"unended"]
    assert heard.reports == expected
    assert process.dropped_reports == 2


async def test_a_flood_of_progress_is_delivered_whole_without_holding_the_loop() -> None:
    script = (
        "import os\n"
        "lines = b''.join(b'%d\\n' % i for i in range(100_000))\n"
        "while lines: lines = lines[os.write(3, lines):]"
    )
    heard = Heard()
    async with ProcessLauncher(execution_id="flood") as launcher:
        process = await launcher.launch(py(script, heard=heard))
        turns_between: list[int] = []
        while not process.done.is_set():
            before = len(heard.reports)
            await anyio.lowlevel.checkpoint()
            turns_between.append(len(heard.reports) - before)
    assert [int(line) for line in heard.reports] == list(range(100_000))
    # All but the last burst, which is what was in the pipe at the end.
    assert sorted(turns_between)[-2] <= 256


async def test_a_lone_progress_line_is_delivered_while_the_process_runs(execution_id: str) -> None:
    heard = Heard()
    async with ProcessLauncher(execution_id=execution_id) as launcher:
        process = await launcher.launch(sh("echo one >&3; sleep 50", heard=heard))
        await heard.until(lambda: heard.reports == [b"one"])
        assert process in launcher.running


async def test_an_error_in_a_callback_ends_the_process_and_comes_out_of_the_launcher(execution_id: str) -> None:
    def refuse(stream: str, chunk: bytes) -> None:
        raise LookupError(stream)

    with pytest.RaisesGroup(LookupError, flatten_subgroups=True):
        async with ProcessLauncher(execution_id=execution_id) as launcher:
            spec = ProcessSpec(argv=("sh", "-c", "echo; sleep 50"), cwd=Path("/"), env=PATH, on_output=refuse)
            process = await launcher.launch(spec)
            await process.wait()
    assert list(shim.marked([shim.MARKER + execution_id.encode()])) == []


async def test_an_error_in_the_body_comes_out_as_it_is(execution_id: str) -> None:
    with pytest.raises(ZeroDivisionError):  # noqa: PT012 - the body is what is tested
        async with ProcessLauncher(execution_id=execution_id) as launcher:
            await launcher.launch(sh("sleep 50"))
            raise ZeroDivisionError
    assert list(shim.marked([shim.MARKER + execution_id.encode()])) == []


async def test_cancelling_the_body_kills_the_process_before_it_goes_on(execution_id: str) -> None:
    with anyio.move_on_after(0.2) as scope:
        async with ProcessLauncher(execution_id=execution_id) as launcher:
            process = await launcher.launch(sh("sleep 50; true"))
            await process.wait()
    assert scope.cancelled_caught
    assert list(shim.marked([shim.MARKER + execution_id.encode()])) == []


async def test_cancelling_a_wait_leaves_the_process_alone(execution_id: str) -> None:
    heard = Heard()
    async with ProcessLauncher(execution_id=execution_id) as launcher:
        process = await launcher.launch(sh("sleep 50", heard=heard))
        with anyio.move_on_after(0.01):
            await process.wait()
        assert launcher.running == (process,)
        assert _lives(process.pid, process.start_time)


async def test_a_paused_tree_is_really_stopped_and_goes_on_when_resumed(execution_id: str, tmp_path: Path) -> None:
    heard = Heard()
    script = "(setsid sh -c 'while :; do echo in; done') & while :; do echo out; /bin/true; done"
    async with ProcessLauncher(execution_id=execution_id) as launcher:
        process = await launcher.launch(sh(script, heard=heard))
        await heard.until(lambda: b"in" in heard.stdout and b"out" in heard.stdout)
        for _ in range(10):
            with anyio.fail_after(5):
                await launcher.pause()
            seen = shim.table()
            tree = shim.descendants(seen, [process.shim_pid])
            assert len(tree) >= 2
            assert {seen[pid][4] for pid in tree} <= set("TtZ")
            await launcher.resume()
            # What was in the pipe may come first.
            enough = len(heard.stdout) + (1 << 17)
            await heard.until(lambda enough=enough: len(heard.stdout) > enough)


async def test_a_process_that_has_stopped_itself_is_not_woken_by_a_resume(execution_id: str) -> None:
    heard = Heard()
    script = "(while :; do echo tick; sleep 0.005; done) & kill -STOP $$; echo woken"
    async with ProcessLauncher(execution_id=execution_id) as launcher:
        process = await launcher.launch(sh(script, heard=heard))
        await eventually(lambda: _state(process.pid) == "T", seconds=10)
        await launcher.pause()
        await launcher.resume()
        ticks = heard.stdout.count(b"tick")
        await heard.until(lambda: heard.stdout.count(b"tick") > ticks + 20)
        assert _state(process.pid) == "T"
        assert b"woken" not in heard.stdout


async def test_a_launch_during_a_pause_waits_for_the_resume(execution_id: str) -> None:
    started: list[int] = []

    async def launch(launcher: ProcessLauncher) -> None:
        started.append((await launcher.launch(sh("true"))).pid)

    async with ProcessLauncher(execution_id=execution_id) as launcher, anyio.create_task_group() as group:
        await launcher.pause()
        group.start_soon(launch, launcher)
        await anyio.wait_all_tasks_blocked()
        assert started == []
        assert launcher.running == ()
        await launcher.resume()
        await eventually(lambda: bool(started), seconds=10)


def test_the_boot_sweep_ends_what_dead_owners_left_and_nothing_else(register: Register) -> None:
    dead, alive = uuid.uuid4().hex, uuid.uuid4().hex
    stray = [sys.executable, "-S", str(TREES / "nasty.py"), "cleared_environment", str(register.path)]
    with (
        subprocess.Popen(stray, env={"VESPERA_EXECUTION_ID": dead}, start_new_session=True) as one,
        subprocess.Popen(["sleep", "50"], env={"VESPERA_SHIM_OF": dead, **PATH}) as old_shim,
        subprocess.Popen(["sleep", "50"], env={"VESPERA_EXECUTION_ID": alive, **PATH}) as other,
    ):
        anyio.run(lambda: eventually(lambda: len(register.processes()) == 2, seconds=10))
        known = register.processes()
        assert proctree.sweep([dead]) == 3
        assert register.left(known, dead) == set()
        assert old_shim.wait() == one.wait() == -signal.SIGKILL
        assert other.poll() is None
        assert proctree.sweep([dead]) == 0
        assert proctree.sweep([]) == 0
        other.kill()


async def test_cancel_sweeps_what_another_service_started_with_the_marker(execution_id: str) -> None:
    env = {"VESPERA_EXECUTION_ID": execution_id, **PATH}
    async with await anyio.open_process(["sleep", "50"], env=env, start_new_session=True) as elsewhere:
        async with ProcessLauncher(execution_id=execution_id) as launcher:
            await launcher.launch(sh("sleep 50"))
            assert await launcher.cancel(1) == "sweep"
        assert await elsewhere.wait() == -signal.SIGKILL


async def test_many_processes_at_once_are_started_and_cancelled(execution_id: str) -> None:
    async with ProcessLauncher(execution_id=execution_id) as launcher, anyio.create_task_group() as group:
        for _ in range(20):
            group.start_soon(launcher.launch, sh("sleep 50"))
        await eventually(lambda: len(launcher.running) == 20 and all(one.pid for one in launcher.running), seconds=20)
        processes = launcher.running
        assert len(set(launcher.roots)) == 20
        assert await launcher.cancel(2) == "sigint"
        assert {await process.wait() for process in processes} == {ProcessExit(returncode=-2, rung="sigint")}
        assert launcher.running == launcher.roots == ()


async def test_no_descriptor_and_no_child_is_left_behind(execution_id: str) -> None:
    await run(sh("true"))
    descriptors = set(os.listdir("/proc/self/fd"))
    for number in range(5):
        async with ProcessLauncher(execution_id=execution_id) as launcher:
            await (await launcher.launch(sh("echo", heard=Heard(), stdin=b"x"))).wait()
            with pytest.raises(ExecutionError):
                await launcher.launch(ProcessSpec(argv=("none",), cwd=Path("/"), env=PATH, stdin=b"x"))
            await launcher.launch(sh("sleep 50", heard=Heard(), stdin=bytes(1 << 20)))
            if number % 2:
                await launcher.cancel(1)
    assert set(os.listdir("/proc/self/fd")) == descriptors
    assert [pid for pid, row in shim.table().items() if row[0] == os.getpid() and pid in proctree.shims] == []
    assert not proctree.shims
