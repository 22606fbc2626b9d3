"""Outputs: kept in order, capped in the middle, masked, readable while they grow and after a crash."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import anyio
import pytest
from deadlines import WITHIN
from hypothesis import given, settings
from hypothesis import strategies as st

from vespera_exec.errors import InvalidInput
from vespera_exec.store.output import MASK, Output, OutputFiles, SecretMask, read_output

LIMIT = 1_000_000


def make(data_dir: Path, limit: int = LIMIT, mask: tuple[bytes, ...] = ()) -> Output:
    return OutputFiles(data_dir, limit_bytes=limit, mask=mask).create("run")


def text(data_dir: Path, stream: str = "combined") -> str:
    return read_output(data_dir, "run", stream=stream, limit=10_000_000).text


def all_pages(data_dir: Path, limit: int, stream: str = "combined") -> tuple[str, int]:
    """The text of all pages, and how many there were."""
    pieces: list[str] = []
    offset = 0
    while True:
        page = read_output(data_dir, "run", stream=stream, offset=offset, limit=limit)
        assert page.offset >= offset
        pieces.append(page.text)
        if page.next_offset >= page.end:
            return "".join(pieces), len(pieces)
        assert page.next_offset > offset
        offset = page.next_offset


def test_both_streams_are_kept_in_order_and_can_be_told_apart(data_dir: Path) -> None:
    output = make(data_dir)
    output.write("stdout", b"one\n")
    output.write("stderr", b"oh\n")
    output.write("stdout", b"two\n")
    output.close()
    assert text(data_dir) == "one\noh\ntwo\n"
    assert text(data_dir, "stdout") == "one\ntwo\n"
    assert text(data_dir, "stderr") == "oh\n"


class Gap(threading.Event):
    """Says that nobody closes, and hands that on only when somebody has closed, and woken the thread, meanwhile."""

    def __init__(self, wake: threading.Event) -> None:
        super().__init__()
        self._wake = wake
        self.reached = threading.Event()

    def wait(self, timeout: float | None = None) -> bool:
        if super().wait(timeout):
            return True
        self._wake.clear()
        self.reached.set()
        assert self._wake.wait(WITHIN)
        return False


async def test_closing_ends_the_thread_also_where_it_has_just_looked_whether_to_end(
    data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with anyio.fail_after(WITHIN):
        async with OutputFiles.open(data_dir, limit_bytes=LIMIT) as files:
            gap = Gap(files._wake)  # pyright: ignore[reportPrivateUsage]
            monkeypatch.setattr(files, "_closing", gap)
            files.create("run").write("stdout", b"its end")
            assert await anyio.to_thread.run_sync(gap.reached.wait, WITHIN)
    assert text(data_dir) == "its end"


def test_nothing_written_reads_as_nothing(data_dir: Path) -> None:
    make(data_dir).close()
    page = read_output(data_dir, "run")
    assert (page.text, page.total, page.end, page.dropped) == ("", 0, 0, 0)


def test_the_files_are_ours_alone(data_dir: Path) -> None:
    output = make(data_dir)
    output.write("stdout", b"x")
    output.close()
    for folder, _, names in os.walk(data_dir / "outputs"):
        assert stat.S_IMODE(Path(folder).stat().st_mode) & 0o077 == 0
        for name in names:
            assert stat.S_IMODE((Path(folder) / name).stat().st_mode) == 0o600


def test_beyond_the_limit_head_and_tail_are_kept_and_the_loss_is_stated(data_dir: Path) -> None:
    output = make(data_dir, limit=16_000)
    lines = [f"line {number:06}\n".encode() for number in range(10_000)]
    for line in lines:
        output.write("stdout", line)
        output.flush()
    output.close()
    whole = b"".join(lines).decode()
    first = read_output(data_dir, "run", limit=100_000)
    assert whole.startswith(first.text)
    assert first.total == len(whole)
    last = read_output(data_dir, "run", offset=first.next_offset, limit=100_000)
    assert last.offset == first.next_offset + first.dropped
    assert whole.endswith(last.text)
    assert whole[last.offset :] == last.text
    assert len(first.text) + len(last.text) + first.dropped == len(whole)
    assert len(first.text) > 3000
    assert len(last.text) > 3000
    kept = sum(each.stat().st_size for each in (data_dir / "outputs" / "run").iterdir())
    assert kept <= 16_000 + 16 * 64
    tail = read_output(data_dir, "run", limit=50, tail=True)
    assert tail.text == whole[-50:]
    assert tail.offset == len(whole) - 50


# A "v" may be the beginning of a token: it is kept back, and what the other stream says comes before it.
NOT_V = st.characters(codec="utf-8", exclude_characters="v")


@settings(max_examples=60, deadline=None)
@given(
    chunks=st.lists(st.tuples(st.sampled_from(["stdout", "stderr"]), st.text(NOT_V, max_size=40)), max_size=30),
    page=st.integers(4, 50),
    limit=st.sampled_from([2000, 100_000]),
    flushes=st.sets(st.integers(0, 30)),
)
def test_pages_join_to_what_was_kept_whole_characters_only(
    chunks: list[tuple[str, str]], page: int, limit: int, flushes: set[int]
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        data_dir = Path(folder)
        output = make(data_dir, limit=limit)
        for number, (stream, piece) in enumerate(chunks):
            output.write(stream, piece.encode(errors="replace"))
            if number in flushes:
                output.flush()
        output.close()
        for stream in ("combined", "stdout", "stderr"):
            written = "".join(piece for name, piece in chunks if stream in ("combined", name))
            written = written.encode(errors="replace").decode()
            seen = read_output(data_dir, "run", stream=stream)
            assert seen.total == len(written.encode())
            if not seen.dropped:
                assert all_pages(data_dir, page, stream)[0] == written


def test_a_character_that_has_not_come_whole_waits(data_dir: Path) -> None:
    output = make(data_dir)
    snowman = "☃".encode()
    output.write("stdout", b"a" + snowman[:2])
    output.flush()
    page = read_output(data_dir, "run")
    assert (page.text, page.next_offset, page.end, page.total) == ("a", 1, 1, 3)
    output.write("stdout", snowman[2:])
    output.close()
    assert read_output(data_dir, "run", offset=1).text == "☃"


def test_bytes_that_are_no_text_are_shown_as_such(data_dir: Path) -> None:
    output = make(data_dir)
    output.write("stdout", b"a\xff\xfeb\xe2\x98")
    output.close()
    page = read_output(data_dir, "run")
    assert page.text == "a\ufffd\ufffdb\ufffd"
    assert page.next_offset == page.end == page.total == 6


@pytest.mark.promise("masked")
@given(
    secrets=st.lists(st.binary(min_size=1, max_size=6).filter(lambda each: b"*" not in each), min_size=1, max_size=4),
    pieces=st.lists(st.one_of(st.binary(max_size=8), st.integers(0, 3)), max_size=12),
    cuts=st.lists(st.integers(0, 60), max_size=8),
)
def test_no_secret_is_ever_shown_however_it_is_cut(
    secrets: list[bytes], pieces: list[bytes | int], cuts: list[int]
) -> None:
    data = b"".join(secrets[each % len(secrets)] if isinstance(each, int) else each for each in pieces)
    mask = SecretMask(secrets)
    places = sorted({min(cut, len(data)) for cut in cuts})
    shown = b"".join(mask.feed(data[begin:end]) for begin, end in zip([0, *places], [*places, len(data)], strict=True))
    shown += mask.rest()
    for secret in secrets:
        assert secret not in shown
    if not any(secret in data for secret in secrets):
        assert shown == data


@pytest.mark.promise("masked")
def test_what_looks_like_a_named_token_is_masked_however_it_is_cut() -> None:
    token = b"vsp_0123456789ab_" + b"c0ffee42" * 5
    data = b"vsp_ " + token + b"v" + token[:-1] + b" vsp"
    for cut in range(len(data) + 1):
        for second in (cut, min(cut + 7, len(data))):
            mask = SecretMask([b"hunter2"])
            pieces = (data[:cut], data[cut:second], data[second:])
            shown = b"".join(map(mask.feed, pieces)) + mask.rest()
            assert shown == b"vsp_ ***v" + token[:-1] + b" vsp"
    assert SecretMask([]).whole(data) == b"vsp_ ***v" + token[:-1] + b" vsp"


def test_what_cannot_be_a_secret_is_shown_at_once(data_dir: Path) -> None:
    mask = SecretMask([b"hunter2"])
    assert mask.feed(b"my password is hun") == b"my password is "
    assert mask.feed(b"ter2!") == MASK + b"!"
    assert mask.feed(b"hunting") == b"hunting"
    output = make(data_dir, mask=(b"hunter2",))
    for each in (b"hun", b"ter", b"2", b" hunter2\nhunter"):
        output.write("stdout", each)
        output.flush()
    output.close()
    assert text(data_dir) == "*** ***\nhunter"


async def test_a_reader_sees_what_was_written_a_moment_ago(data_dir: Path) -> None:
    async with OutputFiles.open(data_dir, limit_bytes=LIMIT) as files:
        output = files.create("run")
        output.write("stdout", b"hello")
        with anyio.fail_after(WITHIN):
            while text(data_dir) != "hello":  # noqa: ASYNC110 - as a reader of the files does
                await anyio.sleep(0.005)
        output.write("stderr", b", world")
        with anyio.fail_after(WITHIN):
            while text(data_dir) != "hello, world":  # noqa: ASYNC110
                await anyio.sleep(0.005)
        output.close()


async def test_closing_the_store_closes_what_is_open(data_dir: Path) -> None:
    descriptors = len(os.listdir("/proc/self/fd"))
    async with OutputFiles.open(data_dir, limit_bytes=LIMIT, mask=[b"token"]) as files:
        output = files.create("run")
        output.write("stdout", b"the token, the last words")
    assert text(data_dir) == "the ***, the last words"
    assert len(os.listdir("/proc/self/fd")) == descriptors
    output.write("stdout", b"too late")
    output.close()
    assert text(data_dir) == "the ***, the last words"


async def test_a_chatty_child_costs_few_files_and_few_writes(data_dir: Path) -> None:
    async with OutputFiles.open(data_dir, limit_bytes=LIMIT) as files:
        output = files.create("run")
        for number in range(5000):
            output.write("stdout", f"{number}\n".encode())
        output.close()
    assert text(data_dir).splitlines() == [str(number) for number in range(5000)]
    (segment,) = (data_dir / "outputs" / "run").iterdir()
    assert segment.stat().st_size < 5000 * 5 + 1000


def test_what_a_dead_writer_had_flushed_is_read_and_continued(data_dir: Path) -> None:
    program = (
        "import os, signal, sys; from pathlib import Path; from vespera_exec.store.output import OutputFiles\n"
        "output = OutputFiles(Path(sys.argv[1]), limit_bytes=100000).create('run')\n"
        "output.write('stdout', b'before the end'); output.flush(); output.write('stdout', b'unflushed')\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    ended = subprocess.run([sys.executable, "-c", program, str(data_dir)], check=False)
    assert ended.returncode == -signal.SIGKILL
    page = read_output(data_dir, "run")
    assert (page.text, page.next_offset, page.dropped) == ("before the end", page.end, 0)
    output = make(data_dir)
    output.write("stderr", b", and after")
    output.close()
    assert text(data_dir) == "before the end, and after"
    assert text(data_dir, "stderr") == ", and after"


def test_a_disk_that_refuses_drops_output_and_harms_nobody(data_dir: Path) -> None:
    (data_dir / "outputs").write_text("in the way")
    output = make(data_dir, limit=16_000)
    output.write("stdout", b"x" * 500)
    output.flush()
    (data_dir / "outputs").unlink()
    output.write("stdout", b"y" * 2000)
    output.close()
    page = read_output(data_dir, "run")
    assert page.dropped > 0
    assert page.total == 2500
    assert set(page.text) == {"y"}
    assert page.offset == page.dropped


@pytest.mark.parametrize("bad", ["", "..", "a/b", "../etc", "x" * 200, "a\x00b"])
def test_an_id_never_leads_out_of_the_outputs(data_dir: Path, bad: str) -> None:
    with pytest.raises(InvalidInput):
        read_output(data_dir, bad)
    with pytest.raises(InvalidInput):
        OutputFiles(data_dir, limit_bytes=LIMIT).create(bad)


def test_an_unknown_stream_and_negative_numbers_are_refused(data_dir: Path) -> None:
    for wrong in ({"stream": "stdin"}, {"offset": -1}, {"limit": -1}):
        with pytest.raises(InvalidInput):
            read_output(data_dir, "run", **wrong)  # pyright: ignore[reportArgumentType]
