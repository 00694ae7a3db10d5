"""Starts a module in two processes that communicate over gloo, like a launcher, and ends both when one hangs."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.support.forked import ROOT, ForkedProcess, ForkServer
from tests.support.ports import free_port

# It only limits a hang: on a busy machine the ranks take many times as long as on a quiet one.
HANGS_S = 600.0


def start_ranks(
    module: str,
    arguments: Sequence[str],
    folder: Path,
    environment: Mapping[str, str] | None = None,
    *,
    one_per_host: bool = False,
    server: ForkServer | None = None,
) -> list[ForkedProcess]:
    """Two processes of `python -m MODULE ARGUMENTS`; rank r writes its output to FOLDER/rank<r>.log.

    They have the environment that torch's launcher would set, on one host or on two.

    Args:
        server (`ForkServer`, *optional*): Forks them; the vLLM server for processes that need vLLM.
    """
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    meeting = {"WORLD_SIZE": "2", **address, **(environment or {})}
    ranks = []
    for rank in ("0", "1"):
        place = {"RANK": rank, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": "2", "GROUP_RANK": "0"}
        if one_per_host:
            place |= {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "GROUP_RANK": rank}
        place = {**os.environ, **meeting, **place}
        log = folder / f"rank{rank}.log"
        ranks.append(ForkedProcess(module, arguments, environment=place, log=log, folder=ROOT, server=server))
    return ranks


def wait_for_ranks(processes: list[ForkedProcess], folder: Path, timeout_s: float = HANGS_S) -> list[int]:
    """Waits for both and returns their exit codes; the test fails if one takes longer."""
    deadline = time.monotonic() + timeout_s
    try:
        return [process.wait(timeout=max(0.1, deadline - time.monotonic())) for process in processes]
    except subprocess.TimeoutExpired:
        pytest.fail(f"the ranks hung for {timeout_s} s:\n{output(folder)}")
    finally:
        for process in processes:
            process.kill()
            process.wait()


def run_ranks(module: str, arguments: Sequence[str], folder: Path, **options: Any) -> list[str]:
    """Runs both ranks and returns their output. The test fails if one of them fails.

    Args:
        **options: The options of [`start_ranks`].
    """
    ranks = start_ranks(module, arguments, folder, **options)
    assert wait_for_ranks(ranks, folder) == [0, 0], output(folder)
    return [rank.output() for rank in ranks]


def output(folder: Path) -> str:
    """The end of the output of both ranks."""
    return "\n".join((folder / f"rank{rank}.log").read_text(errors="replace")[-3000:] for rank in range(2))
