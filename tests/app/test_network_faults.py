"""Faults of the network that work raises: they have the codes that strategies and retries know."""

from __future__ import annotations

import errno
import socket
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from typing import TYPE_CHECKING, ClassVar

import pytest
from network_callables import Hung, elsewhere, leaking
from planning import ME, ended, started

from roles.definition import RetryPolicy, Role
from vespera_exec.app.service import Vespera
from vespera_exec.app.views import Execute
from vespera_exec.engine.plans.strategies import NetworkTimeoutRecovery
from vespera_exec.errors import ExecutionError, failure_code_of, failure_context_of

if TYPE_CHECKING:
    from roles.definition import TaskLike

Opening = Callable[..., AbstractAsyncContextManager[Vespera]]


FAULTS: list[tuple[BaseException, str]] = [
    (ConnectionRefusedError("no"), "CONNECTION_REFUSED"),
    (ConnectionResetError("gone"), "CONNECTION_REFUSED"),
    (OSError(errno.ECONNABORTED, "aborted"), "CONNECTION_REFUSED"),
    (Hung("gone"), "CONNECTION_REFUSED"),
    (TimeoutError("late"), "NETWORK_TIMEOUT"),
    (OSError(errno.ETIMEDOUT, "late"), "NETWORK_TIMEOUT"),
    (OSError(errno.ENETUNREACH, "no way"), "NETWORK_TIMEOUT"),
    (OSError(errno.EHOSTUNREACH, "no way"), "NETWORK_TIMEOUT"),
    (socket.gaierror(socket.EAI_NONAME, "no such name"), "NETWORK_TIMEOUT"),
    (ExceptionGroup("of one", [ExceptionGroup("of one", [ConnectionResetError("gone")])]), "CONNECTION_REFUSED"),
]
OTHERS = [
    OSError(errno.ENOENT, "no file"),
    BrokenPipeError("a pipe"),
    ValueError("a value"),
    PermissionError("no"),
    ExceptionGroup("of two", [ConnectionResetError("gone"), ValueError("a value")]),
]


@pytest.mark.parametrize(("fault", "code"), FAULTS, ids=[repr(fault) for fault, _ in FAULTS])
def test_a_fault_of_the_network_has_the_code_of_one_and_keeps_its_class(fault: BaseException, code: str) -> None:
    assert failure_code_of(fault) == code
    assert failure_context_of(fault) == {"type": type(fault).__name__}


@pytest.mark.parametrize("fault", OTHERS, ids=repr)
def test_any_other_fault_is_called_by_its_class(fault: BaseException) -> None:
    assert (failure_code_of(fault), failure_context_of(fault)) == (type(fault).__name__, {})


def test_what_says_its_code_itself_is_believed() -> None:
    assert failure_code_of(ExecutionError("x", code="MINE")) == "MINE"


class Explained(Hung):
    """One of the network that has a context of its own."""

    context: ClassVar[dict[str, str]] = {"host": "there"}


def test_the_class_is_kept_beside_a_context_of_its_own() -> None:
    assert failure_context_of(Explained("gone")) == {"type": "Explained", "host": "there"}


calls: list[str] = []


async def flaky(task: TaskLike) -> str:
    calls.append(task.title)
    if len(calls) < 3:
        raise Hung("the other side is gone")
    return "there"


class ForTheClass(NetworkTimeoutRecovery):
    id = "for the class"
    applicable_errors = ("Hung",)


@pytest.mark.parametrize("strategy", [NetworkTimeoutRecovery, ForTheClass], ids=["by code", "by class"])
async def test_a_step_that_loses_its_connection_is_tried_again_by_a_strategy_for_that(
    opening: Opening, strategy: type[NetworkTimeoutRecovery]
) -> None:
    calls.clear()
    async with opening(roles=[Role.from_callable(flaky, in_loop=True)]) as vespera:
        vespera.strategies.remove("network_timeout_recovery")
        vespera.strategies.add(strategy(base_seconds=0.01))
        handle = await started(vespera, {"id": "a", "role": "flaky"})
        result = await ended(vespera, handle)
        assert (result.status, result.result["output"]) == ("completed", {"a": "there"})
        (step,) = (await vespera.list_steps(ME, handle.task_id)).steps
        assert (step.attempt, step.recoveries) == (3, 2)


async def test_the_class_stays_with_the_error_and_retry_rules_may_name_it(opening: Opening) -> None:
    rule = RetryPolicy(max_retries=1, retry_on=("Hung",), backoff_seconds=0.01)
    async with opening(roles=[Role.from_callable(elsewhere, retry=rule)]) as vespera:
        handle = await vespera.execute_task(ME, Execute(title="T", role="elsewhere"))
        result = await ended(vespera, handle)
        error = result.error or {}
        assert (error["code"], error["context"]) == ("CONNECTION_REFUSED", {"type": "Hung"})
        assert result.session_id != result.run_id  # of the second attempt


async def test_work_that_can_open_no_file_any_more_is_still_called_by_its_fault(opening: Opening) -> None:
    async with opening(roles=[Role.from_callable(leaking)]) as vespera:
        handle = await vespera.execute_task(ME, Execute(title="T", role="leaking"))
        error = (await ended(vespera, handle)).error or {}
        assert (error["code"], "Too many open files" in error["message"]) == ("OSError", True)
