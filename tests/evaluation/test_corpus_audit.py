"""Which questions a corpus can answer, in one pass over its passages."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.evaluation.test_outcomes import outcome
from trl_search.cli.main import main
from trl_search.evaluation.answers_file import Records
from trl_search.evaluation.corpus_audit import answerable
from trl_search.retrieval.index.folder import build_index
from trl_search.rewards.answers import contains_answer
from trl_search.types import Passage

PASSAGES = [
    Passage("1", "Orlune", "The harbour was built by Mira Talvane in 1,998."),
    Passage("2", "北京", "他出生在北京市。"),
]
GOLDEN = [["talvane"], ["Orlune"], ["Mira of Vesk", "1998"], ["北京"], ["Vesk"], ["harbour was"], ["The"]]


def test_the_audit_equals_comparing_every_passage_with_every_question() -> None:
    texts = [f"{passage.title}\n{passage.text}" for passage in PASSAGES]
    slowly = {index for index, golden in enumerate(GOLDEN) if any(contains_answer(text, golden) for text in texts)}
    assert answerable(PASSAGES, GOLDEN) == slowly == {0, 1, 2, 3, 5}


def test_an_index_is_audited_and_unanswerable_questions_are_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    build_index(PASSAGES, tmp_path / "index")
    rows = [{"question": "harbour?", "golden_answers": ["Talvane"]}, {"question": "Vesk?", "golden_answers": ["Vesk"]}]
    (tmp_path / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = ["data", "audit", str(tmp_path / "mine.jsonl"), "--passages-per-query", "1"]
    assert main([*command, "--corpus", str(tmp_path / "index"), "--missing", str(tmp_path / "missing.jsonl")]) == 0
    said = capsys.readouterr().out
    assert "in the corpus      0.500" in said and "in the first 1     0.500" in said
    assert [json.loads(line)["question"] for line in (tmp_path / "missing.jsonl").read_text().splitlines()] == [
        "Vesk?"
    ]
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text('{"id": "1", "title": "Vesk", "text": "A country."}\n')
    assert main([*command, "--corpus", str(corpus)]) == 0
    said = capsys.readouterr().out
    assert "in the corpus      0.500" in said and "in the first" not in said
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "Vesk.txt").write_text("A country.")
    assert main([*command, "--corpus", str(tmp_path / "notes")]) == 0  # a folder without an index was refused
    assert "in the corpus      0.500" in capsys.readouterr().out


def test_an_evaluation_gives_the_shares_read_and_answered(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    build_index(PASSAGES, tmp_path / "index")
    golden = ["Talvane", "Orlune", "Vesk"]
    rows = [{"question": f"q{number}?", "golden_answers": [answer]} for number, answer in enumerate(golden)]
    (tmp_path / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "eval").mkdir()
    records = Records(tmp_path / "eval", "search", "mine")
    for place, (question, em, read) in enumerate([("q0?", 1.0, 1.0), ("q1?", 0.0, 1.0), ("q2?", 0.0, 0.0)]):
        records.append(place, outcome(em, question=question, read=read, failed="down" if question == "q2?" else ""))
    records.append(3, outcome(1.0, question="of another set?", read=0.0))
    records.close()
    command = ["data", "audit", str(tmp_path / "mine.jsonl"), "--corpus", str(tmp_path / "index"), "--run"]
    assert main([*command, str(tmp_path / "eval")]) == 0
    said = capsys.readouterr().out
    assert (
        "2 questions" in said and "in the corpus      1.000" in said
    )  # the third question was asked but not answered
    assert "read               1.000\n  answered           0.500, of those read 0.500\n" in said
    assert main([*command, str(tmp_path)]) == 2
    assert "has no answers to the questions of mine" in capsys.readouterr().err
