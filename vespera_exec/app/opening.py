"""The composition root: takes the lock, opens the store, wires engine, monitoring and roles together."""

from __future__ import annotations

import logging
import os
import shutil
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal, cast

import anyio

from roles.registry import RoleRegistry
from vespera_exec import paths
from vespera_exec.app.access import Access
from vespera_exec.app.capacity.file import configured_pools
from vespera_exec.app.owning import check_unserved, taken_by_daemon
from vespera_exec.app.plugins import strategies
from vespera_exec.app.recovery import Recovery
from vespera_exec.app.service import Vespera
from vespera_exec.app.starting import Starter
from vespera_exec.app.tasks import LiveTasks
from vespera_exec.app.tokens import default_token
from vespera_exec.app.trust import derived_key, made_here
from vespera_exec.engine.capacity.pools import CapacityPools
from vespera_exec.engine.engine import Engine, EngineOptions
from vespera_exec.engine.plans.checkpoints import CheckpointReader
from vespera_exec.engine.proctree import become_subreaper, sweep
from vespera_exec.errors import DaemonUnavailable
from vespera_exec.model.clock import SYSTEM_CLOCK
from vespera_exec.monitoring.sampler import UsageSampler
from vespera_exec.settings import Settings
from vespera_exec.store.lock import OwnerLock
from vespera_exec.store.owners import recorded
from vespera_exec.store.store import Store

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Sequence

    from roles.definition import Role
    from vespera_exec.engine.jobs import Job

Purpose = Literal["daemon", "in-process", "library"]
_log = logging.getLogger(__name__)


@asynccontextmanager
async def opened(
    path: str | Path | None = None,
    *,
    settings: Settings | None = None,
    purpose: Purpose = "library",
    roles: Sequence[Role] = (),
) -> AsyncGenerator[Vespera]:
    """`Vespera.open`. Leaving the context ends what runs; the next owner says so in its record.

    `roles` are there before what the last owner left goes on.
    """
    try:
        async with _owned(path, settings, purpose, roles) as vespera:
            yield vespera
    except BaseExceptionGroup as group:
        # The caller's own error, as the caller raised it: the task groups in between are our business.
        raise _alone(group) from None


@asynccontextmanager
async def _owned(
    path: str | Path | None, settings: Settings | None, purpose: Purpose, own_roles: Sequence[Role]
) -> AsyncGenerator[Vespera]:
    settings = settings or Settings.load()
    if path is not None:
        settings = replace(settings, data_dir=_folder(path))
    pools = CapacityPools(configured_pools(settings.capacity))
    with _taken(settings.data_dir, purpose) as lock:
        owner = lock.owner.id
        # A daemon has no children but its own shims; an embedding program may have others.
        adopts = purpose == "daemon" and become_subreaper()
        trusted = made_here(settings.data_dir, os.environ)
        token = default_token(settings.data_dir)
        scratch = settings.data_dir / paths.SCRATCH
        shutil.rmtree(scratch, ignore_errors=True)  # nothing runs yet: what is there was left
        async with Store.open(settings, mask=[token.encode()]) as store, recorded(store.journal, lock.owner) as owners:
            unfinished = await store.queries.unfinished()
            dead = [each.lifecycle.execution_id for each in unfinished]
            left = await anyio.to_thread.run_sync(sweep, dead) if dead else 0
            if left:
                _log.warning("Ended %d processes that a dead owner had left", left)
            roles = RoleRegistry.load(settings.roles_dir)
            for role in own_roles:
                roles.add(role)
            tasks = LiveTasks(store, settings, SYSTEM_CLOCK)

            def let_go(job: Job) -> None:
                tasks.release(job.task)

            async with UsageSampler(interval_seconds=settings.sample_seconds or 1.0) as sampler:
                engine = Engine(
                    store.journal,
                    owner=owner,
                    scratch_root=scratch,
                    open_output=store.open_output,
                    sampler=sampler if settings.sample_seconds else None,
                    on_done=let_go,
                    capacity=pools,
                    strategies=strategies(),
                    checkpoints=CheckpointReader(store),
                    options=EngineOptions(
                        max_concurrent=settings.max_concurrent,
                        result_limit_bytes=settings.result_limit_bytes,
                        read_interval=settings.progress_interval_ms / 1000,
                        secrets=(token.encode(),),
                        adopts_orphans=adopts,
                    ),
                )
                starter = Starter(store=store, tasks=tasks, roles=roles, settings=settings, owner=owner, pools=pools)
                access = Access(store.journal, directory=derived_key(settings.data_dir, "tokens").hex())
                vespera = Vespera(
                    settings=settings,
                    store=store,
                    engine=engine,
                    roles=roles,
                    tasks=tasks,
                    starter=starter,
                    access=access,
                    owners=owners,
                )
                recovery = Recovery(
                    tasks=tasks,
                    roles=roles,
                    starter=starter,
                    engine=engine,
                    owner=owner,
                    plans=vespera.plans.jobs,
                    trusted=trusted,
                    cancelled=store.cancels.noted(),
                )
                async with engine.running(), store.upkeep.running(), access.running(), vespera.executions.running():
                    await recovery.take_over(unfinished)
                    await store.journal.sync()
                    store.cancels.clear()
                    yield vespera


def _taken(data_dir: Path, purpose: Purpose) -> OwnerLock:
    if purpose == "daemon":
        return taken_by_daemon(data_dir, os.environ)
    with suppress(DaemonUnavailable):  # without a folder for sockets there is no daemon to meet
        check_unserved(data_dir, os.environ)
    return OwnerLock.acquire(data_dir, purpose=purpose)


def _folder(path: str | Path) -> Path:
    return Path(path).expanduser().resolve()


def _alone(group: BaseExceptionGroup[BaseException]) -> BaseException:
    if len(group.exceptions) != 1:
        return group
    only = group.exceptions[0]
    return _alone(cast("BaseExceptionGroup[BaseException]", only)) if isinstance(only, BaseExceptionGroup) else only
