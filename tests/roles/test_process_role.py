"""A process role runs the operator's argv with the caller's values, and nothing else."""

from __future__ import annotations

import json
import os
import signal
import sys
from typing import TYPE_CHECKING, Any

import anyio
import pytest
from role_harness import Bench, bench

from roles.registry import RoleRegistry
from roles.rolefile import parse_role
from roles.runners import process
from vespera_exec.engine.work import WorkResult
from vespera_exec.errors import CancellationException, ExecutionError
from vespera_exec.model.enums import EventType
from vespera_exec.model.principal import Caller

if TYPE_CHECKING:
    from pathlib import Path

COMMAND = RoleRegistry().get("command")
SHOW = (
    "import json,os,sys; env = dict(each for each in os.environ.items() if each[0][:8] != 'COVERAGE');"
    "print(json.dumps([sys.argv[1:], os.getcwd(), env, sys.stdin.read()]))"
)


def role(*lines: str, argv: list[str] | None = None) -> Any:
    text = "\n".join(
        ("name: check", "runner: process", f"argv: {json.dumps(argv or [sys.executable, '-c', SHOW])}", *lines)
    )
    return parse_role(text.encode(), file="check.yaml")


async def command(tmp_path: Path, *argv: str, **inputs: Any) -> tuple[WorkResult, Bench]:
    async with bench(tmp_path, {"argv": list(argv), **inputs}) as made:
        return await process.run(COMMAND, made.work), made


async def shown(tmp_path: Path, made_role: Any, inputs: dict[str, Any], **fields: Any) -> list[Any]:
    async with bench(tmp_path, inputs, **fields) as made:
        result = await process.run(made_role, made.work)
    assert result.success, result.error
    return json.loads(result.output["output_tail"])


async def test_command_runs_in_the_callers_folder_and_tells_code_and_output(tmp_path: Path) -> None:
    result, _ = await command(tmp_path, "pwd")
    assert result == WorkResult(output={"returncode": 0, "output_tail": f"{tmp_path}\n"}, returncode=0)


async def test_command_takes_a_folder_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    result, _ = await command(tmp_path, "pwd", cwd=str(tmp_path / "sub"))
    assert result.output["output_tail"] == f"{tmp_path}/sub\n"


@pytest.mark.promise("commands")
async def test_shell_characters_mean_nothing(tmp_path: Path) -> None:
    hostile = ["$(touch owned)", "`touch owned`", "; touch owned", "| touch owned", "a b\tc", "*", "\n", "-n", "'\""]
    result, _ = await command(tmp_path, sys.executable, "-c", "import sys; print(ascii(sys.argv[1:]))", *hostile)
    assert result.output["output_tail"] == ascii(hostile) + "\n"
    assert os.listdir(tmp_path) == ["scratch"]


async def test_non_zero_exit_is_a_failure_with_code_and_last_line(tmp_path: Path) -> None:
    result, _ = await command(tmp_path, "sh", "-c", "echo before; echo boom >&2; exit 7")
    assert (result.success, result.error_code, result.returncode) == (False, "EXIT_NONZERO", 7)
    assert result.error == "sh exited with code 7: boom"
    assert result.output["returncode"] == 7


async def test_death_by_a_signal_is_named(tmp_path: Path) -> None:
    result, _ = await command(tmp_path, "sh", "-c", "kill -SEGV $$")
    assert result.error == "sh was ended by SIGSEGV"
    assert result.returncode == -11


async def test_program_that_does_not_exist_is_told(tmp_path: Path) -> None:
    with pytest.raises(ExecutionError) as caught:
        await command(tmp_path, "no-such-program-anywhere")
    assert caught.value.failure_code == "PROGRAM_NOT_FOUND"


async def test_values_fill_their_place_and_never_split(tmp_path: Path) -> None:
    made = role(
        "inputs: {name: string, deep: boolean, number: number, lost: string}",
        argv=[
            sys.executable,
            "-c",
            SHOW,
            "{inputs.name}",
            "--deep={inputs.deep}",
            "{{inputs.name}}",
            "{inputs.number}",
            "{inputs.lost}",
        ],
    )
    argv, *_ = await shown(tmp_path, made, {"name": "a b; {inputs.deep} *", "deep": True, "number": 1.5})
    assert argv == ["a b; {inputs.deep} *", "--deep=true", "{inputs.name}", "1.5"]


@pytest.mark.promise("commands")
async def test_value_cannot_become_an_option(tmp_path: Path) -> None:
    made = role("inputs: {name: string}", argv=["echo", "{inputs.name}"])
    async with bench(tmp_path, {"name": "--output=/etc/passwd"}) as each:
        with pytest.raises(ExecutionError, match="read as an option") as caught:
            await process.run(made, each.work)
    assert caught.value.failure_code == "BAD_ARGUMENT"
    with pytest.raises(ExecutionError, match="read as an option"):
        process.arguments(
            role("inputs: {a: string, b: string}", argv=["echo", "{inputs.a}{inputs.b}"]),
            {"a": "", "b": "-x"},
            tmp_path,
        )
    inside = role("inputs: {name: string}", argv=["echo", "name={inputs.name}"])
    assert process.arguments(inside, {"name": "-x"}, tmp_path) == ("echo", "name=-x")


