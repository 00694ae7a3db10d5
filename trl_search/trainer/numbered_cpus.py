"""Lets several ranks on CPUs resume: accelerate calls the CPU of rank 1 `cpu:1`, and torch cannot load onto that."""

from __future__ import annotations

import functools
import re
from typing import Any

import torch


@functools.cache
def load_onto_numbered_cpus() -> None:
    """Makes `torch.load(..., map_location="cpu:1")` work in this process: every number means the same CPU."""

    def restore(storage: Any, location: str) -> Any:
        return storage if re.fullmatch(r"cpu:\d+", location) else None

    torch.serialization.register_package(0, lambda storage: None, restore)
