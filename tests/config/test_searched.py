"""Which retriever a word stands for: an index, a run, or a checkpoint of a run."""

from __future__ import annotations

import json
from pathlib import Path

from trl_search.config.searched import resolve_searched
from trl_search.retrieval.index.folder import build_index
from trl_search.types import Passage


def test_an_index_in_the_folder_of_a_run_is_searched_itself(tmp_path: Path) -> None:
    """It used to be taken for a checkpoint, so the run's own retriever was searched instead."""
    build_index([Passage("1", "Orlune", "Orlune is a city.")], tmp_path / "index")
    (tmp_path / "checkpoint-3").mkdir()
    task = {"questions": "world", "retriever": "bm25", "world_passages": 300, "world_seed": 1}
    (tmp_path / "run.json").write_text(json.dumps({"task": task}))
    assert resolve_searched(str(tmp_path / "index")).options == {"index": str(tmp_path / "index")}
    for run in (tmp_path, tmp_path / "checkpoint-3"):
        assert resolve_searched(str(run)).world_size == (300, 1)
