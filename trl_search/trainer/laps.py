"""Measures how long the parts of a step take in this process."""

from __future__ import annotations

import time
from dataclasses import dataclass, field


@dataclass
class Laps:
    """Seconds per part; each part begins when the one before it ends.

    Example:
        >>> laps = Laps()
        >>> laps.end("time/rollout_s")
        >>> laps.seconds
        {'time/rollout_s': 12.4}
    """

    seconds: dict[str, float] = field(default_factory=dict)
    _began: float = field(default_factory=time.perf_counter)

    def end(self, part: str) -> None:
        """Ends the current part under the name `part`; repeated parts are summed."""
        now = time.perf_counter()
        self.seconds[part] = self.seconds.get(part, 0.0) + now - self._began
        self._began = now
