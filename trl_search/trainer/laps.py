"""How long the parts of a step take, on the clock of this process."""

from __future__ import annotations

import time
from dataclasses import dataclass, field


@dataclass
class Laps:
    """Seconds by part; each part begins where the one before it ended.

    Example:
        >>> laps = Laps()
        >>> laps.end("time/rollout_s")
        >>> laps.seconds
        {'time/rollout_s': 12.4}
    """

    seconds: dict[str, float] = field(default_factory=dict)
    _began: float = field(default_factory=time.perf_counter)

    def end(self, part: str) -> None:
        """The part that runs now is over; where it has ended before, its seconds are added up."""
        now = time.perf_counter()
        self.seconds[part] = self.seconds.get(part, 0.0) + now - self._began
        self._began = now
