"""What was acknowledged is there after a kill at any moment, and after a power loss that tears what came later."""

from __future__ import annotations

import random
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import anyio
import pytest
from stored import opened

from vespera_exec.model.task import Task
from vespera_exec.store.damage import examine

SECTOR = 512


def stored_sequences(database: Path) -> dict[str, int]:
    """The last number of each log, none of which has a gap."""
    with closing(sqlite3.connect(database)) as db:
        found = db.execute(
            "SELECT s.name, max(e.sequence), count(*) FROM log e JOIN streams s ON s.id = e.stream GROUP BY s.name"
        ).fetchall()
    assert all(last == count for _, last, count in found)
    return {name: last for name, last, _ in found}


def torn(wal: bytes, safe: int, draw: random.Random) -> bytes:
    """A WAL whose bytes after `safe` came to the disk in part, some sectors not or not yet right."""
    tail = bytearray(wal[safe : draw.randint(safe, len(wal))])
    for begin in range(0, len(tail), SECTOR):
        match draw.randrange(4):
            case 0:
                tail[begin : begin + SECTOR] = bytes(len(tail[begin : begin + SECTOR]))
            case 1:
                tail[begin : begin + SECTOR] = draw.randbytes(len(tail[begin : begin + SECTOR]))
            case _:
                pass
    return wal[:safe] + bytes(tail)


@pytest.mark.promise("power_loss")
@pytest.mark.parametrize("losses", [pytest.param(25, id="25"), pytest.param(400, id="400", marks=pytest.mark.full)])
async def test_a_power_loss_takes_nothing_that_was_acknowledged(data_dir: Path, tmp_path: Path, losses: int) -> None:
    draw = random.Random(7)
    acked: list[tuple[int, int]] = []
    async with opened(data_dir) as store:
        session = Task(title="torn", sink=store.journal).start_execution("role")
        for step in range(60):
            session.update_progress(float(step), message="x" * draw.randrange(2000))
            head = await store.journal.sync()
            acked.append((head, (data_dir / "vespera.db-wal").stat().st_size))
        # Another process copies: one that closes the file in ours would take SQLite's locks with it.
        await anyio.run_process(["cp", "-r", str(data_dir), str(tmp_path / "cut off")])
    cut_off = tmp_path / "cut off"
    wal = (cut_off / "vespera.db-wal").read_bytes()
    main = (cut_off / "vespera.db").read_bytes()
    assert acked == sorted(acked)
    database = tmp_path / "after" / "vespera.db"
    database.parent.mkdir(mode=0o700)
    for _ in range(losses):
        head, safe = draw.choice(acked)
        database.write_bytes(main)
        database.with_name("vespera.db-wal").write_bytes(torn(wal, safe, draw))
        database.with_name("vespera.db-shm").unlink(missing_ok=True)
        async with opened(database.parent) as store:
            assert store.journal.head >= head
        assert {each.severity for each in examine(database)} == {"ok"}


@pytest.mark.promise("acknowledged")
@pytest.mark.full
@pytest.mark.timeout(600)
def test_nothing_acknowledged_is_lost_at_200_points_of_death(data_dir: Path) -> None:
    program = Path(__file__).with_name("acking_writer.py")
    database = data_dir / "vespera.db"
    draw = random.Random(200)
    acked: dict[str, int] = {}
    for _ in range(200):
        with subprocess.Popen([sys.executable, str(program), str(database)], stdout=subprocess.PIPE) as child:
            assert child.stdout is not None
            lines = [child.stdout.readline() for _ in range(draw.randrange(1, 300))]
            child.kill()
            for line in [*lines, *child.stdout.read().splitlines(keepends=True)]:
                if line.endswith(b"\n"):
                    session, sequence, _ = line.split()
                    acked[session.decode()] = int(sequence)
        stored = stored_sequences(database)
        assert {name: stored.get(name, 0) for name in acked if stored.get(name, 0) < acked[name]} == {}
    assert len(acked) >= 200
    assert {each.severity for each in examine(database)} == {"ok"}
