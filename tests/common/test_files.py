"""A file that is written is there as a whole or not at all."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest

from trl_search.common.files import cache_folder, written_whole


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "x"
    path.write_text("old")
    with pytest.raises(KeyError), written_whole(path) as temporary:
        temporary.write_text("half of the n")
        raise KeyError
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_a_container_without_a_home_has_a_cache_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr("os.path.expanduser", lambda path: path)  # what Python does for a user that is not listed
    assert cache_folder() == Path(tempfile.gettempdir(), "trl-search")
