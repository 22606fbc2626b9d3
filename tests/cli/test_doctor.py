"""`doctor` finds what is wrong and says what to do, with a daemon and without one, and is quiet where all is well."""

from __future__ import annotations

import fcntl
import json
import os
import sqlite3
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from vespera_exec.app import doctor
from vespera_exec.store.lock import OwnerLock, locked_by

if TYPE_CHECKING:
    from cli_harness import Cli


def checked(cli: Cli, **environ: str) -> tuple[int, dict[str, dict[str, Any]]]:
    """The exit code, and of each name the check that is worst."""
    done = cli.run("doctor", "--json", **environ)
    order = ["ok", "warning", "error"]
    said = sorted(json.loads(done.stdout)["checks"], key=lambda each: order.index(each["level"]))
    return done.returncode, {each["name"]: each for each in said}


def test_nothing_is_wrong_before_the_first_start_with_a_daemon_and_after_it(fresh: Cli) -> None:
    code, before = checked(fresh)
    assert (code, {each["level"] for each in before.values()}) == (0, {"ok"})
    assert not fresh.data_dir.exists()
    pid = fresh.json("daemon", "start")["daemon"]["pid"]
    code, beside = checked(fresh)
    assert (code, {each["level"] for each in beside.values()}) == (0, {"ok"})
    assert f"process {pid} (daemon" in beside["lock"]["what"]
    assert {"version", "database", "roles", "token", "sqlite", "disk", "file system", "sockets"} <= beside.keys()
    assert fresh.json("daemon", "status")["daemon"]["pid"] == pid
    fresh.stop()
    code, after = checked(fresh)
    assert (code, {each["level"] for each in after.values()}) == (0, {"ok"})
    assert f"process {pid} " in after["lock"]["what"]
    assert "is gone" in after["lock"]["what"]


def test_each_trouble_is_found_and_comes_with_advice(fresh: Cli, tmp_path: Path) -> None:
    fresh.run("daemon", "start")
    fresh.stop()
    (fresh.data_dir / "token").chmod(0o644)
    fresh.data_dir.chmod(0o755)
    roles = Path(fresh.environ["VESPERA_ROLES_DIR"])
    roles.mkdir(mode=0o700)
    (roles / "broken.yaml").write_text("name: [\n")
    code, found = checked(fresh)
    wrong = {name: each for name, each in found.items() if each["level"] != "ok"}
    assert code == 1
    assert wrong.keys() == {"token", "data directory", "roles"}
    assert all(each["hint"] for each in wrong.values())
    assert "broken.yaml" in wrong["roles"]["what"]
    code, found = checked(fresh, VESPERA_MAX_CONCURRENT="many", VESPERA_RUNTIME_DIR="/proc/nowhere")
    assert (code, found["settings"]["level"], found["sockets"]["level"]) == (1, "error", "error")
    told = fresh.run("doctor").stdout
    assert "chmod 700" in told
    assert "error" in told


def test_a_damaged_database_is_found_without_a_daemon(fresh: Cli) -> None:
    fresh.run("daemon", "start")
    fresh.stop()
    (fresh.data_dir / "vespera.db").write_bytes(b"These are the notes of a person.\n" * 300)
    code, found = checked(fresh)
    assert (code, found["database"]["level"]) == (1, "error")
    assert found["database"]["hint"]


def test_a_log_that_was_changed_is_found_beside_the_daemon(fresh: Cli) -> None:
    fresh.run("run", "--", "true")
    fresh.stop()
    connection = sqlite3.connect(fresh.data_dir / "vespera.db")
    connection.execute("UPDATE events SET checksum = checksum + 1 WHERE cursor = 3")
    connection.commit()
    connection.close()
    fresh.run("daemon", "start")
    code, found = checked(fresh)
    assert (code, found["database"]["level"]) == (1, "error")
    assert "event 3 does not match its checksum" in found["database"]["what"]


@pytest.mark.full
def test_who_holds_the_directory_is_named(fresh: Cli) -> None:
    with OwnerLock.acquire(fresh.data_dir, purpose="library"):
        code, found = checked(fresh)
        assert code == 1
        assert f"process {os.getpid()} (library" in found["lock"]["what"]
        assert "close the `Vespera.open`" in found["lock"]["hint"]
    (fresh.data_dir / "owner.lock").write_text("")
    with (fresh.data_dir / "owner.lock").open("r+") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert locked_by(fresh.data_dir) == [os.getpid()]
        code, found = checked(fresh)
        assert (code, found["lock"]["level"]) == (1, "error")
        assert f"locked by process {os.getpid()}, which is none of ours" in found["lock"]["what"]


def test_another_version_is_a_warning_and_the_same_is_not() -> None:
    assert doctor.version_of_daemon("0.0.1", 5).level == "warning"
    assert "daemon stop" in doctor.version_of_daemon("99.0", 5).hint


def test_files_of_another_user_are_named(data_dir: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can give a file away")
    (data_dir / "vespera.db").write_text("")
    os.chown(data_dir / "vespera.db", 4321, 4321)
    found = {each.name: each for each in doctor.surroundings(data_dir, {})}
    assert found["data directory"].level == "error"
    assert "vespera.db" in found["data directory"].what
    assert "chown" in found["data directory"].hint


def test_files_that_come_and_go_meanwhile_trouble_nobody(data_dir: Path) -> None:
    program = (
        "import os\nwhile True:\n for n in range(50): os.close(os.open(f'{n}-wal', os.O_CREAT, 0o600))\n"
        " for n in range(50): os.unlink(f'{n}-wal')"
    )
    with subprocess.Popen([sys.executable, "-S", "-c", program], cwd=data_dir) as coming_and_going:
        try:
            while not any(data_dir.iterdir()):
                assert coming_and_going.poll() is None
            for _ in range(300):
                folder = {check.name: check.level for check in doctor.surroundings(data_dir, {})}
                assert folder["data directory"] in ("ok", "warning")
        finally:
            coming_and_going.kill()


def test_a_folder_in_the_place_of_the_database_is_named(fresh: Cli) -> None:
    (fresh.data_dir / "vespera.db").mkdir(mode=0o700, parents=True)
    code, found = checked(fresh)
    assert code == 1
    assert "is a folder, not a database" in found["database"]["what"]


def test_a_wal_without_its_database_is_found(fresh: Cli) -> None:
    fresh.data_dir.mkdir(mode=0o700)
    (fresh.data_dir / "vespera.db-wal").write_bytes(b"the last commits")
    code, found = checked(fresh)
    assert code == 1
    assert "vespera.db is missing or empty" in found["database"]["what"]
    assert "restore" in found["database"]["hint"]


def test_a_read_only_file_system_is_not_a_matter_of_permissions() -> None:
    mounts = [line.split() for line in Path("/proc/self/mountinfo").read_text().splitlines()]
    folders = [Path(fields[4]) for fields in mounts if "ro" in fields[5].split(",")]
    folder = next((each for each in folders if each.is_dir()), None)
    if folder is None:
        pytest.skip("nothing is mounted read-only here")
    found = {each.name: each for each in doctor.surroundings(folder, {})}
    assert found["data directory"].level == "error"
    assert "read-only file system" in found["data directory"].what
    assert "chmod" not in found["data directory"].hint
