"""Puts another value under a library's name for a while, where the library offers no way to pass ours."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any


@contextlib.contextmanager
def replaced(owner: object, name: str, value: Any) -> Iterator[None]:
    """`owner.name` is `value` inside the context, and what it was before again afterwards.

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
