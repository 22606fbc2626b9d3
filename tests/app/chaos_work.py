"""What the steps of the chaotic plans do, in the loop of their owner or, run as a program, in a process of their own.

`python chaos_work.py PLACE`, or `Begun`. All that they do is appended to `PLACE/log`, a line of JSON each. Locks, which
the system takes back at every kind of death, tell what must never be: that two runs of one step are at work ("twice"),
a step beside one that it needs ("early"), or more of a capacity held than there is ("exceeded").

Standard library only.
"""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
import time
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any

POOLS = {"gpu": 2, "cpu": 3}
Job = dict[str, Any]
"""`plan`, `step`, `needs`, `seconds`, `acts` ("works", "fails", "fails_once", "hangs"), `asks`, `holds`, `child`."""


class Failing(Exception):
    """The step is to fail now."""


class Begun:
    """One call of the work of a step, from its first line to its last."""

    def __init__(self, place: Path, job: Job, session: str, attempt: int) -> None:
        self._place = place
        self._job = job
        self._who = {"plan": job["plan"], "step": job["step"], "session": session, "attempt": attempt}
        self._locks: list[int] = []
        self.say("begin")
        if job["plan"] != "any":  # whose results are kept: several may do it at once
            self._check_alone()

    def say(self, what: str) -> None:
        line = json.dumps({"what": what, "at": time.time(), **self._who}) + "\n"
        log = os.open(self._place / "log", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        os.write(log, line.encode())
        os.close(log)

    def check(self) -> None:
        """
        Raises:
            Failing: it is to fail, always or this one time.
        """
        first = self._place / "failed" / f"{self._job['plan']}.{self._job['step']}"
        fails = self._job["acts"] == "fails"
        if self._job["acts"] == "fails_once":
            with suppress(FileExistsError):
                first.touch(exist_ok=False)
                fails = True
        if fails:
            self.say("fail")
            raise Failing

    def release(self) -> None:
        while self._locks:
            os.close(self._locks.pop())

    def _check_alone(self) -> None:
        plan, needs = self._job["plan"], self._job["needs"]
        if not self._locked(f"{plan}.{self._job['step']}", fcntl.LOCK_EX):
            self.say("twice")
        if not all(self._locked(f"{plan}.{each}", fcntl.LOCK_SH) for each in needs):
            self.say("early")
        for pool, amount in self._job["holds"].items():
            free = (unit for unit in range(POOLS[pool]) if self._locked(f"{pool}-{unit}", fcntl.LOCK_EX))
            if len(list(islice(free, amount))) < amount:
                self.say("exceeded")

    def _locked(self, name: str, how: int) -> bool:
        lock = os.open(self._place / "locks" / name, os.O_RDWR | os.O_CREAT)
        try:
            fcntl.flock(lock, how | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
            return False
        self._locks.append(lock)
        return True


def main(place: Path) -> None:
    task = json.loads(Path(os.environ["VESPERA_TASK_FILE"]).read_text())
    job: Job = task["inputs"]["job"]
    reports = os.fdopen(int(os.environ["VESPERA_PROGRESS_FD"]), "w", buffering=1)
    begun = Begun(place, job, task["execution_id"], task["attempt"])
    child = subprocess.Popen(["sleep", "300"], start_new_session=True) if job["child"] else None
    if job["asks"]:
        answer = task["answers"].get("go")
        if answer is None:
            begun.say("ask")
            reports.write(json.dumps({"ask": {"key": "go", "kind": "form", "message": "Go on?"}}) + "\n")
            return
        if answer["action"] != "accept":
            begun.say("declined")
            sys.exit(4)
    reports.write(json.dumps({"progress": 50}) + "\n")
    time.sleep(300 if job["acts"] == "hangs" else job["seconds"])
    try:
        begun.check()
    except Failing:
        sys.exit(3)
    if child is not None:
        child.kill()
    begun.say("end")
    reports.write(json.dumps({"result": job["step"]}) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
