"""The installed program against a real daemon: what is typed, what comes back, and with which exit code."""

from __future__ import annotations

import json
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from cli_harness import PROGRAM, Cli, marked, until
from deadlines import WITHIN

ERROR_LINE = r"vespera-exec: .+ \([A-Z_]+\)(; .+)?\n"


def test_run_passes_the_works_output_through_and_exits_with_its_status(cli: Cli) -> None:
    done = cli.run("run", "--", "sh", "-c", "printf 'out\\033[31m'; echo err >&2; exit 7")
    assert done.returncode == 7
    assert done.stdout == "out\x1b[31m"
    assert "err\n" in done.stderr
    assert "failed" in done.stderr.splitlines()[-1]
    assert "(EXIT_NONZERO)" in done.stderr.splitlines()[-1]


def test_run_shows_progress_as_lines_where_there_is_no_terminal(cli: Cli) -> None:
    done = cli.run("run", "--", "sh", "-c", "echo '[ 50%] half'; echo '[100%] all'")
    assert done.returncode == 0
    assert "running" in done.stderr
    assert done.stderr.splitlines()[-1].startswith("vespera-exec: completed in ")
    assert "\x1b" not in done.stderr


def test_quiet_leaves_only_the_works_own_output(cli: Cli) -> None:
    done = cli.run("run", "--quiet", "--", "sh", "-c", "echo out; exit 3")
    assert (done.returncode, done.stdout, done.stderr) == (3, "out\n", "")


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["run", "-q", "--", "sh", "-c", "kill -9 $$"], 137),
        (["run", "-q", "--", "no-such-program-anywhere"], 127),
        (["run", "-q", "--timeout", "0.3", "--", "sleep", "60"], 124),
    ],
)
def test_other_ends_have_the_exit_codes_of_a_shell(cli: Cli, arguments: list[str], code: int) -> None:
    assert cli.run(*arguments).returncode == code


def test_a_command_runs_where_the_caller_stands_with_its_path(cli: Cli) -> None:
    done = cli.run("run", "-q", "--", "sh", "-c", "pwd; echo $VIRTUAL_ENV", VIRTUAL_ENV="/some/venv")
    assert done.stdout == f"{cli.cwd}\n/some/venv\n"


def test_a_role_gets_its_inputs_and_its_result_is_printed(cli: Cli) -> None:
    (cli.cwd / "tree").mkdir(exist_ok=True)
    (cli.cwd / "tree" / "a.py").write_text("x = 1\n", encoding="utf-8")
    done = cli.run("run", "--role", "survey", "--input", "path=tree", "--input", "max_files=10", "Survey", "it")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["files"] == 1
    assert cli.json("list", "--role", "survey", "--limit", "1")["tasks"][0]["title"] == "Survey it"


def test_json_puts_one_document_on_stdout_and_the_output_on_stderr(cli: Cli) -> None:
    done = cli.run("run", "--json", "--", "sh", "-c", "echo out; exit 5")
    document = json.loads(done.stdout)
    assert (done.returncode, document["exit_code"], document["returncode"]) == (5, 5, 5)
    assert document["status"] == "failed"
    assert done.stderr == "out\n"


def test_detach_prints_the_ids_and_leaves(cli: Cli) -> None:
    done = cli.run("run", "--detach", "--", "true")
    names = [line.split()[0] for line in done.stdout.splitlines()]
    assert names == ["task", "session"]
    task_id = done.stdout.split()[1]
    until(lambda: cli.status(task_id) == "completed", "the detached run ends")


def test_the_same_key_starts_nothing_twice(cli: Cli) -> None:
    command = ["run", "-q", "--key", "only-once", "--", "sh", "-c", "echo ran >> ran; echo shown"]
    first, second = cli.run(*command), cli.run(*command)
    assert (first.stdout, second.stdout) == ("shown\n", "shown\n")
    assert (cli.cwd / "ran").read_text() == "ran\n"


def test_an_attempt_that_is_retried_is_followed_to_the_last(cli: Cli) -> None:
    roles = Path(cli.environ["VESPERA_ROLES_DIR"])
    roles.mkdir(exist_ok=True)
    (roles / "flaky.yaml").write_text(
        "name: flaky\ndescription: Fails once\nrunner: process\n"
        'argv: [sh, -c, "echo attempt; test -e tried || (touch tried; false)"]\n'
        "inputs:\n  cwd: {type: path}\n"
        "retry: {max_retries: 2, retry_on: [EXIT_NONZERO], backoff_seconds: 0.1}\n",
        encoding="utf-8",
    )
    cli.stop()  # role files are read when the daemon starts
    assert cli.json("roles")["problems"] == []
    done = cli.run("run", "-q", "--role", "flaky", "--input", f"cwd={cli.cwd}", "Try twice")
    assert (done.returncode, done.stdout) == (0, "attempt\nattempt\n")


