"""`trl-search search`: what it prints is safe for a terminal."""

from __future__ import annotations

from tests.support.servers import Said, serving
from trl_search.cli.main import main
from trl_search.retrieval.index.folder import build_index
from trl_search.types import Passage


def test_no_passage_or_server_moves_the_cursor(tmp_path, capsys):
    passage = Passage("7\x1b[2J", "Orlune\x1b]0;gone\x07", "A \x1b[31mharbour\x1b[0m town \u202eeht.")
    build_index([passage], tmp_path / "index")
    assert main(["search", str(tmp_path / "index"), "town"]) == 0
    shown = capsys.readouterr().out
    assert "\x1b" not in shown and "\u202e" not in shown and "A \\x1b[31mharbour\\x1b[0m town" in shown
    with serving(lambda asked: Said(b"\x1b[2Jno", 404)) as server:
        assert main(["search", server.url, "harbour"]) == 2
    told = capsys.readouterr().err
    assert "\\x1b[2Jno" in told and "\x1b" not in told
