"""The parent of one process: starts it, reports on it, and ends its whole tree, on command or when the daemon dies.

Runs by path under `python -I -S` with the descriptor of a socket to the daemon (and that of its own compiled
text, or -1), and imports nothing but modules
that are built into the interpreter: what is imported here is paid for by every process of every execution.
The daemon imports the same file for `Tree` and what stands above it.

The daemon sends a frame (four bytes of length, then a marshalled `Order`), then lines: `cancel SECONDS`, `kill`,
`pause NUMBER`, `resume`. The shim answers with lines:

    started PID START SHIM    the work runs; START is its start time in clock ticks since boot, SHIM is who says this
    failed WHAT ERRNO         it does not; WHAT is "cwd", "program", "interpreter" or "shim"
    exit STATUS RUNG          the work itself has ended with this wait status
    paused NUMBER             all of the tree is stopped
    gone LEFTOVER RUNG LEFT   nothing is left of the tree, or LEFT processes that cannot be ended
    reaped PID STATUS         from the guardian: this process has ended after the shim was killed

End of file on the socket means that the daemon is dead: everything is killed at once, without grace. As a
subreaper the shim stays the ancestor of whatever the work starts, through double forks and new sessions, so
"no child left to wait for" is the proof that the tree is gone; /proc only tells whom to signal.

The process that the daemon starts forks, and the parent half stays as the guardian: a subreaper above the shim that
does nothing but wait for it. A shim that is killed leaves its tree to the guardian, which ends it, also when the
daemon was killed in the same instant. A shim whose guardian is killed ends its tree, and itself.

Without /proc and subreapers (macOS) there is no guardian, and the signals reach the work's process group only, while
the work itself lives.
"""

import errno
import marshal
import posix
import select
import sys
import time

TYPE_CHECKING = False
if TYPE_CHECKING:
    import signal as _signal
    from collections.abc import Iterable, Iterator, Mapping, Sequence
else:
    import _signal  # `signal` itself imports enum, which takes longer than all the rest of the start

MARKER = b"VESPERA_EXECUTION_ID="
"""In the environment of the work, with the id of its execution."""
SHIM_MARKER = b"VESPERA_SHIM_OF="
"""In the environment of a shim: it must outlive what carries `MARKER`."""

SETTLE_SECONDS = 0.05  # for what is about to end with the work by itself, such as the far end of a pipe
LEFTOVER_SECONDS = 0.5
GIVE_UP_SECONDS = 3.0

_PR_SET_NAME = 15
_PR_SET_CHILD_SUBREAPER = 36
_NONE, _SIGINT, _SIGTERM, _SIGKILL = range(4)
RUNGS = ("-", "sigint", "sigterm", "sigkill", "sweep")

Row = tuple[int, int, int, int, str]
"""Parent, group, session, start time in clock ticks, state letter (`z`: only the first thread has ended)."""
Order = tuple[list[bytes], dict[bytes, bytes], bytes, list[int], bytes]
"""argv, environment, working directory, descriptors for 0, 1, ... (-1: /dev/null), execution id."""


def look(pid: int) -> "Row | None":
    """What /proc says of `pid`, or None when there is no such process."""
    try:
        fd = posix.open(f"/proc/{pid}/stat", posix.O_RDONLY | posix.O_CLOEXEC)
    except OSError:
        return None
    try:
        data = posix.read(fd, 4096)
    except OSError:
        return None
    finally:
        posix.close(fd)
    fields = data[data.rindex(b")") + 2 :].split(None, 20)
    state = "z" if fields[0] == b"Z" and int(fields[17]) > 1 else chr(fields[0][0])
    return int(fields[1]), int(fields[2]), int(fields[3]), int(fields[19]), state


def table() -> "dict[int, Row]":
    """Every process that can be seen; empty where there is no /proc."""
    seen: dict[int, Row] = {}
    try:
        names = posix.listdir("/proc")
    except OSError:
        return seen
    for name in names:
        if name.isdigit():
            row = look(int(name))
            if row is not None:
                seen[int(name)] = row
    return seen