def test_following_the_logs_goes_on_to_the_next_attempt(cli: Cli) -> None:
    roles = Path(cli.environ["VESPERA_ROLES_DIR"])
    roles.mkdir(exist_ok=True)
    (roles / "again.yaml").write_text(
        "name: again\ndescription: Fails once\nrunner: process\n"
        'argv: [sh, -c, "echo attempt; until test -e go-on; do sleep 0.02; done; '
        'test -e tried-again || (touch tried-again; false)"]\n'
        "retry: {max_retries: 1, retry_on: [EXIT_NONZERO], backoff_seconds: 0.5}\n"
        "inputs:\n  cwd: {type: path}\n",
        encoding="utf-8",
    )
    cli.stop()
    task_id = cli.task("--role", "again", "--input", f"cwd={cli.cwd}")
    following = cli.start("logs", "-f", "--json", task_id)
    assert following.stdout is not None
    assert json.loads(following.stdout.readline())["text"] == "attempt\n"
    (cli.cwd / "go-on").touch()
    rest, _ = following.communicate(timeout=WITHIN)
    assert "".join(json.loads(line)["text"] for line in rest.splitlines()) == "attempt\n"


def test_a_broken_role_file_is_named_beside_the_roles(fresh: Cli) -> None:
    roles = Path(fresh.environ["VESPERA_ROLES_DIR"])
    roles.mkdir()
    (roles / "broken.yaml").write_text("name: [", encoding="utf-8")
    done = fresh.run("roles")
    assert done.returncode == 0
    assert "survey" in done.stdout
    assert "broken.yaml:" in done.stderr


def test_output_beyond_the_limit_is_counted_and_said(fresh: Cli) -> None:
    fresh.environ["VESPERA_OUTPUT_LIMIT_BYTES"] = "20000"
    done = fresh.run("run", "--", "seq", "1", "60000")
    assert done.returncode == 0
    assert "bytes of stdout were not kept (size limit)" in done.stderr
    assert done.stdout.endswith("60000\n")


def test_a_closed_pipe_ends_quietly_and_cancels_what_fed_it(cli: Cli) -> None:
    script = f"{PROGRAM} run -q -- yes | head -n 2"
    done = subprocess.run(
        ["sh", "-c", script], env=cli.environ, cwd=cli.cwd, capture_output=True, text=True, timeout=WITHIN
    )
    assert (done.stdout, done.stderr) == ("y\ny\n", "")
    assert cli.json("list", "--text", "yes", "--limit", "1")["tasks"][0]["execution_status"] in (
        "cancelling",
        "cancelled",
    )
    listed = subprocess.run(
        ["sh", "-c", f"{PROGRAM} list --all | head -n 1"],
        env=cli.environ,
        capture_output=True,
        text=True,
        timeout=WITHIN,
    )
    assert listed.stdout.startswith("TASK")
    assert listed.stderr == ""


def test_streams_that_are_closed_from_the_start_hurt_nothing(cli: Cli) -> None:
    for script in (f"{PROGRAM} list >&-", f"{PROGRAM} list 2>&-", f"{PROGRAM} run -- true >&- 2>&- <&-"):
        done = subprocess.run(["sh", "-c", script], env=cli.environ, cwd=cli.cwd, capture_output=True, timeout=WITHIN)
        assert done.returncode == 0, done.stderr


def test_status_shows_where_it_stands_and_takes_a_short_id(cli: Cli) -> None:
    task_id = cli.task("--title", "A sleeper", "--", "sleep", "60")
    until(lambda: cli.status(task_id) == "running", "it runs")
    shown = cli.run("status", task_id[:8], "--detail").stdout
    assert shown.splitlines()[0] == "A sleeper"
    assert task_id in shown
    assert "running" in shown
    assert "initialization" in shown
    cli.run("cancel", task_id)
    assert "cancelled" in cli.run("status", task_id).stdout


