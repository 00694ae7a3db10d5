"""What a `vllm serve` says about itself: at `/metrics`, in Prometheus' text format, and through its workers."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import httpx

ONE_ADDRESS = "start it without --data-parallel-rank, --data-parallel-external-lb and --data-parallel-hybrid-lb"
# For `/collective_rpc`, which a server has with VLLM_SERVER_DEV_MODE=1; `WeightChecksums` answers. Without it, the
# server answers 500 and then closes the connection, on which the next request would be lost.
ASK_WORKER_START: dict[str, Any] = {"json": {"method": "started_at"}, "headers": {"Connection": "close"}}


def read_start_time(metrics: str) -> float | None:
    """The start time of the server's process; `None` if it has several API servers, which do not report it."""
    found = re.search(r"^process_start_time_seconds (\S+)$", metrics, re.MULTILINE)
    return float(found[1]) if found else None


def read_worker_start(answer: httpx.Response) -> float | None:
    """The start time of the first worker, from the answer to `ASK_WORKER_START`; `None` if the server refused.

    Raises:
        httpx.DecodingError: if something else answered: a gateway, while the server starts.
    """
    if not answer.is_success:
        return None
    try:
        return float(answer.json()["results"][0])
    except (LookupError, TypeError, ValueError) as error:
        raise httpx.DecodingError(f"/collective_rpc answered {answer.content[:100]!r}") from error


def shares_engines(info: Mapping[str, Any]) -> bool:
    """Whether some engines of the server's group are behind other addresses, from its settings (`/server_info`)."""
    parallel = info.get("parallel_config") or {}
    return bool(parallel.get("data_parallel_external_lb") or parallel.get("data_parallel_hybrid_lb"))


def count_engines(metrics: str) -> int:
    """The number of engines (`--data-parallel-size`); 0 if the server does not report it (`--disable-log-stats`)."""
    return len(set(re.findall(r'^vllm:\w+\{engine="(\d+)"', metrics, re.MULTILINE)))