def descendants(seen: "Mapping[int, Row]", roots: "Iterable[int]", *, avoid: "Iterable[int]" = ()) -> "list[int]":
    """All below `roots` in `seen`, parents before children, without what is in or only below `avoid`."""
    children: dict[int, list[int]] = {}
    for pid, row in seen.items():
        children.setdefault(row[0], []).append(pid)
    found = list(roots)
    known = {*found, *avoid}  # also ends the walk if a reused pid has made a circle
    start = len(found)
    for pid in found:
        for child in children.get(pid, ()):
            if child not in known:
                known.add(child)
                found.append(child)
    return found[start:]


def strike(pid: int, start: int, number: int) -> bool:
    """Signal the process of that start time, never a later one of the same pid. False: gone, or not ours."""
    try:
        fd = posix.pidfd_open(pid)
    except OSError as error:
        if error.errno != errno.ENOSYS:  # a kernel before 5.3: the start time alone must do
            return False
        fd = -1
    try:
        row = look(pid)
        if row is None or row[3] != start:
            return False
        if fd < 0:
            posix.kill(pid, number)
        else:
            _signal.pidfd_send_signal(fd, number)
    except OSError:
        return False
    finally:
        if fd >= 0:
            posix.close(fd)
    return True


def marked(entries: "Iterable[bytes]") -> "Iterator[int]":
    """The processes of our uid whose environment holds one of `entries` (`NAME=value`), except this one."""
    wanted = frozenset(entries)
    mine, uid = posix.getpid(), posix.geteuid()
    try:
        names = posix.listdir("/proc")
    except OSError:
        return
    for name in names:
        if not name.isdigit() or int(name) == mine:
            continue
        if not wanted.isdisjoint(_environment(name)) and _owner(name) == uid:
            yield int(name)


def _environment(name: str) -> "list[bytes]":
    try:
        fd = posix.open(f"/proc/{name}/environ", posix.O_RDONLY | posix.O_CLOEXEC)
    except OSError:
        return []
    parts: list[bytes] = []
    try:
        while part := posix.read(fd, 65536):
            parts.append(part)
    except OSError:
        return []
    finally:
        posix.close(fd)
    data = b"".join(parts)
    return data.split(b"\0") if b"VESPERA_" in data else []


def _owner(name: str) -> int:
    try:
        return posix.stat(f"/proc/{name}").st_uid
    except OSError:
        return -1


