"""Asking again what may succeed the next time, after waits that grow and are drawn at random."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import tenacity

Result = TypeVar("Result")

TRIES = 3
GROWING_WAIT = tenacity.wait_random_exponential(multiplier=0.2, max=5)  # seconds


def repeated(ask: Callable[[], Result], on: type[Exception], *, tries: int = TRIES) -> Result:
    """The result of `ask()`, asked again while it raises `on`; the last error where all tries fail.

    Example:
        >>> repeated(lambda: client.get(url), on=httpx.TransportError)
    """
    retrying = tenacity.Retrying(
        retry=tenacity.retry_if_exception_type(on),
        stop=tenacity.stop_after_attempt(tries),
        wait=GROWING_WAIT,
        reraise=True,
    )
    return retrying(ask)
