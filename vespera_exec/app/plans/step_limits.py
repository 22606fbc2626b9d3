"""What the step of a plan says of its run, in the place of what its role says."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from vespera_exec.model.events import mapping

if TYPE_CHECKING:
    from collections.abc import Mapping

    from roles.definition import Role
    from vespera_exec.engine.work import RetryRule
    from vespera_exec.model.events import Json


@dataclass(frozen=True, slots=True, kw_only=True)
class StepRetryRule:
    """`RetryRule` of a step: for the codes that it names, or for every error that is recoverable."""

    max_retries: int = 0
    retry_on: tuple[str, ...] = ()
    backoff_seconds: float = 1.0
    backoff_factor: float = 2.0
    backoff_max_seconds: float = 60.0

    def applies(self, error_code: str, failed_attempts: int) -> bool:
        return failed_attempts <= self.max_retries and (not self.retry_on or error_code in self.retry_on)

    def delay(self, failed_attempts: int) -> float:
        exponent = min(failed_attempts - 1, 64)
        return min(self.backoff_seconds * self.backoff_factor**exponent, self.backoff_max_seconds)


def adapted(role: Role, asked: Mapping[str, Json]) -> Role:
    """The role as the step of a plan wants it, where the run is of one. What is to be approved is not pure.

    Raises:
        InvalidInput: the role cannot be so.
    """
    told = mapping(asked.get("step"))
    changes = {name: told[name] for name in ("approval", "on_interrupt") if told.get(name)}
    if "approval" in changes:
        changes["pure"] = False
    return replace(role, **changes) if changes else role


def retry_rule(role: Role, asked: Mapping[str, Json]) -> RetryRule:
    """When a failed attempt is followed by another: as the step says, else as the role does."""
    told: dict[str, Any] = dict(mapping(mapping(asked.get("step")).get("retries")))
    if not told:
        return role.retry
    told["retry_on"] = tuple(told.get("retry_on") or ())
    return StepRetryRule(**told)