class Tree:
    """Processes that one rule finds (`members`), stopped and ended together."""

    def __init__(self) -> None:
        self.ours: dict[int, int] = {}
        """Stopped by us: pid to start time."""
        self.out_of_reach: dict[int, int] = {}
        """There, but not ours to signal (another uid): pid to start time."""

    def members(self, seen: "Mapping[int, Row]") -> "list[int]":
        raise NotImplementedError

    def living(self, seen: "Mapping[int, Row]") -> "list[int]":
        """The members that are more than a zombie and within reach."""
        return [
            pid
            for pid in self.members(seen)
            if pid in seen and seen[pid][4] not in "ZX" and self.out_of_reach.get(pid) != seen[pid][3]
        ]

    def freeze(self) -> bool:
        """Stop all until a look finds nobody new. True when everything has really stopped.

        What is stopped already is left alone, so `thaw` does not wake it either.
        """
        noted: dict[int, int] = {}
        patience = 3
        seen = table()
        for _ in range(200):
            fresh = [pid for pid in self.living(seen) if noted.get(pid) != seen[pid][3]]
            if not fresh:
                # A parent that is not in the table died during the look: its children may have been missed.
                torn = any(row[0] and row[0] not in seen for row in seen.values())
                if not torn or not patience:
                    break
                patience -= 1
            for pid in fresh:
                self._stop(pid, seen[pid])
                noted[pid] = seen[pid][3]
            seen = table()
        return all(seen[pid][4] in "Ttz" for pid in self.living(seen))

    def _stop(self, pid: int, row: "Row") -> None:
        if row[4] in "Tt":
            return
        if strike(pid, row[3], _signal.SIGSTOP):
            self.ours[pid] = row[3]
        else:
            self._missed(pid, row[3])

    def nudge(self) -> None:
        """Let the children of what cannot stop run for a moment: after vfork it waits for a child that we stopped."""
        seen = table()
        waiting = {pid for pid in self.living(seen) if seen[pid][4] == "D"}
        for pid in descendants(seen, waiting):
            if seen[pid][0] in waiting and self.ours.pop(pid, None) == seen[pid][3]:
                strike(pid, seen[pid][3], _signal.SIGCONT)

    def thaw(self) -> None:
        """Let go on what `freeze` has stopped, children before parents, so that no parent sees a stopped child."""
        for pid, start in reversed(self.ours.items()):
            strike(pid, start, _signal.SIGCONT)
        self.ours.clear()

    def signal(self, *numbers: int) -> int:
        """How many got the signals."""
        seen = table()
        count = 0
        for pid in self.living(seen):
            got = [strike(pid, seen[pid][3], number) for number in numbers]
            count += any(got)
        return count

    def kill(self) -> int:
        """Freeze, then SIGKILL. How many were alive before."""
        self.freeze()
        return self.signal(_signal.SIGKILL)

    def _missed(self, pid: int, start: int) -> None:
        row = look(pid)
        if row is not None and row[3] == start and row[4] not in "ZX":
            self.out_of_reach[pid] = start


class _Below(Tree):
    """Everything below this process."""

    def members(self, seen: "Mapping[int, Row]") -> "list[int]":
        return descendants(seen, (posix.getpid(),))


class Marked(Tree):
    """Everything whose environment holds one of the entries, and what is below that; never this process."""

    def __init__(self, entries: "Iterable[bytes]", *, spared: "Iterable[int]" = ()) -> None:
        super().__init__()
        self.entries = frozenset(entries)
        self.spared = tuple(spared)
        """Roots whose trees belong to somebody who takes care of them."""

    def members(self, seen: "Mapping[int, Row]") -> "list[int]":
        safe = {*self.spared, *descendants(seen, self.spared)}
        roots = [pid for pid in marked(self.entries) if pid in seen and pid not in safe]
        return roots + descendants(seen, roots, avoid=(posix.getpid(), *safe))


def end(tree: Tree, *, seconds: float) -> int:
    """Kill the tree until none of it is left, for at most that long. How many processes were ended."""
    deadline = time.monotonic() + seconds
    ended = 0
    while tree.living(table()):
        ended = max(ended, tree.kill())
        if time.monotonic() > deadline:
            break
        time.sleep(0.002)  # a killed process is seen for another moment
    return ended


def become_subreaper() -> bool:
    """Whether orphans below this process are from now on its children."""
    return _prctl(_PR_SET_CHILD_SUBREAPER, 1)


def _prctl(option: int, value: "int | bytes") -> bool:
    try:
        import _ctypes  # `ctypes` takes five times as long to import
    except ImportError:
        return False
    library = getattr(_ctypes, "dlopen")(None, 0)  # noqa: B009 - the stubs do not list what `ctypes` builds on
    try:
        prctl = getattr(_ctypes, "dlsym")(library, "prctl")  # noqa: B009
    except OSError:
        return False
    return bool(getattr(_ctypes, "call_cdeclfunction")(prctl, (option, value, 0, 0, 0)) == 0)  # noqa: B009


class _Failed(Exception):
    def __init__(self, what: str, number: int) -> None:
        super().__init__(what, number)
        self.what = what
        self.number = number


