"""Ends a process and its descendants in all sessions, because torch's launcher gives each rank its own session."""

from __future__ import annotations

import subprocess
from typing import Any

import psutil


def kill_tree(process: subprocess.Popen[Any]) -> None:
    """Kills the process and all its descendants, and waits for the process."""
    try:
        family = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
    except psutil.NoSuchProcess:
        family = []
    for member in family:
        try:
            member.kill()
        except psutil.NoSuchProcess:
            continue
    process.wait()
