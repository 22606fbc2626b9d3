"""Where a plan as a whole goes: on, nowhere while it is paused, back to a checkpoint, or to an early end."""

from __future__ import annotations

from vespera_exec.engine.done import Done


class Course:
    """What all parts of a coordinator go by. Each fact is changed by the one method that says so."""

    def __init__(self) -> None:
        self._is_open = False
        self._is_paused = False
        self._goes_back = False
        self._aborted: str | None = None
        self._epoch = 0
        self.opened = Done()
        """Set once the coordinator knows where its steps stand, or has ended."""
        self.arrived = Done()
        """Set when the last way back to a checkpoint has come to its end."""

    @property
    def is_open(self) -> bool:
        """It is known where the steps stand, and that may change yet."""
        return self._is_open

    @property
    def is_paused(self) -> bool:
        return self._is_paused

    @property
    def goes_back(self) -> bool:
        """It is on its way to a checkpoint."""
        return self._goes_back

    @property
    def aborted(self) -> str | None:
        """Why the plan is ended before its steps have."""
        return self._aborted

    @property
    def epoch(self) -> int:
        """Counts the times when everything was put back or ended; what was begun in another does not count."""
        return self._epoch

    @property
    def is_held(self) -> bool:
        """No step begins."""
        return self._is_paused or self._goes_back or self._aborted is not None

    def open(self) -> None:
        self._is_open = True
        self.opened.set()

    def close(self) -> None:
        """Nothing can change where the steps stand from here on."""
        self._is_open = False

    def end(self) -> None:
        """Whoever waits for it to open, or to arrive, waits no more."""
        self._is_open = False
        self.opened.set()
        self.arrived.set()

    def pause(self) -> None:
        self._is_paused = True

    def resume(self) -> None:
        self._is_paused = False

    def abort(self, reason: str) -> None:
        """It ends, and why; what was said first counts."""
        self._aborted = self._aborted or reason

    def turn(self) -> int:
        """Begin another epoch, which is returned."""
        self._epoch += 1
        return self._epoch

    def set_out(self) -> int:
        """It goes back, until `arrive`; returns the epoch of the way."""
        self._goes_back, self.arrived = True, Done()
        return self.turn()

    def arrive(self) -> None:
        """The way back has come to its end, wherever that is; what was begun on it does not count."""
        self._goes_back = False
        self.turn()
        self.arrived.set()