def _start(order: Order) -> int:
    argv, env, cwd, fds, _ = order
    try:
        posix.chdir(cwd)
    except OSError as error:
        raise _Failed("cwd", error.errno or 0) from None
    actions = [(posix.POSIX_SPAWN_DUP2, fd, number) for number, fd in enumerate(fds) if fd >= 0]
    failure = _Failed("program", errno.ENOENT)
    for path in _candidates(argv[0], env.get(b"PATH", b"/usr/local/bin:/bin:/usr/bin")):
        try:
            return _spawn(path, argv, env, actions)
        except OSError as error:
            number = error.errno or 0
            if number == errno.ENOENT and posix.access(path, posix.F_OK):
                raise _Failed("interpreter", number) from None
            if number not in (errno.ENOENT, errno.EACCES, errno.ENOTDIR):  # these: perhaps further down the PATH
                raise _Failed("program", number) from None
            if number == errno.EACCES:
                failure = _Failed("program", number)
    raise failure


def _candidates(name: bytes, path: bytes) -> "list[bytes]":
    if b"/" in name:
        return [name]
    places = [(folder or b".") + b"/" + name for folder in path.split(b":")]
    return [place for place in places if posix.access(place, posix.F_OK)]


def _spawn(
    path: bytes, argv: "list[bytes]", env: "dict[bytes, bytes]", actions: "Sequence[tuple[int, int, int]]"
) -> int:
    default = [number for number in range(1, 32) if number not in (_signal.SIGKILL, _signal.SIGSTOP)]
    try:
        return posix.posix_spawn(
            path, argv, env, file_actions=actions, setsid=True, setsigmask=(), setsigdef=default
        )  # fmt: skip
    except NotImplementedError:
        return posix.posix_spawn(
            path, argv, env, file_actions=actions, setpgroup=0, setsigmask=(), setsigdef=default
        )  # fmt: skip


