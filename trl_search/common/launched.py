"""Which of the processes of `accelerate launch` this is, known before accelerate is imported."""

from __future__ import annotations

import os


def launched_rank() -> int:
    """The rank of this process; 0 without a launcher."""
    return int(os.environ.get("RANK", "0"))


def launched_processes() -> int:
    """The number of processes; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))
