"""Metrics of retrievers, computed by hand on tiny sets: judged queries in BEIR's layout, and golden answers."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from trl_search.cli.main import main
from trl_search.common.errors import UserError
from trl_search.evaluation.retriever_quality import JudgedQueries, answer_rank, load_judged, measure, quality_table
from trl_search.retrieval import Retriever
from trl_search.retrieval.index.folder import build_index
from trl_search.types import Passage


class Fixed(Retriever):
    """Returns fixed passages for each query, all with the same score."""

    def __init__(self, found: dict[str, list[str]]) -> None:
        self.found = found

    def search(self, queries: list[str], k: int) -> list[list[Passage]]:
        return [
            [Passage(name, "", f"text of {name}", score=1.0) for name in self.found[query][:k]] for query in queries
        ]


def write_beir(folder: Path) -> Path:
    (folder / "qrels").mkdir(parents=True)
    rows = [
        {"_id": "q1", "text": "first", "metadata": {}},
        {"_id": "q2", "text": "second"},
        {"_id": "q3", "text": "?"},
    ]
    (folder / "queries.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\nq1\ta\t2\nq1\tb\t1\nq2\tc\t1\n")
    return folder


def test_metrics_of_judged_queries_equal_those_by_hand(tmp_path: Path) -> None:
    (judged,) = load_judged(str(write_beir(tmp_path / "tiny")), split="test", limit=None, seed=0)
    assert judged.name == "tiny" and judged.queries == {"q1": "first", "q2": "second"}  # the third is not judged
    # q1 is itself in the corpus: BEIR does not count a query as its own result.
    retriever = Fixed({"first": ["q1", "b", "x", "a"], "second": ["x", "y", "z", "c"]})
    measured = measure(retriever, judged, 3)
    gain = (1 + 2 / math.log2(4)) / (2 + 1 / math.log2(3))
    assert measured["nDCG@3"] == pytest.approx(gain / 2, abs=1e-4)  # the second query has no hit in the first three
    assert measured["R@3"] == pytest.approx(0.5) and measured["RR@3"] == pytest.approx(0.5)
    assert measure(retriever, judged, 4)["RR@4"] == pytest.approx((1 + 1 / 4) / 2)


def test_golden_answers_are_searched_in_the_first_k_passages() -> None:
    judged = JudgedQueries(
        "mine", {"0": "first", "1": "second"}, golden_answers={"0": ["Text of B"], "1": ["nothing"]}
    )
    measured = measure(Fixed({"first": ["a", "b", "c"], "second": ["a", "b", "c"]}), judged, 3)
    assert measured == {"answer@1": 0.0, "answer@3": 0.5}
    assert answer_rank([Passage("1", "Orlune", "A town.")], ["Orlune"]) == 1
    assert answer_rank([], ["Orlune"]) is None


def test_a_missing_file_of_a_beir_folder_is_named(tmp_path: Path) -> None:
    folder = write_beir(tmp_path / "tiny")
    with pytest.raises(UserError, match=r"qrels needs one file called dev, .* its files are: test\.tsv"):
        load_judged(str(folder), split="dev", limit=None, seed=0)
    (folder / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\n")
    with pytest.raises(UserError, match="qrels/test judges no passage"):  # it divided by zero
        load_judged(str(folder), split="test", limit=None, seed=0)
    (folder / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\nq9\ta\t1\n")
    with pytest.raises(UserError, match="name the query 'q9', which is not in queries"):
        load_judged(str(folder), split="test", limit=None, seed=0)
    (folder / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\nq1\ta\thigh\n")
    with pytest.raises(UserError, match=r"test\.tsv, line 2: needs the columns query-id, corpus-id and score"):
        load_judged(str(folder), split="test", limit=None, seed=0)


def test_several_retrievers_are_compared_in_one_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    passages = [Passage("a", "Orlune", "The first harbour."), Passage("c", "Vesk", "The second country.")]
    build_index(passages, tmp_path / "one")
    build_index(passages[:1], tmp_path / "other")
    questions = tmp_path / "mine.jsonl"
    questions.write_text('{"question": "second country?", "answer": "Vesk"}\n')
    command = ["eval-retriever", str(tmp_path / "one"), str(tmp_path / "other"), "--answers-field", "answer"]
    command += [
        "--datasets",
        str(write_beir(tmp_path / "tiny")),
        str(questions),
        "--output",
        str(tmp_path / "out.json"),
    ]
    assert main([*command, "--passages_per_query", "1"]) == 0
    said = capsys.readouterr().out
    assert "tiny: 2 queries" in said and f"| {tmp_path / 'one'} | 1.000 |" in said
    measured = json.loads((tmp_path / "out.json").read_text())
    assert [measured["mine"][str(tmp_path / name)]["answer@1"] for name in ("one", "other")] == [1.0, 0.0]
    assert measured["tiny"][str(tmp_path / "one")]["RR@1"] == 1.0
    assert quality_table({"x": {"R@1": 0.5}}) == "| retriever | R@1 |\n|---|---|\n| x | 0.500 |"


def test_sets_of_one_name_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The first set was printed with the numbers of the second."""
    build_index([Passage("1", "Orlune", "A town.")], tmp_path / "index")
    for year in ("2023", "2024"):
        (tmp_path / year / "mine").mkdir(parents=True)
        (tmp_path / year / "mine" / "test.jsonl").write_text('{"question": "town?", "golden_answers": ["Orlune"]}\n')
    sets = [str(tmp_path / year / "mine") for year in ("2023", "2024")]
    assert main(["eval-retriever", str(tmp_path / "index"), "--datasets", *sets]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and "several of --datasets are called 'mine'" in captured.err
