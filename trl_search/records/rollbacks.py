"""Records rollbacks in `rollbacks.json` in the run folder.

With it, a resumed run keeps its learning rate and its remaining rollbacks, and skips abandoned checkpoints:

    {"rollbacks": [{"step": 60, "to": 40, "at": "2026-11-27T07:02:11.408113+00:00"}]}
"""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trl_search.common.files import read_object, write_json
from trl_search.records.folder import ROLLBACKS_FILE


def record_rollback(folder: Path, *, step: int, to: int) -> None:
    """Adds a rollback from `step` to step `to` to the record of the run."""
    at = datetime.datetime.now(datetime.UTC).isoformat()
    rollbacks = [*rollbacks_of(folder), {"step": step, "to": to, "at": at}]
    write_json(folder / ROLLBACKS_FILE, {"rollbacks": rollbacks})


def rollbacks_of(folder: Path) -> list[dict[str, Any]]:
    """The rollbacks of the run in a folder, oldest first."""
    path = folder / ROLLBACKS_FILE
    return list(read_object(path, "move it away")["rollbacks"]) if path.is_file() else []


def is_given_up(step: int, written_at: float, rollbacks: Sequence[dict[str, Any]]) -> bool:
    """Whether the run was rolled back past the checkpoint of `step` after it was written (`written_at`, a
    timestamp)."""
    return any(
        step > one["to"] and written_at < datetime.datetime.fromisoformat(one["at"]).timestamp() for one in rollbacks
    )
