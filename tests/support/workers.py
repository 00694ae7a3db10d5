"""Which worker of pytest-xdist runs which tests, and in what order.

    the files that need vLLM      one worker, so that one process imports vLLM and forks all engines
    the files that need a browser one worker, which starts one
    the files that wait           one worker, while the two others keep both cores busy
    every other file              the next worker that is free; the files with slow tests first

By default, xdist starts with the files that have the most tests. The slowest files have few tests, so they would run
last, and one worker would wait for the other. Files that wait have similar names, so all workers would wait at once.
"""

from __future__ import annotations

from pathlib import PurePath
from typing import Any

import pytest
from xdist.scheduler import LoadFileScheduling

SHARED = ("vllm", "browser")
# The tests in these folders talk to servers: they compute for a third of their two minutes and wait for the rest.
WAITING = ("retrieval/remote", "retrieval/server", "retrieval/web")


def unit(nodeid: str) -> str:
    """The unit that one worker runs: a file, all files that share an expensive process, or all files that wait."""
    file = nodeid.partition("::")[0]
    if any(folder in file for folder in WAITING):
        return "waiting"
    return next((name for name in SHARED if name in PurePath(file).stem), file)


class Scheduling(LoadFileScheduling):
    """Assigns units in the order in which they were collected."""

    def __init__(self, config: pytest.Config, log: Any = None) -> None:
        config.option.loadscopereorder = False
        super().__init__(config, log)

    def _split_scope(self, nodeid: str) -> str:
        return unit(nodeid)


def slow_first(items: list[pytest.Item]) -> None:
    """Sorts tests in place: units with many slow tests come first. The order within a unit is kept."""
    slow: dict[str, int] = {}
    for item in items:
        name = unit(item.nodeid)
        slow[name] = slow.get(name, 0) + (item.get_closest_marker("slow") is not None)
    items.sort(key=lambda item: -slow[unit(item.nodeid)])
