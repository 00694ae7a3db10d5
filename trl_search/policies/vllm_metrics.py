"""What a `vllm serve` says about itself at `/metrics`, in Prometheus' text format."""

from __future__ import annotations

import re


def read_start_time(metrics: str) -> float | None:
    """The start time of the server's process; `None` if it has several API servers, which do not report it."""
    found = re.search(r"^process_start_time_seconds (\S+)$", metrics, re.MULTILINE)
    return float(found[1]) if found else None


def count_engines(metrics: str) -> int:
    """The number of engines (`--data-parallel-size`); 0 if the server does not report it (`--disable-log-stats`)."""
    return len(set(re.findall(r'^vllm:\w+\{engine="(\d+)"', metrics, re.MULTILINE)))
