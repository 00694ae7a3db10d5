"""Keeps each trajectory where its tokens are in the prefix cache: on one of several servers, or one of their engines.

trajectory 1, turn 1 ─► A ── turn 2 ─► A ── A is lost ─► B, from the trajectory's tokens
trajectory 2, turn 1 ─► B (which has fewer trajectories) ...
"""

from __future__ import annotations

import asyncio
import random
import weakref
from collections.abc import Sequence
from typing import Generic, TypeVar

Home = TypeVar("Home")


class Homes(Generic[Home]):
    """The home of each trajectory. Each trajectory runs in its own task."""

    def __init__(self) -> None:
        self._of: weakref.WeakKeyDictionary[asyncio.Task[object], Home] = weakref.WeakKeyDictionary()
        self._draw = random.Random()  # of its own: transformers seeds `random` alike on all ranks

    def choose(self, among: Sequence[Home]) -> Home:
        """The home of the running trajectory; for a new one, or if its home is gone, one of those with the fewest.

        Which one is drawn, because ranks know only their own trajectories: with fewer of them than homes, all ranks
        would fill the first homes and leave the last ones idle.
        """
        task = asyncio.current_task()
        assert task is not None
        home = self._of.get(task)
        if home is None or home not in among:
            running = [self._of[other] for other in list(self._of) if not other.done()]
            home = self._of[task] = min(among, key=lambda one: (running.count(one), self._draw.random()))
        return home
