"""An owner of a data directory that starts runs which ask, and answers them, until it is killed.

`python answering_owner.py HOME PLACE TURN ANSWERS`. It says on stdout what it has started and what was acknowledged,
and kills itself right after the last of ANSWERS acknowledgements, so that none has a moment to reach the disk late.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import anyio

from vespera_exec.app.service import Vespera
from vespera_exec.app.views import Execute, InputAnswer
from vespera_exec.model.principal import Caller
from vespera_exec.settings import Settings

ME = Caller(cwd="/", env={"PATH": os.environ["PATH"]})


def told(line: str) -> None:
    """One write, so that the reader sees a whole line or none."""
    os.write(1, f"{line}\n".encode())


async def main(home: str, place: str, turn: str, answers: str) -> None:
    settings = Settings.load({"HOME": home}, data_dir=Path(place, "data"), roles_dir=Path(place, "roles"))
    left, number = int(answers), 0
    async with Vespera.open(settings=settings, purpose="daemon") as vespera:
        told("open")
        for each in range(3):
            handle = await vespera.execute_task(ME, Execute(title=f"Run {turn}-{each}", role="asker"))
            told(f"started {handle.run_id}")
        while True:
            for waiting in (await vespera.list_inputs(ME, limit=50)).inputs:
                number += 1
                said = f"{turn}-{number}"
                answer = {waiting.input.key: InputAnswer(action="accept", content={"said": said})}
                if (await vespera.answer_input(ME, waiting.run_id, answer)).success:
                    told(f"answered {waiting.run_id} {waiting.input.key} {said}")
                    left -= 1
                if not left:
                    os.kill(os.getpid(), signal.SIGKILL)
            await anyio.sleep(0.01)


if __name__ == "__main__":
    anyio.run(main, sys.argv[1], sys.argv[2], sys.argv[3], sys.argv[4])
