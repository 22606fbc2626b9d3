"""The program in a terminal: bars, colours, Ctrl-C."""

from __future__ import annotations

from cli_harness import Cli, Terminal, marked, until


def session_of(cli: Cli, title: str) -> tuple[str, str]:
    row = cli.json("list", "--text", title, "--limit", "1")["tasks"][0]
    return row["task_id"], row["session_id"]


def test_without_arguments_it_shows_its_help(cli: Cli) -> None:
    with cli.terminal() as terminal:
        assert terminal.finish() == 0
        assert any(line.startswith("Usage: vespera-exec") for line in terminal.screen.text())


def test_progress_moves_below_the_output_and_is_gone_at_the_end(cli: Cli) -> None:
    script = "echo first; echo '[ 50%] half'; read go < go; echo last"
    cli.run("run", "-q", "--", "mkfifo", "go")
    with cli.terminal("run", "--title", "moving", "--", "sh", "-c", script) as terminal:
        terminal.until(lambda shown: any("60 %" in line and "cpu" in line for line in shown.screen.text()))
        terminal.until("[ 50%] half")
        lines = terminal.screen.text()
        assert lines[:2] == ["first", "[ 50%] half"]
        assert "execution" in lines[2]
        assert "60 %" in lines[2]
        cli.run("run", "-q", "--", "sh", "-c", "echo > go")
        assert terminal.finish() == 0
        shown = [line for line in terminal.screen.text() if line]
        assert shown[:3] == ["first", "[ 50%] half", "last"]
        assert shown[3].startswith("vespera-exec: completed in ")
        assert len(shown) == 4


def test_ctrl_c_cancels_the_work_and_waits_for_its_end(cli: Cli) -> None:
    with cli.terminal(
        "run", "--title", "to be cancelled", "--", "sh", "-c", "echo up; sleep 63 & sleep 64"
    ) as terminal:
        terminal.until("up")
        task_id, session = session_of(cli, "to be cancelled")
        until(lambda: len(marked(f"VESPERA_EXECUTION_ID={session}")) >= 2, "its processes run")
        terminal.type("\x03")
        assert terminal.finish() == 130
        shown = "\n".join(terminal.screen.text())
        assert "cancelling; Ctrl-C again leaves at once" in shown
        assert "cancelled after" in shown
    assert marked(f"VESPERA_EXECUTION_ID={session}") == []
    assert cli.status(task_id) == "cancelled"


def test_a_second_ctrl_c_leaves_at_once_and_the_cancel_goes_on(cli: Cli) -> None:
    script = "trap '' INT TERM; echo up; while :; do sleep 0.1; done"
    with cli.terminal("run", "--title", "stubborn", "--", "sh", "-c", script) as terminal:
        terminal.until("up")
        task_id, _ = session_of(cli, "stubborn")
        terminal.type("\x03")
        terminal.until("cancelling")
        terminal.type("\x03")
        assert terminal.finish() == 130
        assert f"the cancel goes on without us: vespera-exec status {task_id}" in terminal.raw
    until(lambda: cli.status(task_id) == "cancelled", "the cancel ends without us")


def test_watching_and_leaving_does_not_touch_the_work(cli: Cli) -> None:
    task_id = cli.task("--", "sleep", "65")
    with cli.terminal("status", "--watch", task_id) as terminal:
        terminal.until("execution")
        terminal.type("\x03")
        assert terminal.finish() == 130
    assert cli.status(task_id) == "running"
    cli.run("cancel", task_id)


def coloured(terminal: Terminal) -> bool:
    terminal.finish()
    return "\x1b[" in terminal.raw


def test_colours_only_where_they_are_wanted(cli: Cli) -> None:
    cli.run("run", "-q", "--", "true")
    with cli.terminal("list") as terminal:
        assert coloured(terminal)
    with cli.terminal("list", NO_COLOR="1") as terminal:
        assert not coloured(terminal)
    with cli.terminal("run", "--", "true", TERM="dumb") as terminal:
        assert not coloured(terminal)
    assert "\x1b" not in cli.run("list").stdout


def test_a_long_title_does_not_wrap_the_list(cli: Cli) -> None:
    cli.run("run", "-q", "--title", "long " * 60, "--", "true")
    with cli.terminal("list", "--limit", "1", "--text", "long", columns=60) as terminal:
        terminal.finish()
        assert all(len(line) <= 60 for line in terminal.screen.text())
        assert terminal.screen.text()[1].endswith("…")