@pytest.mark.promise("masked")
async def test_child_gets_the_allow_list_and_the_roles_own_variables_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SECRET_TOKEN", "hush")
    made = role("env: {LEVEL: 3, LANG: C}")
    _, _, env, _ = await shown(tmp_path, made, {}, caller=Caller(env={"PATH": os.environ["PATH"], "TZ": "UTC"}))
    assert "SECRET_TOKEN" not in env
    assert (env["LEVEL"], env["LANG"], env["TZ"], env["PATH"]) == ("3", "C", "UTC", os.environ["PATH"])
    own = {name for name in env if name.startswith("VESPERA_")}
    assert own == {"VESPERA_EXECUTION_ID", "VESPERA_PROGRESS_FD", "VESPERA_TASK_FILE"}


async def test_token_caller_works_in_the_scratch_folder(tmp_path: Path) -> None:
    _, cwd, env, _ = await shown(tmp_path, role(), {}, caller=Caller("ci", over_tcp=True, cwd="/", env={"TZ": "X"}))
    assert cwd == str(tmp_path / "scratch")
    assert env.get("TZ") != "X"


async def test_task_comes_by_file_and_by_stdin_where_asked(tmp_path: Path) -> None:
    read = "import json,os,sys; print(json.dumps([open(os.environ['VESPERA_TASK_FILE']).read(), sys.stdin.read()]))"
    silent = role(argv=[sys.executable, "-c", read])
    told = role("stdin: task", argv=[sys.executable, "-c", read])
    (file, stdin) = await shown(tmp_path, silent, {})
    assert (json.loads(file)["title"], stdin) == ("a title", "")
    (tmp_path / "scratch" / "task.json").unlink()
    (tmp_path / "scratch").rmdir()
    (file, stdin) = await shown(tmp_path, told, {})
    assert file == stdin
    assert (tmp_path / "scratch" / "task.json").stat().st_mode & 0o777 == 0o600


async def test_child_reports_progress_checkpoint_and_result(tmp_path: Path) -> None:
    script = (
        f"{sys.executable} -m vespera_exec.report --done 1 --total 4 --unit files -m first\n"
        f"{sys.executable} -m vespera_exec.report --progress 70 --metric loss --checkpoint '[1]'\n"
        f"""{sys.executable} -m vespera_exec.report --result '{{"ok": true}}'\n"""
        "echo garbage >&$VESPERA_PROGRESS_FD; echo more >&$VESPERA_PROGRESS_FD\n"
    )
    result, made = await command(tmp_path, "sh", "-c", script)
    assert result.success, result.error
    assert made.percentages == [25.0]
    assert made.session.custom_progress["loss"].current == 70
    assert made.session.lifecycle.checkpoint == [1]
    assert result.output["result"] == {"ok": True}
    assert result.warnings == ("2 progress reports were not understood",)
    assert len(made.messages(EventType.WARNING)) == 1


async def test_progress_is_read_from_the_output_where_the_role_says_so(tmp_path: Path) -> None:
    print_lines = "import sys\nfor n in (1, 5, 9): print(f'[{n}/10] CC', flush=True); sys.stdin.read(0)"
    _, made = await command(tmp_path, sys.executable, "-c", print_lines)
    assert made.percentages[-1] == 90.0
    silent = role(argv=[sys.executable, "-c", print_lines.replace("{", "{{").replace("}", "}}")])
    (tmp_path / "scratch" / "task.json").unlink()
    (tmp_path / "scratch").rmdir()
    async with bench(tmp_path) as each:
        await process.run(silent, each.work)
    assert each.percentages == []


async def test_tail_of_a_flood_is_kept_short(tmp_path: Path) -> None:
    result, _ = await command(tmp_path, sys.executable, "-c", "print('x' * 3_000_000 + 'the end')")
    assert result.output["output_tail"].endswith("the end\n")
    assert len(result.output["output_tail"]) == 2000


async def test_cancelled_process_is_cancelled_not_failed(tmp_path: Path) -> None:
    async with bench(tmp_path, {"argv": ["sh", "-c", "echo 10%; exec sleep 60"]}) as made:

        async def cancel() -> None:
            await made.first_progress()
            made.work.token.cancel("enough")
            await made.launcher.cancel(1.0)

        async with anyio.create_task_group() as group:
            group.start_soon(cancel)
            with pytest.raises(CancellationException, match="enough"):
                await process.run(COMMAND, made.work)


async def test_killed_shim_is_a_failure_not_a_cancel(tmp_path: Path) -> None:
    async with bench(tmp_path, {"argv": ["sh", "-c", "echo 10%; exec sleep 60"]}) as made:

        async def kill_the_shim() -> None:
            await made.first_progress()
            while not made.launcher.running[0].pid:  # its words may be read before the word that it runs
                await anyio.lowlevel.checkpoint()
            os.kill(made.launcher.running[0].shim_pid, signal.SIGKILL)

        async with anyio.create_task_group() as group:
            group.start_soon(kill_the_shim)
            ended: list[tuple[str, bool]] = []
            try:
                result = await process.run(COMMAND, made.work)
                ended.append((result.error_code, result.success))
            except ExecutionError as error:
                ended.append((error.failure_code, False))
            # The shim's end is seen first, or that of the work by its signal.
            assert ended[0] in (("WORKER_DIED", False), ("EXIT_NONZERO", False))
