"""A real daemon over a directory of chaotic plans, and what is done to them by REST on its socket."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anyio
import httpx
from chaos_plans import CAPACITY
from deadlines import WITHIN

from vespera_exec import paths

if TYPE_CHECKING:
    from collections.abc import Generator, Mapping
    from random import Random

Json = dict[str, Any]


class Daemons:
    """One after the other, over `place / "data"`."""

    def __init__(self, place: Path) -> None:
        self.runtime_dir = Path(tempfile.mkdtemp(prefix="vx-", dir="/tmp"))
        self._data_dir = place / "data"
        self._environ = os.environ | {
            "VESPERA_DATA_DIR": str(self._data_dir),
            "VESPERA_RUNTIME_DIR": str(self.runtime_dir),
            "VESPERA_ROLES_DIR": str(place / "roles"),
            "VESPERA_CAPACITY": CAPACITY,
            "VESPERA_TCP": "0",
            "VESPERA_SAMPLE_SECONDS": "0",
        }

    @contextmanager
    def serving(self) -> Generator[httpx.AsyncClient]:
        """A client of a daemon that is killed when this is left."""
        argv = [sys.executable, "-P", "-m", "vespera_exec.server.daemon", "--data-dir", str(self._data_dir)]
        daemon = subprocess.Popen(argv, env=self._environ, stderr=subprocess.PIPE)
        _, path = paths.socket_paths(self._data_dir, self._environ)
        transport = httpx.AsyncHTTPTransport(uds=str(path))
        try:
            yield httpx.AsyncClient(transport=transport, base_url="http://vespera", timeout=WITHIN)
        finally:
            daemon.kill()
            daemon.communicate()

    def close(self) -> None:
        shutil.rmtree(self.runtime_dir, ignore_errors=True)


async def started(http: httpx.AsyncClient, plans: list[Json]) -> dict[str, str]:
    """Their tasks by name, once the daemon answers; what is known already is not started again."""
    with anyio.fail_after(WITHIN):
        while True:
            try:
                await http.get("/healthz")
                break
            except httpx.TransportError:
                await anyio.sleep(0.02)
    tasks: dict[str, str] = {}
    for plan in plans:
        answer = await http.post("/plans", json={"plan": plan, "idempotency_key": plan["name"]})
        assert answer.status_code in (200, 202), answer.text
        tasks[plan["name"]] = answer.json()["task_id"]
    return tasks


async def perform(http: httpx.AsyncClient, task_id: str, act: Mapping[str, Any]) -> Json:
    """What is answered, as `chaos_acts.perform` tells it."""
    task = f"/tasks/{task_id}"
    match act["do"]:
        case "cancel" | "pause" | "resume":
            answer = await http.post(f"{task}/{act['do']}", json={})
        case "checkpoint":
            answer = await http.post(f"{task}/checkpoints", json={})
        case "restore":
            known = (await http.get(f"{task}/checkpoints")).json()["checkpoints"]
            if not known:
                return {"ok": False}
            chosen = known[int(act["which"] * len(known))]["checkpoint_id"]
            answer = await http.post(f"/checkpoints/{chosen}/restore", json={})
        case of_step:
            answer = await http.post(f"{task}/steps/{act['step']}/{of_step.removesuffix('_step')}", json={})
    body = answer.json()
    assert answer.status_code in (200, 201, 202, 409), body
    session = body.get("session_id") or body.get("execution_id")
    return {"ok": answer.is_success, "session": session, "checkpoint": body.get("checkpoint_id")}


async def answer_what_is_asked(http: httpx.AsyncClient, chance: Random) -> None:
    for waiting in (await http.get("/inputs")).json()["inputs"]:
        action = "accept" if chance.random() < 0.8 else "decline"
        answers = {waiting["input"]["key"]: {"action": action}}
        answer = await http.post(f"/tasks/{waiting['task_id']}/inputs", json={"answers": answers})
        assert answer.status_code in (200, 409), answer.text


async def perform_all(http: httpx.AsyncClient, plans: list[Json], acts: list[Json], chance: Random) -> list[Json]:
    """What was told, with questions answered between the acts."""
    tasks, told = await started(http, plans), list[Json]()
    for act in acts:
        await anyio.sleep(act["after"])
        told.append({"sent": act})
        told.append({"did": act, **await perform(http, tasks[act["plan"]], act)})
        await answer_what_is_asked(http, chance)
    await http.aclose()
    return told
