"""A SQLite file that the threads and processes of a run share: the web's answers, and the time of the next search.

A re-run with the same file trains on the same results. The pace is stored here too, because a rate limit applies to
all ranks of a run together.
"""

from __future__ import annotations

import contextlib
import json
import sqlite3
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from trl_search.common.errors import UserError

_TABLES = """
CREATE TABLE IF NOT EXISTS answers (key TEXT PRIMARY KEY, answer TEXT NOT NULL, stored_at REAL NOT NULL);
CREATE TABLE IF NOT EXISTS turns (provider TEXT PRIMARY KEY, taken_at REAL NOT NULL, next_at REAL NOT NULL);
"""


class WebStore:
    """Answers by key, and search times by provider. Every call opens the file, because connections work across neither
    forks nor threads.

    Args:
        path (`Path`): The file; created if missing.
        clock (`Callable`): Seconds that all processes agree on.

    Raises:
        UserError: if the file cannot be used as a cache.
    """

    def __init__(self, path: Path, *, clock: Callable[[], float] = time.time) -> None:
        self._path, self._clock = path, clock
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with self._open() as connection:
                connection.executescript(_TABLES)
        except (OSError, sqlite3.Error) as error:
            raise UserError(f"{path} cannot be the web cache ({error}); name another file by cache=") from None

    def get(self, key: Sequence[Any]) -> Any:
        """The answer stored under a key; `None` if there is none."""
        with self._open() as connection:
            row = connection.execute("SELECT answer FROM answers WHERE key = ?", (json.dumps(key),)).fetchone()
        return None if row is None else json.loads(row[0])

    def put(self, key: Sequence[Any], answer: Any) -> Any:
        """Stores an answer and returns the stored one: if another process was first, its answer stays."""
        with self._open() as connection:
            connection.execute(
                "INSERT OR IGNORE INTO answers VALUES (?, ?, ?)", (json.dumps(key), json.dumps(answer), self._clock())
            )
        return self.get(key)

    def take_turn(self, provider: str, *, rate_per_s: float, within_s: float) -> float | None:
        """Reserves the next search and returns the seconds to wait; `None`, without a reservation, if over
        `within_s`."""
        with self._open() as connection:
            row = connection.execute("SELECT taken_at, next_at FROM turns WHERE provider = ?", (provider,)).fetchone()
            now = self._clock()
            taken_at, next_at = row or (now, now)
            if now < taken_at:  # the clock was set back: the queue stays as long as it was
                next_at -= taken_at - now
            turn_at = max(now, next_at)
            if turn_at - now > within_s:
                return None
            turn = (provider, now, turn_at + 1 / rate_per_s)
            connection.execute("INSERT OR REPLACE INTO turns VALUES (?, ?, ?)", turn)
        return turn_at - now

    @contextlib.contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        """Opens an exclusive transaction."""
        with contextlib.closing(sqlite3.connect(self._path, timeout=30, isolation_level=None)) as connection:
            connection.execute("BEGIN IMMEDIATE")
            yield connection
            connection.commit()
