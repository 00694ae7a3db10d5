"""`trl-search data …`: what it prints, what it writes, what it does not overwrite, and a download that is killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pytest

from tests.data.test_wiki18 import CORPUS, INDEX, corpus_lines, lay, tar_gz
from tests.support.fake_hub import FakeHub, fake_hub
from trl_search.cli.main import USER_ERROR, main
from trl_search.data import HUB_SETS, load_questions
from trl_search.data.wiki18 import PIECES
from trl_search.data.wiki18_checks import ARCHIVE, DIM
from trl_search.data.world import generate_world

ROOT = Path(__file__).parents[3]


def write(path: Path, *questions: str) -> Path:
    rows = [{"id": str(n), "question": text, "golden_answers": ["x", "y"]} for n, text in enumerate(questions)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path


@pytest.fixture
def train(tmp_path: Path) -> Path:
    return write(tmp_path / "mine.jsonl", *(f"who is the number {number}?" for number in range(10)))


def refused(capsys: pytest.CaptureFixture[str], *argv: object) -> str:
    assert main(["data", *map(str, argv)]) == USER_ERROR
    return capsys.readouterr().err


def test_questions_of_the_world_are_written_to_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "test.jsonl"
    options = ["--split", "test", "--world_passages", "200", "--world_seed", "7"]
    assert main(["data", "questions", "world", *options, "--output", str(file)]) == 0
    asked = generate_world(200, 7).questions("test")
    written = load_questions(file)
    assert written["question"] == [question.question for question in asked]
    assert written["golden_answers"] == [question.golden_answers for question in asked]
    assert set(written.column_names) == {"id", "question", "golden_answers", "data_source"}
    assert "there is no split 'dev': choose 'train' or 'test'" in refused(
        capsys, "questions", "world", "--split", "dev"
    )
    assert "at least" in refused(capsys, "questions", "world", "--world_passages", "3")


@pytest.mark.parametrize("action", ["questions", "list", "wiki18"])
def test_every_action_has_a_help(action: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["data", action, "--help"])
    assert stop.value.code == 0 and f"usage: trl-search data {action}" in capsys.readouterr().out


def test_the_list_names_every_set(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "list"]) == 0
    lines = capsys.readouterr().out.splitlines()[1:-1]
    assert [line.split()[0] for line in lines] == list(HUB_SETS)
    assert lines[4].split() == ["hotpotqa", "RUC-NLPIR/FlashRAG_datasets", "hotpotqa", "90,447", "7,405*"]


def test_questions_are_summarized_and_nothing_is_written(train: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "questions", str(train), "--samples", "1"]) == 0
    out = capsys.readouterr().out
    assert "rows                10\n  mine              10\n" in out
    assert "answers per question        2        2        2        2        2" in out
    assert out.count("->  x | y") == 1
    assert list(train.parent.iterdir()) == [train]


@pytest.mark.parametrize("kind", ["parquet", "jsonl"])
def test_a_sample_without_the_evaluation_sets_is_written_and_read_back(
    train: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    held_out = write(train.with_name("nq.jsonl"), "Who is number 3", "Who is number 4", "who is nobody?")
    output = train.with_name(f"out.{kind}")
    argv = ["data", "questions", train, "--dedupe_against", held_out, "--limit", 5, "--seed", 1, "--output", output]
    assert main(list(map(str, argv))) == 0
    out = capsys.readouterr().out
    assert "dropped             2 of 10, which also occur in\n  nq                2\n" in out
    assert f"{output}: 5 rows" in out
    written = load_questions(output)
    assert written.to_list() == load_questions(train, limit=5, seed=1, exclude=[held_out]).to_list()
    assert written.unique("data_source") == ["mine"]


def test_nothing_is_overwritten_without_overwrite(train: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = train.read_bytes()
    assert "mine.jsonl exists already: give --overwrite" in refused(
        capsys, "questions", train, "--limit", 2, "--output", train
    )
    assert train.read_bytes() == before
    assert main(["data", "questions", str(train), "--limit", "2", "--output", str(train), "--overwrite"]) == 0
    assert len(load_questions(train)) == 2 and list(train.parent.iterdir()) == [train]


def test_impossible_calls_are_refused_in_one_line(train: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for argv, message in [
        (("questions", "bambogle"), "unknown dataset 'bambogle': did you mean 'bamboogle'?"),
        (("questions", train, "--dedupe_against", "nqq"), "unknown dataset 'nqq': did you mean 'nq'?"),
        (("questions", train, "--dedupe_against", train), "every question of"),
        (("questions", train, "--limit", 0), "limit=0 must be at least 1"),
        (("questions", train, "--samples", -1), "samples=-1 must be at least 0"),
        (("audit", train, "--corpus", train, "--passages_per_query", 0), "passages_per_query=0 must be at least 1"),
        (("questions", train, "--output", "x.csv"), "give a file that ends in .parquet or .jsonl"),
        (("questions", train, "--output", "no/such/x.jsonl"), "there is no folder no/such"),
        (("wiki18", "--what", "bm25"), "unknown part of wiki-18 'bm25'"),
        (("wiki18", "--what", ","), "--what is empty"),
        (("wiki18", "--check", "--output", train.parent), "there is no"),
    ]:
        assert message in refused(capsys, *argv)
    assert list(train.parent.iterdir()) == [train]


def test_the_named_columns_are_also_those_of_the_sets_to_drop(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "test.csv").write_text("Frage,Antwort\nwer,A\n")
    (tmp_path / "train.csv").write_text("Frage,Antwort\nWer?,A\nWann?,B\n")
    words = ["--question_field", "Frage", "--answers_field", "Antwort", "--dedupe_against", str(tmp_path / "test.csv")]
    assert main(["data", "questions", str(tmp_path / "train.csv"), *words]) == 0
    assert "dropped             1 of 2" in capsys.readouterr().out


def test_all_means_the_seven_sets(train: Path, capsys: pytest.CaptureFixture[str], monkeypatch) -> None:
    asked: list[Any] = []

    def load(name: Any, fields: Any) -> Any:
        asked.append(name)
        return load_questions(write(train.with_name("none.jsonl"), "something else"))

    monkeypatch.setattr("trl_search.data.load_evaluation_questions", load)
    assert main(["data", "questions", str(train), "--dedupe_against", "all,others.jsonl"]) == 0
    assert asked == ["nq", "triviaqa", "popqa", "hotpotqa", "2wikimultihopqa", "musique", "bamboogle", "others.jsonl"]


# wiki-18


def run(hub: FakeHub, folder: Path, count: int, *more: str) -> subprocess.Popen[str]:
    """The command in a separate process, where the published corpus has `count` passages."""
    program = "import sys, trl_search.data.wiki18_checks as checks; from trl_search.cli.main import main; "
    program += f"checks.PASSAGES = {count}; sys.exit(main(sys.argv[1:]))"
    return subprocess.Popen(
        [sys.executable, "-c", program, "data", "wiki18", "--output", str(folder), *more],
        env={**os.environ, "HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "PYTHONPATH": str(ROOT)},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_a_killed_download_is_resumed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    count = 8000  # 24.6 MB, because huggingface_hub writes 10 MB at a time
    index = faiss.IndexFlatIP(DIM)
    index.add(np.random.default_rng(0).random((count, DIM), dtype=np.float32))
    flat = bytes(faiss.serialize_index(index).tobytes())
    lines = corpus_lines([str(row) for row in range(count)])
    folder = tmp_path / "wiki18"
    parts = {"part_aa": flat[:20_000_000], "part_ab": flat[20_000_000:]}
    with fake_hub({PIECES["e5-flat"].repository: parts, PIECES["corpus"].repository: {ARCHIVE: tar_gz(lines)}}) as hub:
        hub.stall_after = {"part_aa": 15_000_000}
        killed = run(hub, folder, count, "--yes")
        until = time.monotonic() + 180
        while not any(path.stat().st_size >= 10_000_000 for path in folder.glob("*.incomplete")):
            assert killed.poll() is None and time.monotonic() < until
            time.sleep(0.02)
        killed.send_signal(signal.SIGKILL)
        killed.communicate()
        assert not (folder / INDEX).exists()
        came = next(folder.glob("e5*.incomplete")).stat().st_size

        again = run(hub, folder, count, "--yes")
        out, err = again.communicate(timeout=600)
    assert again.returncode == 0, err
    assert hub.ranges == [
        (ARCHIVE, ""), ("part_aa", ""), ("part_aa", f"bytes={came}-"), ("part_ab", ""),
    ]  # fmt: skip
    assert (folder / INDEX).read_bytes() == flat and (folder / CORPUS).read_bytes() == lines
    assert f"{folder / CORPUS} is there" in out and "of it are here already" in out
    assert "e5-flat   checked: 8,000 vectors of 768 dimensions" in out and "; SHA-256 as on the hub\n" in out
    assert (
        "corpus    checked: 8,000 passages, and the ids of 1,001 of them; not compared" in out
        and f"rm {folder / ARCHIVE}" in out
    )
    # The command that is printed as the next one opens the downloaded files.
    options = json.loads(out.split("trl-search serve dense --retriever_options '")[1].split("'")[0])
    assert options["encoder"] == "intfloat/e5-base-v2" and Path(options["faiss_file"]).read_bytes() == flat

    monkeypatch.setattr("trl_search.data.wiki18_checks.PASSAGES", count)
    assert main(["data", "wiki18", "--output", str(folder), "--check"]) == 0
    out = capsys.readouterr().out
    assert out.count("; not compared with the hub\n") == 2 and "whole" not in out


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """Only the corpus, on a hub in this process."""
    monkeypatch.setattr("trl_search.data.wiki18_checks.PASSAGES", 20)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    with fake_hub({PIECES["corpus"].repository: {ARCHIVE: tar_gz(corpus_lines())}}) as hub:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.url)
        template = f"{hub.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
        yield hub


def test_too_little_disk_is_refused(
    hub: FakeHub, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trl_search.data.hub_download.free_bytes", lambda folder: 1000)
    said = refused(capsys, "wiki18", "--what", "corpus", "--output", tmp_path / "new", "--yes")
    assert "0.0 MB are free: take a folder on another disk" in said and not (tmp_path / "new").exists()
    assert hub.ranges == []


def test_it_asks_before_it_downloads(
    hub: FakeHub, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    argv = ["data", "wiki18", "--what", "corpus", "--output", str(tmp_path / "new")]
    assert main(argv) == USER_ERROR  # pytest's stdin is no terminal
    told = capsys.readouterr()
    assert "stdin is not a terminal: give --yes" in told.err
    assert "wiki-18.jsonl.gz" in told.out and "free      " in told.out
    monkeypatch.setattr("sys.stdin.isatty", lambda: True)
    for answer, status in (("", 1), ("n", 1), ("y", 0)):
        assert hub.ranges == [] and not (tmp_path / "new").exists()
        monkeypatch.setattr("builtins.input", lambda prompt, answer=answer: answer)
        assert main(argv) == status
    assert (tmp_path / "new" / CORPUS).read_bytes() == corpus_lines()
    assert "trl-search index --corpus" in capsys.readouterr().out


def test_a_corpus_that_is_not_the_published_one_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    lay(tmp_path, corpus_lines([str(row) for row in range(19)]))
    said = refused(capsys, "wiki18", "--what", "corpus", "--output", tmp_path, "--check")
    assert "has 19 passages and the published corpus 21,015,324" in said
    monkeypatch.setattr("trl_search.data.wiki18_checks.PASSAGES", 19)
    assert main(["data", "wiki18", "--what", "corpus", "--output", str(tmp_path)]) == 0
    assert "the published index 19" in refused(capsys, "wiki18", "--output", tmp_path, "--check")