class Shim:
    """One process and its tree, until nothing of it is left."""

    def __init__(self, control: int, pid: int, execution_id: bytes, guardian: int) -> None:
        self.control = control
        self.guardian = guardian
        """A pipe that the guardian holds open, or -1."""
        self.pid = pid
        self.execution_id = execution_id
        self.tree = _Below()
        self.ended = False
        """The work itself has."""
        self.rung = _NONE
        """The highest that was used, on whatever is left."""
        self.tidying = False
        """The work has ended, and what it left is being ended."""
        self.leftover = 0
        self.pausing = False
        self.paused = False
        self.pause_number = 0
        self.alone = False
        """The daemon is dead."""
        self.told = False
        self.patience = GIVE_UP_SECONDS
        self.next: tuple[float, str] | None = None
        """When to do what: "sigterm", "settled" or "kill"."""
        self.kill_at = 0.0
        self.killing_since = 0.0

    def obey(self, line: bytes) -> None:
        now = time.monotonic()
        word, _, rest = line.partition(b" ")
        if word == b"kill":
            self.begin_killing(now)
        elif word == b"cancel":
            self.cancel(now, float(rest))
        elif word == b"pause" and not self.rung:
            self.pausing = True
            self.pause_number = int(rest)
        elif word == b"resume":
            self.wake()

    def wake(self) -> None:
        if self.pausing or self.paused:
            self.pausing = self.paused = False
            self.tree.thaw()

    def cancel(self, now: float, grace: float) -> None:
        kill_at = now + grace
        if self.ended or self.rung:  # what is under way already ends no later than this request asks
            self.kill_at = min(self.kill_at or kill_at, kill_at)
            if self.next and self.next[1] != "sigterm":
                self.next = min(self.next[0], self.kill_at), self.next[1]
            elif self.next:
                self.next = min(self.next[0], now + grace * 2 / 3), "sigterm"
            return
        self.rung = _SIGINT
        self.kill_at = kill_at
        self.next = now + grace * 2 / 3, "sigterm"
        self.signal_group(_signal.SIGINT)
        self.wake()

    def signal_group(self, *numbers: int) -> None:
        if self.ended:
            return  # the number of the group may be somebody else's by now
        for number in numbers:
            try:
                posix.killpg(self.pid, number)
            except OSError:
                return

    def begin_killing(self, now: float) -> None:
        if self.killing_since:
            return
        self.rung = _SIGKILL
        self.pausing = False
        self.killing_since = now
        self.next = now, "kill"

    def reap(self) -> bool:
        """Whether no child is left, which says that no descendant is."""
        while True:
            try:
                pid, status = posix.waitpid(-1, posix.WNOHANG)
            except ChildProcessError:
                return True
            if pid == 0:
                return False
            if pid == self.pid:
                self.ended = True
                _tell(self.control, f"exit {status} {RUNGS[self.rung]}")

    def step(self, now: float) -> None:
        """Do what is due, for as long as there are descendants."""
        if self.ended and not self.tidying and not self.killing_since:
            self.tidying = True
            self.wake()
            settled = now + SETTLE_SECONDS
            self.next = (min(settled, self.kill_at) if self.rung else settled), "settled"
        if self.pausing:
            self.paused = True
            if self.tree.freeze():
                self.pausing = False
                _tell(self.control, f"paused {self.pause_number}")
            else:
                self.tree.nudge()
        if self.next is None or now < self.next[0]:
            return
        what = self.next[1]
        if what == "sigterm":
            self.rung = _SIGTERM
            self.wake()
            # CONT first: a stopped process takes no SIGTERM.
            self.signal_group(_signal.SIGCONT, _signal.SIGTERM)
            self.next = self.kill_at, "kill"
        elif what == "settled":
            self.end_leftover(now)
        else:
            self.begin_killing(now)
            self.kill(now)

    def end_leftover(self, now: float) -> None:
        """Ask what has outlived the work to end, for a moment."""
        self.leftover = max(self.leftover, self.tree.signal(_signal.SIGCONT, _signal.SIGTERM))
        until = now + LEFTOVER_SECONDS
        if self.rung:
            self.rung = _SIGTERM
            until = min(until, self.kill_at)
        self.next = until, "kill"

    def kill(self, now: float) -> None:
        alive = self.tree.kill()
        if self.ended:
            self.leftover = max(self.leftover, alive)
        if not self.ended and not alive:
            self.signal_group(_signal.SIGKILL)  # where there is no /proc
        self.next = now + (0.01 if now - self.killing_since < 1 else 0.2), "kill"
        if now - self.killing_since > self.patience or (not alive and self.tree.out_of_reach):
            self.tell(left=max(1, alive + len(self.tree.out_of_reach)))

    def tell(self, *, left: int) -> None:
        """Say the end once. With `left` above 0 the shim goes on trying, but nobody needs to wait for it."""
        if not self.told:
            self.told = True
            if not self.ended:
                _tell(self.control, f"exit {int(_signal.SIGKILL)} {RUNGS[_SIGKILL]}")
            _tell(self.control, f"gone {self.leftover} {RUNGS[self.rung]} {left}")

    def run(self, pending: bytes) -> None:
        wakeup = _wake_on_child()
        poll = select.poll()
        poll.register(wakeup, select.POLLIN)
        poll.register(self.control, select.POLLIN)
        if self.guardian >= 0:
            poll.register(self.guardian, select.POLLIN)
        while True:
            *lines, pending = pending.split(b"\n")
            for line in lines:
                self.obey(line)
            if self.reap():
                break
            self.step(time.monotonic())
            for fd, _ in poll.poll(self._timeout()):
                if fd == wakeup:
                    posix.read(wakeup, 4096)
                elif fd == self.guardian:
                    poll.unregister(fd)
                    self.begin_killing(time.monotonic())
                elif data := _receive(self.control):
                    pending += data
                else:
                    poll.unregister(self.control)
                    self.alone = True
                    self.begin_killing(time.monotonic())
        self.tell(left=0)
        if self.alone:
            end(Marked([MARKER + self.execution_id]), seconds=1.0)

    def _timeout(self) -> "float | None":
        if self.pausing:
            return 3
        return None if self.next is None else max(0.0, self.next[0] - time.monotonic()) * 1000 + 0.5


