"""Retries with growing random waits (tenacity)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import tenacity

Result = TypeVar("Result")

GROWING_WAIT = tenacity.wait_random_exponential(multiplier=0.2, max=5)  # seconds


def repeated(ask: Callable[[], Result], on: type[Exception]) -> Result:
    """The result of `ask()`, which is tried up to three times while it raises `on`. Then raises the last error."""
    return tenacity.Retrying(stop=tenacity.stop_after_attempt(3), **_growing(on))(ask)


def attempts(on: type[Exception], *, patience_s: float) -> tenacity.Retrying:
    """Repeats a block while it raises `on`, for `patience_s` seconds at most. Then raises the last error.

    Example:
        >>> for attempt in attempts(httpx.HTTPError, patience_s=60):
        ...     with attempt:
        ...         client.get("/health").raise_for_status()
    """
    return tenacity.Retrying(stop=tenacity.stop_after_delay(patience_s), **_growing(on))


def attempts_async(on: type[Exception], *, patience_s: float) -> tenacity.AsyncRetrying:
    """[`attempts`] for coroutines: `async for attempt in ...`."""
    return tenacity.AsyncRetrying(stop=tenacity.stop_after_delay(patience_s), **_growing(on))


def _growing(on: type[Exception]) -> dict[str, Any]:
    return {"retry": tenacity.retry_if_exception_type(on), "wait": GROWING_WAIT, "reraise": True}
