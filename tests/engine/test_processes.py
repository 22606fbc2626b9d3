"""Processes under shims: started, heard, paused and ended, whatever tree they grow."""

from __future__ import annotations

import os
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path

import anyio
import anyio.lowlevel
import pytest
from deadlines import WITHIN
from process_harness import PATH, Heard, eventually, lives, py, sh, state_of

from vespera_exec.engine import proctree, shim
from vespera_exec.engine.processes import ProcessLauncher
from vespera_exec.engine.work import MAX_REPORT_BYTES, Launcher, ProcessExit, ProcessSpec
from vespera_exec.errors import CancellationException, ExecutionError


def _name(pid: int) -> str:
    return Path(f"/proc/{pid}/comm").read_text().strip()


async def run(spec: ProcessSpec, execution_id: str = "unnamed") -> ProcessExit:
    async with ProcessLauncher(execution_id=execution_id) as launcher:
        process = await launcher.launch(spec)
        with anyio.fail_after(WITHIN):
            return await process.wait()


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
        with anyio.fail_after(WITHIN):
            rung = await launcher.cancel(3)
        assert rung == "sigint"
        assert await process.wait() == ProcessExit(returncode=7, rung="sigint")


async def test_the_ladder_goes_on_to_sigterm(execution_id: str) -> None:
    heard = Heard()
    async with ProcessLauncher(execution_id=execution_id) as launcher:
        process = await launcher.launch(sh("trap '' INT; trap 'exit 9' TERM; echo up; sleep 50 & wait", heard=heard))
        await heard.until(lambda: b"up" in heard.stdout)
        began = time.monotonic()
        rung = await launcher.cancel(3)
        took = time.monotonic() - began
        assert (rung, await process.wait()) == ("sigterm", ProcessExit(returncode=9, rung="sigterm"))
        assert took >= 2


async def test_a_paused_process_hears_the_first_signal_of_a_cancel(execution_id: str) -> None:
    heard = Heard()
    async with ProcessLauncher(execution_id=execution_id) as launcher:
        process = await launcher.launch(sh("trap 'exit 5' INT; echo up; while :; do read x; done", heard=heard))
        await heard.until(lambda: b"up" in heard.stdout)
        await launcher.pause()
        assert await launcher.cancel(4) == "sigint"
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
    script = (
        '(trap \'echo bye >"$1"; exit\' TERM; : >"$1.1"; sleep 50 & wait) & '
        "(trap '' TERM; : >\"$1.2\"; sleep 50) & "
        'until [ -e "$1.1" ] && [ -e "$1.2" ]; do sleep 0.01; done'
    )
    spec = sh(script, str(kept))
    began = time.monotonic()
    ended = await run(spec, execution_id)
    assert (ended.returncode, ended.rung) == (0, None)
    assert ended.leftover >= 2
    assert kept.read_text() == "bye\n"
    assert time.monotonic() - began >= shim.LEFTOVER_SECONDS
    assert list(shim.marked([shim.MARKER + execution_id.encode()])) == []


async def test_the_far_end_of_a_pipe_may_finish_after_the_process(execution_id: str) -> None:
    heard, ended, tries = Heard(), ProcessExit(returncode=-1, leftover=1), 0
    while ended.leftover and tries < 30:  # where the machine has no time for it, the moment that it gets is too short
        heard, tries = Heard(), tries + 1
        ended = await run(sh("(sleep 0.01; echo late) & echo early", heard=heard), execution_id)
    assert heard.stdout == b"early\nlate\n"
    assert ended == ProcessExit(returncode=0)


async def test_a_holder_of_the_output_elsewhere_is_not_waited_for(execution_id: str) -> None:
    heard = Heard()
    async with ProcessLauncher(execution_id=execution_id) as launcher:
        process = await launcher.launch(sh("echo up; exec sleep 50", heard=heard))
        await heard.until(lambda: heard.stdout == b"up\n")
        await eventually(lambda: _name(process.pid) == "sleep")
        thief = os.open(f"/proc/{process.pid}/fd/1", os.O_WRONLY)  # as if passed on over a socket
        try:
            os.write(thief, b"written before the end\n")
            with anyio.fail_after(WITHIN):
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
        "for part in (b'{\"a\"', b': 1}\\n\\xff\\x00garb', b'age\\n\\n', b'x' * 524288 + b'\\n',"
        " b'y' * 524289 + b'\\n', b'z' * 2_000_000 + b'\\n', b'after\\n', b'unended'):\n"
        "    while part: part = part[os.write(3, part):]"
    )
    heard = Heard()
    async with ProcessLauncher(execution_id="lines") as launcher:
        spec = replace(py(script, heard=heard), on_report_dropped=lambda: heard.report(b"dropped"))
        await (await launcher.launch(spec)).wait()
    whole = [b'{"a": 1}', b"\xff\x00garbage", b"", b"x" * MAX_REPORT_BYTES]
    assert heard.reports == [*whole, b"dropped", b"dropped", b"after", b"unended"]


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
        assert lives(process.pid, process.start_time)


async def test_a_paused_tree_is_really_stopped_and_goes_on_when_resumed(execution_id: str, tmp_path: Path) -> None:
    heard = Heard()
    script = "(setsid sh -c 'while :; do echo in; done') & while :; do echo out; /bin/true; done"
    async with ProcessLauncher(execution_id=execution_id) as launcher:
        process = await launcher.launch(sh(script, heard=heard))
        await heard.until(lambda: b"in" in heard.stdout and b"out" in heard.stdout)
        for _ in range(10):
            with anyio.fail_after(WITHIN):
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
        await eventually(lambda: state_of(process.pid) == "T")
        await launcher.pause()
        await launcher.resume()
        ticks = heard.stdout.count(b"tick")
        await heard.until(lambda: heard.stdout.count(b"tick") > ticks + 20)
        assert state_of(process.pid) == "T"
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
        await eventually(lambda: bool(started))


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
            group.start_soon(launcher.launch, sh("exec sleep 50"))
        await eventually(lambda: len(launcher.running) == 20 and all(one.pid for one in launcher.running))
        processes = launcher.running
        assert len(set(launcher.roots)) == 20
        assert await launcher.cancel(4) == "sigint"
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
    assert [pid for pid, row in shim.table().items() if row[0] == os.getpid() and pid in proctree.guardians] == []
    assert not proctree.guardians
