"""The usage of an execution's processes, measured while there are some, and kept where there is time."""

from __future__ import annotations

import logging
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol

from vespera_exec.store.writer import Sample as StoredSample

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Mapping, Sequence
    from datetime import datetime

    from vespera_exec.model.enums import ResourceType
    from vespera_exec.model.session import ExecutionSession

_log = logging.getLogger(__name__)


class Watch(Protocol):
    def stop(self) -> object:
        """Measure a last time and let go."""
        ...


class Sampler(Protocol):
    """Measures the processes below `roots()` and says what it found."""

    def watch(self, key: str, roots: Callable[[], tuple[int, ...]], on_sample: Callable[[Sample], None]) -> Watch: ...


class Sample(Protocol):
    @property
    def at(self) -> datetime: ...

    @property
    def values(self) -> Mapping[ResourceType, float]: ...


class Measuring:
    """Has a sampler measure what runs; None measures nothing. `keep` takes the samples, and may drop them."""

    def __init__(self, sampler: Sampler | None, keep: Callable[[Sequence[StoredSample]], None]) -> None:
        self._sampler = sampler
        self._keep = keep

    @contextmanager
    def __call__(self, session: ExecutionSession, roots: Callable[[], tuple[int, ...]]) -> Generator[None]:
        """Within the block the processes below `roots()`, which are those of `session`, are measured."""
        if self._sampler is None:
            yield
            return

        def keep(sample: Sample) -> None:
            for kind, value in sample.values.items():
                session.record_resource_usage(kind, value)
            at, values = sample.at, sample.values.items()
            self._keep([StoredSample(session.session_id, at, kind.value, value) for kind, value in values])

        watch: Watch | None = None
        # The boundary to the measurements, which are droppable: the work goes on without.
        try:
            watch = self._sampler.watch(session.session_id, roots, keep)
        except Exception:  # noqa: BLE001
            _log.exception("The usage of %s is not measured", session.session_id)
        try:
            yield
        finally:
            try:
                if watch is not None:
                    watch.stop()
            except Exception:  # noqa: BLE001
                _log.exception("The last usage of %s was not measured", session.session_id)