def _wake_on_child() -> int:
    reader, writer = posix.pipe()
    for fd in (reader, writer):
        posix.set_inheritable(fd, False)
        posix.set_blocking(fd, False)
    _signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    _signal.signal(_signal.SIGCHLD, lambda number, frame: None)
    _signal.siginterrupt(_signal.SIGCHLD, False)
    return reader


def _receive(control: int) -> bytes:
    try:
        return posix.read(control, 65536)
    except OSError:
        return b""


def _read_order(control: int) -> "tuple[Order, bytes] | None":
    """The order and what came after it, or None when the daemon has died before it was complete."""
    data = b""
    size = 4
    while len(data) < size:
        part = _receive(control)
        if not part:
            return None
        data += part
        if size == 4 and len(data) >= 4:
            size += int.from_bytes(data[:4], "big")
    return marshal.loads(data[4:size]), data[size:]


def _split() -> "tuple[int, int]":
    """Fork. The guardian gets the shim's pid; the shim gets 0 and a pipe that is at its end when the guardian dies."""
    reader, writer = posix.pipe()
    pid = posix.fork()
    if pid:
        posix.close(reader)
        _prctl(_PR_SET_NAME, b"vespera-guard")
        return pid, writer
    posix.close(writer)
    posix.setsid()  # a signal to the group of one spares the other
    become_subreaper()  # a fork does not inherit it
    _prctl(_PR_SET_NAME, b"vespera-shim")
    return 0, reader


def _guard(control: int, shim: int) -> int:
    """Wait for the shim; if it was killed, end the tree that is ours then. The exit code: 0 when it was not."""
    _, ended = posix.waitpid(shim, 0)
    if not ended:
        return 0
    deadline = time.monotonic() + GIVE_UP_SECONDS
    while time.monotonic() < deadline:
        end(_Below(), seconds=max(0.0, deadline - time.monotonic()))
        try:
            while True:
                pid, status = posix.waitpid(-1, posix.WNOHANG)
                if pid == 0:
                    break
                _tell(control, f"reaped {pid} {status}")
        except ChildProcessError:
            break
    return 1


def _tell(control: int, text: str) -> None:
    try:
        posix.write(control, text.encode() + b"\n")
    except OSError:
        return  # the daemon is dead, which the end of file tells as well


def main(control: int, image: int) -> int:
    """The exit code: 0 unless the shim was killed."""
    for number in (_signal.SIGINT, _signal.SIGTERM, _signal.SIGHUP, _signal.SIGQUIT):
        _signal.signal(number, _signal.SIG_IGN)  # only the daemon, or its death, ends a shim
    posix.set_inheritable(control, False)
    if image >= 0:
        posix.close(image)
    received = _read_order(control)
    if received is None:
        return 0
    order, pending = received
    streams = [fd for fd in order[3] if fd > 2]
    guardian = -1
    if become_subreaper():
        shim_pid, guardian = _split()
        if shim_pid:
            for fd in streams:
                posix.close(fd)  # never a holder of the work's output
            return _guard(control, shim_pid)
    for fd in streams:
        posix.set_inheritable(fd, False)
    try:
        pid = _start(order)
    except _Failed as failure:
        _tell(control, f"failed {failure.what} {failure.number}")
        return 0
    for fd in streams:
        posix.close(fd)
    posix.chdir("/")
    shim = Shim(control, pid, order[4], guardian)
    row = look(pid)
    _tell(control, f"started {pid} {row[3] if row else 0} {posix.getpid()}")
    shim.run(pending)
    return 0


if __name__ == "__main__":
    posix._exit(main(int(sys.argv[1]), int(sys.argv[2])))  # pyright: ignore[reportPrivateUsage] - nothing to tidy up
