"""Starts a module in two processes that meet over gloo, as a launcher would, and ends both when one hangs."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def start_ranks(module: str, arguments: Sequence[str], folder: Path) -> list[subprocess.Popen[bytes]]:
    """Two processes of `python -m MODULE ARGUMENTS`; rank r writes its output to FOLDER/rank<r>.log."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    processes = []
    for rank in ("0", "1"):
        environment = {
            **os.environ,
            **{"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port},
            **{"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TRL_EXPERIMENTAL_SILENCE": "1"},
        }
        with (folder / f"rank{rank}.log").open("wb") as log:
            command = [sys.executable, "-m", module, *arguments]
            processes.append(subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log))
    return processes


def wait_for_ranks(processes: list[subprocess.Popen[bytes]], folder: Path, timeout_s: float) -> list[int]:
    """The exit codes, once both have ended; the test fails if one takes longer."""
    deadline = time.monotonic() + timeout_s
    try:
        return [process.wait(timeout=max(0.1, deadline - time.monotonic())) for process in processes]
    except subprocess.TimeoutExpired:
        pytest.fail(f"the ranks hung for {timeout_s} s:\n{output(folder)}")
    finally:
        for process in processes:
            process.kill()
            process.wait()


def output(folder: Path) -> str:
    """The end of what both ranks printed."""
    return "\n".join((folder / f"rank{rank}.log").read_text(errors="replace")[-3000:] for rank in range(2))
