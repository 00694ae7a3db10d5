"""`eval` and `serve` report every problem at once, each with its remedy, before anything is loaded."""

from __future__ import annotations

import importlib.util
import socket
from pathlib import Path

import pytest

from tests.support.servers import Said, serving
from trl_search.cli.evaluation_checks import check_server, check_weights
from trl_search.cli.main import main
from trl_search.cli.model_checks import check_template
from trl_search.cli.preflight import Device, Status
from trl_search.retrieval.index.folder import build_index
from trl_search.types import Passage

GPU = Device("small", 1 << 20, 1 << 20)


@pytest.fixture
def without_extras(monkeypatch: pytest.MonkeyPatch) -> None:
    missing, find = ("vllm", "sentence_transformers", "starlette", "ray"), importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name in missing else find(name))


def problems(capsys: pytest.CaptureFixture[str]) -> list[str]:
    said = capsys.readouterr()
    first, *lines = said.err.splitlines()
    assert not said.out and (not lines or first == "trl-search: error: this cannot run here:")
    return [line.strip() for line in lines] or [first]


def test_an_evaluation_reports_every_problem_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], without_extras: None
) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/notes.txt").touch()
    command = ["eval", str(tmp_path / "no/model"), "--datasets", "natural_questions,world2", "--backend", "vllm"]
    command += ["--retriever", "dense", "--retriever-options", f'{{"index": "{tmp_path}/wiki"}}']
    assert main([*command, "--output", str(tmp_path / "mine")]) == 2
    said = problems(capsys)
    for number, (name, words) in enumerate(
        (
            ("output", "holds other files than an evaluation"),
            ("model", "there is no model at"),
            ("packages", "--backend vllm needs vllm: pip install 'trl-search[vllm]'"),
            ("questions", "unknown dataset 'natural_questions'"),
            ("questions", "unknown dataset 'world2'"),
            ("packages", "retriever: dense needs sentence_transformers: pip install 'trl-search[dense]'"),
            ("retriever", f"there is no index folder {tmp_path}/wiki; build it with: trl-search index"),
        )
    ):
        assert said[number].startswith(f"{name}: ") and words in said[number], said


def test_a_server_reports_every_problem_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], without_extras: None
) -> None:
    monkeypatch.delenv("TRL_SEARCH_TOKEN", raising=False)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert main(["serve", str(tmp_path / "wiki"), "--port", port, "--max_queued", "1", "--ray"]) == 2
    said = problems(capsys)
    assert [line.partition(":")[0] for line in said] == ["retriever", "limits", "packages", "address"]
    assert "pip install 'trl-search[ray]'" in said[2] and f"port {port}" in said[3]
    assert main(["serve", "bm52", "--host", "0.0.0.0", "--port", "0"]) == 2
    assert [line.partition(":")[0] for line in problems(capsys)] == ["token", "retriever", "packages"]


def test_a_server_that_is_not_running_is_refused_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def load(*given: object, **options: object) -> None:
        raise AssertionError("the retriever would wait for its server")

    monkeypatch.setattr("trl_search.config.searched.load_retriever", load)
    questions = tmp_path / "q.jsonl"
    questions.write_text('{"question": "who?", "golden_answers": ["me"]}\n')
    for command in (["search", "http://127.0.0.1:9", "who?"], ["eval-retriever", "http://127.0.0.1:9"]):
        assert main([*command, *(["--datasets", str(questions)] if "who?" not in command else [])]) == 2
        said = capsys.readouterr().err
        assert "http://127.0.0.1:9: " in said and said.endswith("start its server: `trl-search serve`\n")


def test_a_truncated_index_is_refused_before_it_is_loaded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    build_index([Passage("1", "Orlune", "A harbour town.")], tmp_path / "wiki")
    (tmp_path / "wiki/corpus.jsonl").write_text("")
    assert main(["serve", str(tmp_path / "wiki"), "--port", "0"]) == 2
    (said,) = problems(capsys)
    assert "corpus.jsonl should have 58 bytes, but has 0" in said


def test_weights_and_template() -> None:
    assert check_weights("tiny", "float32", [GPU]).status is Status.PROBLEM
    assert check_weights("tiny", None, [Device("large", 1 << 40, 1 << 40)]).status is Status.OK
    assert check_template("tiny", "qwen_tools").status is Status.OK
    assert check_template("owner/never-downloaded", "qwen_tools").status is Status.NOTE
    assert check_template("tiny", "qwen_tools", "<|no_such_token|>").status is Status.PROBLEM


def test_a_vllm_server_is_checked_for_the_model_it_serves() -> None:
    assert check_server("http://127.0.0.1:9", None).status is Status.PROBLEM
    with serving(lambda asked: Said({"data": [{"id": "policy"}]})) as server:
        assert check_server(server.url, None).status is Status.OK
        assert check_server(server.url, "other").status is Status.PROBLEM
    with serving(lambda asked: Said({"data": [{"id": "base"}, {"id": "policy", "parent": "base"}]})) as server:
        unnamed = check_server(server.url, None)  # the base would answer
        assert unnamed.status is Status.PROBLEM and "base, policy as --served_model" in unnamed.remedy
        assert check_server(server.url, "policy").status is Status.OK