def test_cancel_waits_until_it_is_gone_and_a_second_one_is_refused(cli: Cli) -> None:
    task_id = cli.task("--", "sh", "-c", "sleep 61 & sleep 62")
    session = cli.json("status", task_id)["session_id"]
    until(lambda: len(marked(f"VESPERA_EXECUTION_ID={session}")) >= 2, "its processes run")
    done = cli.run("cancel", task_id, "--reason", "a test")
    assert done.returncode == 0
    assert done.stdout.startswith("cancelled")
    assert marked(f"VESPERA_EXECUTION_ID={session}") == []
    again = cli.run("cancel", task_id)
    assert again.returncode == 125
    assert "it has ended (cancelled) (NOT_CANCELLED)" in again.stderr
    refused = cli.run("cancel", task_id, "--json")
    assert (refused.returncode, json.loads(refused.stdout)["success"]) == (125, False)


def test_events_come_in_order_and_can_be_followed_to_the_end(cli: Cli) -> None:
    task_id = cli.task("--", "sh", "-c", "sleep 0.5; echo done")
    followed = cli.run("events", task_id, "--follow", "--json")
    events = [json.loads(line) for line in followed.stdout.splitlines()]
    cursors = [event["cursor"] for event in events]
    assert cursors == sorted(set(cursors))
    assert "execution_completed" in [event["type"] for event in events]
    page = cli.json("events", task_id, "--cursor", str(cursors[2]), "--limit", "3")
    assert [event["cursor"] for event in page["events"]] == cursors[3:6]
    assert "there may be more; --cursor" in cli.run("events", task_id, "--limit", "2").stderr
    plain = cli.run("events", task_id).stdout.splitlines()
    assert len(plain) == len(events)
    assert "pending → preparing" in "\n".join(plain)


def test_logs_give_the_output_whole_or_as_it_comes(cli: Cli) -> None:
    task_id = cli.task("--", "sh", "-c", "echo one; echo two >&2; sleep 0.4; echo three")
    followed = cli.run("logs", "-f", task_id)
    assert followed.stdout == "one\ntwo\nthree\n"
    assert cli.run("logs", task_id, "--stream", "stderr").stdout == "two\n"
    assert cli.json("logs", task_id, "--stream", "stdout")["text"] == "one\nthree\n"


def test_long_output_arrives_whole_and_in_order(cli: Cli) -> None:
    task_id = cli.task("--", "seq", "1", "60000")
    until(lambda: cli.status(task_id) == "completed", "it ends")
    expected = "".join(f"{number}\n" for number in range(1, 60001))
    # Compared beforehand: to explain how two such texts differ takes minutes.
    same = [
        cli.run(*words).stdout == expected for words in (["logs", task_id], ["run", "-q", "--", "seq", "1", "60000"])
    ]
    assert same == [True, True]


def test_result_is_printed_once_it_is_there(cli: Cli) -> None:
    task_id = cli.task("--", "sleep", "60")
    early = cli.run("result", task_id)
    assert early.returncode == 125
    assert "(NOT_DONE)" in early.stderr
    assert cli.json("result", task_id)["done"] is False
    cli.run("cancel", task_id)
    survey = cli.task("--role", "survey", "--input", f"path={cli.cwd}")
    until(lambda: cli.status(survey) == "completed", "it ends")
    assert "languages" in json.loads(cli.run("result", survey).stdout)
    assert "cancelled: " in cli.run("result", task_id).stderr


def test_watching_ends_with_the_run(cli: Cli) -> None:
    task_id = cli.task("--", "sleep", "0.5")
    shown = cli.run("status", task_id, "--watch")
    assert "completed" in shown.stdout
    task_id = cli.task("--", "sleep", "0.5")
    views = [json.loads(line) for line in cli.run("status", task_id, "--watch", "--json").stdout.splitlines()]
    assert views[-1]["done"] is True
    assert views[-1]["status"] == "completed"


def test_list_filters_and_pages(cli: Cli) -> None:
    for number in range(3):
        cli.run("run", "-q", "--title", f"paged {number}", "--", "true")
    first = cli.json("list", "--text", "paged", "--limit", "2")
    rest = cli.json("list", "--text", "paged", "--limit", "2", "--page", first["next_page"])
    titles = [task["title"] for task in first["tasks"] + rest["tasks"]]
    assert titles == ["paged 2", "paged 1", "paged 0"]
    assert len(cli.json("list", "--text", "paged", "--all")["tasks"]) == 3
    assert cli.json("list", "--text", "nothing has this title")["tasks"] == []
    assert "more with --page" in cli.run("list", "--limit", "1").stdout


def test_roles_and_their_inputs_are_shown(cli: Cli) -> None:
    shown = cli.run("roles").stdout
    assert "survey" in shown
    assert "argv*" in shown
    assert {"command", "survey"} <= {role["name"] for role in cli.json("roles")["roles"]}


