"""Decide yourself what becomes of a step that has failed.

    python examples/recovery_strategy.py

A strategy does not sleep: `delay_seconds` pass before the next try, also over a restart of the program. The engine
asks for at most three recoveries of a step, whatever a strategy says.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import anyio

from vespera_exec import DefaultExecutionEngine, ExecutionError, RecoveryAction, RecoveryContext, RecoveryResult, Role

if TYPE_CHECKING:
    from roles.context import Context

PLAN: dict[str, Any] = {
    "name": "Download",
    "variables": {"retry_count": 0},
    "steps": [{"id": "download", "role": "download"}],
}
MAX_RETRIES = 3
_tries: list[int] = []


async def download(context: Context) -> str:
    _tries.append(len(_tries))
    if len(_tries) < 3:
        raise ExecutionError("no answer from the server", code="NETWORK_TIMEOUT")
    return f"there at try {len(_tries)}"


class NetworkTimeoutRecovery:
    """Retry with exponential backoff for network timeouts."""

    id = "network_timeout_recovery"
    name = "Network Timeout Recovery"
    description = "Retry with exponential backoff for network timeouts"
    applicable_errors = ("NETWORK_TIMEOUT", "CONNECTION_REFUSED")

    async def execute(self, context: RecoveryContext) -> RecoveryResult:
        state = context.state
        retry_count: int = state.variables.get("retry_count", 0)
        if retry_count >= MAX_RETRIES:
            return RecoveryResult(
                success=False,
                action=RecoveryAction.ABORT,
                message=f"Max retries ({MAX_RETRIES}) exceeded for network timeout",
            )
        delay = 0.1 * 2**retry_count
        state.variables["retry_count"] = retry_count + 1
        message = f"Retrying after {delay:g} s (attempt {retry_count + 1}/{MAX_RETRIES})"
        print(message)
        return RecoveryResult(
            success=True, action=RecoveryAction.RETRY, new_state=state, delay_seconds=delay, message=message
        )


async def main() -> None:
    async with DefaultExecutionEngine.open(roles=[Role.from_callable(download, in_loop=True, inputs=None)]) as engine:
        engine.remove_recovery_strategy("network_timeout_recovery")  # the built-in one of this id
        engine.add_recovery_strategy(NetworkTimeoutRecovery())
        result = await engine.execute(PLAN)
        print(result.status, result.output, result.error)


if __name__ == "__main__":
    anyio.run(main)
