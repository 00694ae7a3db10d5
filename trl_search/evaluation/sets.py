"""Loads the question sets of an evaluation, by name or file, and fingerprints the questions."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trl_search.common.errors import UserError, unknown_name
from trl_search.config.searched import WORLD
from trl_search.data import HUB_SETS, QuestionFields, is_hub_set, load_evaluation_questions
from trl_search.data.questions import sampled_rows
from trl_search.data.world import World

MACRO = "macro"  # the average over the sets
_LONGEST = 200  # bytes of a name; most disks allow 255 for a file, with its mode and ending


@dataclass(frozen=True)
class QuestionSet:
    """Questions that are evaluated together."""

    name: str  # the heading of the set's column, and part of its file's name: `nq`
    source: str  # a dataset on the hub and its split, a file, or the world
    total: int  # the number of questions in the source; `rows` holds those that are asked
    rows: Sequence[Mapping[str, Any]]

    @property
    def fingerprint(self) -> str:
        """A hash of ids, questions and golden answers, in order."""
        digest = hashlib.sha256()
        for row in self.rows:
            digest.update(json.dumps([row["id"], row["question"], list(row["golden_answers"])]).encode())
        return digest.hexdigest()[:16]

    def describe(self) -> dict[str, Any]:
        """The entry in `settings.json`."""
        return {"source": self.source, "asked": len(self.rows), "total": self.total, "fingerprint": self.fingerprint}


def load_sets(
    name_or_path: str, *, limit: int | None, seed: int, fields: QuestionFields | None = None
) -> list[QuestionSet]:
    """Loads a hub set in the split of published numbers, or a file or folder in any known schema.

    A source with several values of `data_source` (such as `nq_hotpotqa`) gives one set per value, because an average
    over all questions would weight the sets by their size.

    Raises:
        UserError: for an unknown name.
    """
    path = Path(name_or_path).expanduser()
    if name_or_path not in HUB_SETS and not path.exists() and not path.suffix and path.name == name_or_path:
        raise unknown_name("dataset", name_or_path, [*HUB_SETS, WORLD])
    source = str(path)
    if is_hub_set(name_or_path):
        hub = HUB_SETS[name_or_path]
        source = " ".join(filter(None, (hub.repository, hub.config, hub.evaluation_split)))
    groups: dict[str, list[Any]] = {}
    for row in load_evaluation_questions(name_or_path, fields=fields):
        groups.setdefault(row["data_source"], []).append(row)
    whole = len(groups) == 1
    return [
        _sampled(name, source if whole else f"{source}, data_source {name}", rows, limit, seed)
        for name, rows in groups.items()
    ]


def load_world_set(world: World, *, limit: int | None, seed: int) -> QuestionSet:
    """The held-out questions of an embedded world."""
    rows = [{**question.row(), "data_source": WORLD} for question in world.questions("test")]
    source = f"embedded world of {len(world.passages):,} passages, seed {world.seed}, test"
    return _sampled(WORLD, source, rows, limit, seed)


def check_names(sets: Sequence[QuestionSet]) -> None:
    """Checks that names are unique, because a set's files and column are named after it.

    Raises:
        UserError: if two sets have the same name, also where a disk ignores case, or if a name cannot name files:
            `macro` is the average, and `nq.rank1` names the answers of a second process to `nq`.
    """
    for i, one in enumerate(sets):
        if one.name == MACRO:
            raise UserError(f"{one.source} is called {MACRO!r}, like the average: give it another data_source")
        if re.search(r"\.rank\d+$", one.name) or len(one.name.encode()) > _LONGEST:
            raise UserError(
                f"{one.source[:300]} is called {one.name[:80]!r}, which cannot name its files: give it a data_source "
                f"of at most {_LONGEST} bytes that does not end in .rank and a number"
            )
        for other in sets[:i]:
            if one.name.casefold() == other.name.casefold():
                raise UserError(
                    f"{other.source} and {one.source} are both called {one.name!r}: give each its own --output, or "
                    "give one another name or data_source"
                )


def _sampled(name: str, source: str, rows: list[Any], limit: int | None, seed: int) -> QuestionSet:
    asked = [rows[index] for index in sampled_rows(len(rows), limit, seed)]
    return QuestionSet(re.sub(r"[^\w.-]+", "_", name), source, len(rows), asked)