def test_the_token_stays_private_unless_it_is_asked_for(cli: Cli) -> None:
    path = Path(cli.run("token").stdout.strip())
    assert path == cli.data_dir / "token"
    assert path.stat().st_mode & 0o077 == 0
    assert cli.run("token", "--show").stdout.strip() == path.read_text().strip()
    assert "token" not in cli.json("token")


def test_a_configuration_by_url_leads_to_the_running_daemon(cli: Cli) -> None:
    made = cli.json("mcp-config", "--client", "vscode", "--http")["servers"]["vespera-exec"]
    assert made["url"] == cli.json("daemon", "status")["daemon"]["url"].rstrip("/") + "/mcp"
    assert made["headers"]["Authorization"] == f"Bearer {(cli.data_dir / 'token').read_text().strip()}"
    shown = cli.run("mcp-config", "--client", "generic")
    assert json.loads(shown.stdout)["mcpServers"]["vespera-exec"]["command"] == PROGRAM
    assert "this belongs into" in shown.stderr


def test_status_of_the_daemon_starts_none_and_stop_ends_it(fresh: Cli) -> None:
    down = fresh.run("daemon", "status")
    assert (down.returncode, down.stdout) == (3, f"not running: {fresh.data_dir}\n")
    assert fresh.run("daemon", "status", "--json").returncode == 3
    assert not fresh.data_dir.exists()
    pid = fresh.json("daemon", "start")["daemon"]["pid"]
    assert fresh.json("daemon", "status")["daemon"]["pid"] == pid
    assert fresh.json("daemon", "stop")["stopped"] is True
    assert fresh.run("daemon", "status").returncode == 3
    assert fresh.json("daemon", "stop") == {"stopped": False, "daemon": None, "data_dir": str(fresh.data_dir)}


def test_a_daemon_at_work_is_not_stopped_by_accident(fresh: Cli) -> None:
    task_id = fresh.task("--", "sleep", "60")
    until(lambda: fresh.status(task_id) == "running", "it runs")
    refused = fresh.run("daemon", "stop")
    assert refused.returncode == 125
    assert "(DAEMON_BUSY)" in refused.stderr
    assert fresh.status(task_id) == "running"
    assert fresh.run("daemon", "stop", "--now").returncode == 0


def test_run_outlives_the_death_of_the_daemon_and_says_what_became_of_the_work(fresh: Cli) -> None:
    running = fresh.start("run", "--", "sh", "-c", "echo begun; sleep 60")
    assert running.stdout is not None
    assert running.stdout.readline() == "begun\n"
    pid = fresh.json("daemon", "status")["daemon"]["pid"]
    subprocess.run(["kill", "-9", str(pid)], check=True)
    _, said = running.communicate(timeout=WITHIN)
    assert running.returncode == 125
    assert "(INTERRUPTED)" in said
    assert fresh.json("daemon", "status")["daemon"]["pid"] != pid


def test_a_kill_of_the_program_leaves_the_work_alone(cli: Cli) -> None:
    running = cli.start("run", "--title", "left alone", "--", "sh", "-c", "echo begun; sleep 60")
    assert running.stdout is not None
    assert running.stdout.readline() == "begun\n"
    running.send_signal(signal.SIGKILL)
    running.communicate(timeout=WITHIN)
    task_id = cli.json("list", "--text", "left alone")["tasks"][0]["task_id"]
    assert cli.status(task_id) == "running"
    cli.run("cancel", task_id)


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["status", "no-such-task"], "TASK_NOT_FOUND"),
        (["status", "a/b"], "INVALID_INPUT"),
        (["status", ""], "INVALID_INPUT"),
        (["status", "\x1b[2J" * 30], "INVALID_INPUT"),
        (["run", "--role", "no-such-role", "x"], "ROLE_NOT_FOUND"),
        (["run", "--role", "survey", "--input", "max_files=many", "x"], "INVALID_INPUT"),
        (["run", "--role", "survey", "--input", "nonsense", "x"], "INVALID_INPUT"),
        (["run", "--role", "survey", "x", "--", "ls"], "INVALID_INPUT"),
        (["run", "--role", "survey", "--title", "a\x1bb"], "INVALID_INPUT"),
        (["run", "--role", "survey", "--title", "a" * 100_000], "INVALID_INPUT"),
        (["run", "ls"], "INVALID_INPUT"),
        (["run"], "INVALID_INPUT"),
        (["run", "--"], "INVALID_INPUT"),
        (["run", "--timeout", "-1", "--", "ls"], "INVALID_INPUT"),
        (["run", "--timeout", "nan", "--", "ls"], "INVALID_INPUT"),
        (["run", "--", "ls", "\udcff"], "INVALID_INPUT"),
        (["list", "--status", "odd"], "INVALID_INPUT"),
        (["list", "--page", "odd"], "INVALID_INPUT"),
        (["logs", "no-such-task"], "TASK_NOT_FOUND"),
        (["demo", "/no/such/folder"], "INVALID_INPUT"),
        (["demo", __file__], "INVALID_INPUT"),
    ],
)
def test_what_is_refused_says_so_in_one_line_with_exit_code_125(cli: Cli, arguments: list[str], code: str) -> None:
    done = cli.run(*arguments)
    assert done.returncode == 125, done.stderr
    assert done.stderr.count("\n") == 1
    assert f" ({code})" in done.stderr
    assert done.stderr.startswith("vespera-exec: ")
    assert "\x1b" not in done.stderr


