"""Published exact match of Qwen2.5 models on the seven sets, for comparison.

We measured none of these numbers. Sources: the Search-R1 paper (arXiv:2503.09516), Seungyoun Shin's reproduction of it
(June 2025), and the public repositories of verl-tool and SearchAgent-Zero. `secondary` rows were read in a copy, not
at the source; tables mark them with `[2°]`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

SETS = ("nq", "triviaqa", "popqa", "hotpotqa", "2wikimultihopqa", "musique", "bamboogle")
TITLES = dict(zip(SETS, ("NQ", "TriviaQA", "PopQA", "HotpotQA", "2Wiki", "MuSiQue", "Bamboogle"), strict=True))
# Billions of parameters of models that are called 3B and 7B; those of Qwen2.5 have 3.1 and 7.6.
_RANGES = {"3B": (2.5, 4.5), "7B": (6.0, 9.0)}


@dataclass(frozen=True)
class Published:
    """One row. `em` is in the order of `SETS`, and empty if only the average was published."""

    label: str
    size: str
    em: tuple[float, ...]
    average: float
    secondary: bool = True

    @property
    def title(self) -> str:
        return f"{self.label} [2°]" if self.secondary else self.label

    def macro(self, names: Sequence[str]) -> float | None:
        """The average over these sets: the published one for all seven; `None` if it is unknown."""
        if set(names) == set(SETS):
            return self.average
        return sum(self.em[SETS.index(name)] for name in names) / len(names) if self.em else None


PUBLISHED = (
    Published("Search-R1, 3B-it GRPO", "3B", (0.397, 0.565, 0.391, 0.331, 0.310, 0.124, 0.232), 0.336, False),
    # The average is that of the table in Shin's reproduction; its text says .349.
    Published(
        "Search-R1 by Shin (2025), 3B-it", "3B", (0.406, 0.582, 0.420, 0.338, 0.332, 0.111, 0.296), 0.355, False
    ),
    Published("3B direct", "3B", (0.106, 0.288, 0.108, 0.149, 0.244, 0.020, 0.024), 0.134),
    Published("3B CoT", "3B", (0.023, 0.032, 0.005, 0.021, 0.021, 0.002, 0.000), 0.015),
    Published("3B RAG", "3B", (0.348, 0.544, 0.387, 0.255, 0.226, 0.047, 0.080), 0.270),
    Published("3B R1-it, no search", "3B", (0.210, 0.449, 0.171, 0.208, 0.275, 0.060, 0.192), 0.224),
    Published("3B base PPO", "3B", (), 0.303),
    Published("3B base GRPO", "3B", (), 0.312),
    Published("3B it PPO", "3B", (0.341, 0.545, 0.378, 0.324, 0.319, 0.103, 0.264), 0.325),
    Published("verl-tool 3B, step 200", "3B", (0.462, 0.619, 0.476, 0.401, 0.401, 0.151, 0.360), 0.410),
    Published("SearchAgent-Zero 3B-it", "3B", (0.464, 0.616, 0.424, 0.423, 0.398, 0.181, 0.344), 0.407),
    Published("7B base PPO", "7B", (0.480, 0.638, 0.457, 0.433, 0.382, 0.196, 0.432), 0.431),
    Published("7B it GRPO", "7B", (0.429, 0.623, 0.427, 0.386, 0.346, 0.162, 0.400), 0.396),
)


def size_class(name: str, parameters: int | None = None) -> str | None:
    """`3B`, `7B` or `None`, from the number of parameters or, if that is unknown, from the name.

    Example:
        >>> size_class("Qwen/Qwen2.5-3B-Instruct"), size_class("runs/a", 7_600_000_000), size_class("tiny")
        ('3B', '7B', None)
    """
    if parameters is not None:
        billions = parameters / 1e9
    else:
        found = re.search(r"(?<![\d.])(\d+(?:\.\d+)?)b(?![a-z0-9])", name.lower())
        billions = float(found[1]) if found else 0.0
    return next((size for size, (low, high) in _RANGES.items() if low <= billions <= high), None)


def rows_beside(names: Sequence[str], size: str | None) -> list[Published]:
    """The published rows of that size (`"all"`: of every size) that have a number for these sets."""
    shown = [name for name in SETS if name in names]
    if not shown:
        return []
    return [row for row in PUBLISHED if size in (row.size, "all") and (row.em or row.macro(shown) is not None)]
