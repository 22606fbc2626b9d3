"""What a shim costs: its start against a bare subprocess, its memory, and how soon an obedient process is gone."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import anyio
import anyio.lowlevel

from vespera_exec.engine.processes import ProcessLauncher
from vespera_exec.engine.work import ProcessSpec

ROUNDS = 40
START_BUDGET_MS = 25.0
CANCEL_BUDGET_MS = 10.0
MEMORY_BUDGET_KIB = 6 * 1024  # PSS of guardian and shim
OBEDIENT = """
import os, signal, sys, time
def end(number, frame):
    os.write(1, b"%d" % time.monotonic_ns())
    os._exit(0)
signal.signal(signal.SIGINT, end)
os.write(3, b"ready\\n")
signal.pause()
"""


def spec(*argv: str) -> ProcessSpec:
    return ProcessSpec(argv=argv, cwd=Path("/"), env={"PATH": os.environ.get("PATH", os.defpath)})


async def start_ms() -> tuple[float, float, float]:
    """Medians of: a process under a shim, the same process bare, an interpreter that does nothing."""
    shimmed: list[float] = []
    bare: list[float] = []
    empty: list[float] = []
    async with ProcessLauncher(execution_id="benchmark") as launcher:
        await (await launcher.launch(spec("true"))).wait()
        for _ in range(ROUNDS):
            began = time.perf_counter()
            await (await launcher.launch(spec("true"))).wait()
            shimmed.append(time.perf_counter() - began)
            for command, times in ((["true"], bare), ([sys.executable, "-I", "-S", "-c", "pass"], empty)):
                began = time.perf_counter()
                subprocess.run(command, check=True)  # noqa: ASYNC221 - the floor is the bare call
                times.append(time.perf_counter() - began)
    return statistics.median(shimmed) * 1e3, statistics.median(bare) * 1e3, statistics.median(empty) * 1e3


async def loop_held_ms() -> float:
    """The longest that starting a process keeps the event loop from others, as a median over the starts."""
    held: list[float] = []
    async with ProcessLauncher(execution_id="benchmark") as launcher, anyio.create_task_group() as group:
        for _ in range(ROUNDS):
            began = time.perf_counter()
            group.start_soon(launcher.launch, spec("sleep", "20"))
            await anyio.lowlevel.checkpoint()
            await anyio.lowlevel.checkpoint()
            held.append(time.perf_counter() - began)
            await launcher_idle(launcher)
        await launcher.cancel(1)
    return statistics.median(held) * 1e3


async def launcher_idle(launcher: ProcessLauncher) -> None:
    for process in launcher.running:
        await process.settled.wait()


async def memory_kib() -> dict[str, tuple[int, int]]:
    """Of guardian and shim together, and of an interpreter that does nothing: `ours, floor` in KiB."""
    command = [sys.executable, "-I", "-S", "-c", "import sys; sys.stdin.read()"]
    with subprocess.Popen(command, stdin=subprocess.PIPE) as floor:  # noqa: ASYNC220 - it only waits
        async with ProcessLauncher(execution_id="benchmark") as launcher:
            processes = [await launcher.launch(spec("sleep", "20")) for _ in range(10)]
            await anyio.sleep(0.2)
            guardian, shim = memory_of(processes[0].guardian_pid), memory_of(processes[0].shim_pid)
            theirs = memory_of(floor.pid)
        if floor.stdin is not None:
            floor.stdin.close()
    return {name: (guardian[name] + shim[name], theirs[name]) for name in theirs}


def memory_of(pid: int) -> dict[str, int]:
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]
    sizes = {line.split(":")[0]: int(line.split()[1]) for line in lines}
    return {name: sizes[name] for name in ("Rss", "Pss", "Private_Dirty")}


async def cancel_ms() -> tuple[float, float, float]:
    """Of an obedient process, medians: from its last instruction to `wait`, from `cancel` to `wait`; and the worst."""
    after: list[float] = []
    whole: list[float] = []
    for _ in range(ROUNDS):
        ready = anyio.Event()
        said = bytearray()

        def on_output(stream: str, chunk: bytes, said: bytearray = said) -> None:
            said.extend(chunk)

        def on_report(line: bytes, ready: anyio.Event = ready) -> None:
            ready.set()

        order = ProcessSpec(
            argv=(sys.executable, "-I", "-S", "-c", OBEDIENT),
            cwd=Path("/"),
            env={},
            on_output=on_output,
            on_report=on_report,
        )
        async with ProcessLauncher(execution_id="benchmark") as launcher, anyio.create_task_group() as group:
            process = await launcher.launch(order)
            await ready.wait()
            began = time.monotonic_ns()
            group.start_soon(launcher.cancel, 3.0)
            await process.wait()
            ended = time.monotonic_ns()
            after.append((ended - int(said)) / 1e6)
            whole.append((ended - began) / 1e6)
    return statistics.median(after), statistics.median(whole), max(after)


async def main() -> None:
    ours, bare, empty = await start_ms()
    print(f"run `true`     ours {ours:6.2f} ms  bare {bare:6.2f} ms  ratio {ours / bare:5.2f}")
    print(
        f"start of shim  ours {ours - bare:6.2f} ms  floor (python -c pass) {empty:6.2f} ms  "
        f"ratio {(ours - bare) / empty:5.2f}  budget {START_BUDGET_MS} ms"
    )
    print(f"loop held      ours {await loop_held_ms():6.2f} ms a start")
    for name, (size, floor) in (await memory_kib()).items():
        budget = f"  budget {MEMORY_BUDGET_KIB} KiB" if name == "Pss" else ""
        print(f"{name:14} ours {size:6d} KiB floor (python, idle) {floor:6d} KiB ratio {size / floor:5.2f}{budget}")
    after, whole, worst = await cancel_ms()
    print(
        f"cancel         gone {after:6.2f} ms after the process (worst {worst:.2f}), {whole:.2f} ms after the request  "
        f"budget {CANCEL_BUDGET_MS} ms"
    )


if __name__ == "__main__":
    anyio.run(main)
