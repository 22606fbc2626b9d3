"""What all views and requests have in common."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict

Json = Any


class View(BaseModel):
    """An answer."""

    model_config = ConfigDict(extra="forbid", frozen=True, defer_build=True)


class Request(BaseModel):
    """A question; unknown keys are refused, so that a misspelt one is noticed."""

    model_config = ConfigDict(extra="forbid", frozen=True, defer_build=True)