@pytest.mark.parametrize(
    "arguments", [["status"], ["no-such-command"], ["list", "--limit", "0"], ["run", "--nonsense", "--", "ls"]]
)
def test_a_misuse_says_so_in_one_line_with_exit_code_2(cli: Cli, arguments: list[str]) -> None:
    done = cli.run(*arguments)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "(USAGE)" in done.stderr
    assert "--help" in done.stderr


@pytest.fixture
def newer(fresh: Cli) -> Cli:
    """A data directory that a later version has written."""
    fresh.run("daemon", "start")
    fresh.stop()
    connection = sqlite3.connect(fresh.data_dir / "vespera.db")
    connection.execute("PRAGMA user_version = 9999")
    connection.close()
    return fresh


def test_a_data_directory_of_a_newer_version_is_refused_with_the_daemons_own_reason(newer: Cli) -> None:
    done = newer.run("list")
    assert done.returncode == 125
    assert done.stderr.count("\n") == 1
    assert "(STORE_TOO_NEW); upgrade vespera-exec" in done.stderr


def test_the_data_directory_can_be_named_for_one_command(fresh: Cli, tmp_path: Path) -> None:
    done = fresh.run("--data-dir", str(tmp_path / "other"), "daemon", "status")
    assert done.stdout == f"not running: {tmp_path / 'other'}\n"


def test_a_current_folder_that_is_gone_is_named(cli: Cli) -> None:
    script = f"mkdir gone && cd gone && rmdir ../gone && {PROGRAM} list"
    done = subprocess.run(
        ["sh", "-c", script], env=cli.environ, cwd=cli.cwd, capture_output=True, text=True, timeout=WITHIN
    )
    assert (done.returncode, "the current folder is gone" in done.stderr) == (125, True)


def test_a_group_without_a_command_shows_what_there_is(cli: Cli) -> None:
    done = cli.run("daemon")
    assert done.returncode == 2
    assert "stop" in done.stderr


def test_places_that_cannot_be_used_are_named(fresh: Cli, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("")
    given: list[tuple[dict[str, Any], str]] = [
        ({"VESPERA_DATA_DIR": str(file)}, "STORE_UNAVAILABLE"),
        ({"VESPERA_DATA_DIR": "/proc/nowhere"}, "STORE_UNAVAILABLE"),
        ({"VESPERA_RUNTIME_DIR": "/proc/nowhere"}, "DAEMON_UNAVAILABLE"),
        ({"VESPERA_MAX_CONCURRENT": "many"}, "INVALID_INPUT"),
    ]
    for environ, code in given:
        done = fresh.run("list", **environ)
        assert done.returncode == 125, environ
        assert done.stderr.count("\n") == 1
        assert f"({code})" in done.stderr


def test_a_command_that_asks_loads_no_heavy_library(cli: Cli) -> None:
    task_id = cli.task("--", "true")
    script = (
        "import sys; from vespera_exec.cli.entry import main\n"
        "sys.argv = ['vespera-exec', 'status', sys.argv[1]]; main()\n"
        "heavy = {'mcp', 'pydantic', 'uvicorn', 'starlette', 'rich', 'asyncio', 'anyio'}\n"
        "loaded = heavy & set(sys.modules); sys.exit(f'loaded: {loaded}' if loaded else 0)"
    )
    command = [sys.executable, "-c", script, task_id]
    done = subprocess.run(command, env=cli.environ, cwd=cli.cwd, capture_output=True, text=True, timeout=WITHIN)
    assert done.returncode == 0, done.stderr
    assert task_id in done.stdout
