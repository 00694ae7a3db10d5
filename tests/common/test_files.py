"""A file is written completely or not at all."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path

import numpy as np
import pytest

from trl_search.common.files import cache_folder, disk_is_full, write_json, write_jsonl, written_whole


def test_a_file_is_written_completely_or_not_at_all(tmp_path):
    path = tmp_path / "x"
    path.write_text("old")
    with pytest.raises(KeyError), written_whole(path) as temporary:
        temporary.write_text("half of the n")
        raise KeyError
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_a_name_that_is_not_utf8_is_written_and_read_back(tmp_path: Path) -> None:
    """The index of a corpus with such a name used to be built completely, and then lost at its manifest."""
    name = os.fsdecode(b"caf\xe9\\.jsonl")
    write_json(tmp_path / "one.json", {"name": name})
    write_jsonl(tmp_path / "rows.jsonl", [{"name": name}])
    for file in ("one.json", "rows.jsonl"):
        assert json.loads((tmp_path / file).read_text("utf-8")) == {"name": name}


def test_a_container_without_a_home_has_a_cache_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr("os.path.expanduser", lambda path: path)  # what Python does for an unknown user
    assert cache_folder() == Path(tempfile.gettempdir(), "trl-search")


def test_a_full_disk_is_recognized_also_in_the_words_of_numpy() -> None:
    with pytest.raises(OSError) as numpys, open("/dev/full", "wb") as full:
        np.save(full, np.zeros(100_000))
    with pytest.raises(OSError) as pythons, open("/dev/full", "w") as full:
        full.write("x" * 100_000)
    assert disk_is_full(numpys.value) and disk_is_full(pythons.value)
    assert not disk_is_full(OSError("3 requested")) and not disk_is_full(RuntimeError("1 requested and 0 written"))


def test_a_pipe_is_written_to_and_not_replaced(tmp_path: Path) -> None:
    """As root, `--output /dev/null` replaced the device by a file."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    write_json(pipe, {"em": 0.5})
    assert pipe.is_fifo() and list(tmp_path.iterdir()) == [pipe]
    assert json.loads(os.read(reader, 1000)) == {"em": 0.5}
    os.close(reader)
