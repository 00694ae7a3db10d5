"""Temporarily replaces an attribute of a library that offers no way to pass our value."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any


@contextlib.contextmanager
def replaced(owner: object, name: str, value: Any) -> Iterator[None]:
    """Sets `owner.name` to `value` within the context, and restores it afterwards.

    Example:
        >>> with replaced(grpo_trainer, "VLLMGeneration", SearchVLLM):
        ...     GRPOTrainer(...)
    """
    theirs = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, theirs)
