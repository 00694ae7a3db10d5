"""`trl-search eval` with the shipped policy: killed and resumed, on two processes, and what it refuses."""

from __future__ import annotations

import json
import os
import shutil
import threading
import time
from pathlib import Path

import pytest
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from tests.support.forked import ForkedProcess
from tests.support.servers import Said, retrieve_from, serving
from tests.support.two_ranks import run_ranks
from trl_search.cli.main import USER_ERROR, main
from trl_search.evaluation.answers_file import Records
from trl_search.evaluation.backends import Backend, open_policy
from trl_search.policies.loading import load_tokenizer
from trl_search.policies.tiny import tiny_policy_path
from trl_search.retrieval.index.folder import build_index

QUESTIONS = 10


@pytest.fixture(scope="module")
def questions(tmp_path_factory, world):
    """Ten questions in FlashRAG's layout: nq/test.jsonl."""
    path = tmp_path_factory.mktemp("questions") / "nq" / "test.jsonl"
    path.parent.mkdir()
    rows = [question.row() for question in world.questions("test", limit=QUESTIONS)]
    keys = ("id", "question", "golden_answers")
    lines = [json.dumps({**{key: row[key] for key in keys}, "metadata": {}}) for row in rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def index(tmp_path_factory, world):
    folder = tmp_path_factory.mktemp("indexes") / "world"
    build_index(world.passages, folder)
    return folder


def results(folder):
    report = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    for by_set in report["results"].values():
        for one in by_set.values():
            one.pop("latency_s")
    return report["results"]


def records(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.mark.slow
def test_a_killed_evaluation_asks_no_question_twice(tmp_path, questions, retriever, capsys):
    """In `rag` mode the server sees every question; greedy answers are the same with and without the kill."""
    answer, held, asked = retrieve_from(retriever), threading.Event(), []

    def answer_some(request):
        asked.extend(query for query in request.json["queries"] if query != "probe")  # of the first second
        if len(asked) > 6:
            held.wait()
        return answer(request)

    with serving(answer_some) as server:
        command = ["tiny", "--datasets", str(questions), "--modes", "rag,search", "--retriever", server.url]
        command += ["--concurrency", "2", "--output"]
        words = ["eval", *command, str(tmp_path / "killed")]
        killed = ForkedProcess("trl_search", words, environment=os.environ, log=tmp_path / "killed.log")
        path = tmp_path / "killed" / "rag-nq.jsonl"
        try:
            while not path.exists() or path.read_bytes().count(b"\n") < 4:
                assert killed.poll() is None, killed.output()
                time.sleep(0.05)
        finally:
            killed.kill()
            killed.wait()
        finished = records(path)
        assert 4 <= len(finished) < QUESTIONS and not (tmp_path / "killed" / "results.json").exists()
        with path.open("ab") as file:
            file.write(b'{"index": 9, "id": "test-9", "quest')  # as after a power failure
        held.set()
        asked.clear()
        assert main(["eval", *command, str(tmp_path / "killed")]) == 0
        of_the_set = {json.loads(line)["question"] for line in questions.read_text().splitlines()}
        again = [query for query in asked if query in of_the_set]
        assert sorted(again) == sorted(of_the_set - {record["question"] for record in finished})
        assert main(["eval", *command, str(tmp_path / "whole")]) == 0
        capsys.readouterr()
        assert results(tmp_path / "killed") == results(tmp_path / "whole")
        before = len(asked)
        assert main(["eval", *command, str(tmp_path / "killed")]) == 0  # no question is left
        assert len(asked) == before and "| **rag**, measured here |" in capsys.readouterr().out
    for mode in ("rag", "search"):
        lines = records(tmp_path / "killed" / f"{mode}-nq.jsonl")
        assert sorted(line["index"] for line in lines) == list(range(QUESTIONS))
    assert results(tmp_path / "whole")["search"]["nq"]["em"] > 0.7


def test_answers_that_vanish_are_missed_and_asked_again(tmp_path, questions, capsys, monkeypatch):
    command = ["eval", "tiny", "--datasets", str(questions), "--modes", "direct", "--output", str(tmp_path / "out")]
    close = Records.close

    def lose_half(records):
        close(records)
        records.path.write_bytes(b"".join(records.path.read_bytes().splitlines(keepends=True)[: QUESTIONS // 2]))

    with monkeypatch.context() as patch:
        patch.setattr(Records, "close", lose_half)
        assert main(command) == USER_ERROR
    assert "5 of 10 answers are no longer in" in capsys.readouterr().err
    assert main(command) == 0
    assert len(records(tmp_path / "out" / "direct-nq.jsonl")) == QUESTIONS


@pytest.mark.slow
def test_two_processes_share_the_questions(tmp_path, questions, capsys):
    command = ["tiny", "--datasets", str(questions), "--modes", "direct", "--output"]
    said = run_ranks("trl_search", ["eval", *command, str(tmp_path / "two")], tmp_path)
    shares = [records(tmp_path / "two" / f"direct-nq{rank}.jsonl") for rank in ("", ".rank1")]
    assert [sorted(line["index"] for line in share) for share in shares] == [[0, 2, 4, 6, 8], [1, 3, 5, 7, 9]]
    assert [text.count("# Evaluation of tiny") for text in said] == [1, 0]
    assert main(["eval", *command, str(tmp_path / "one")]) == 0
    assert results(tmp_path / "two") == results(tmp_path / "one")
    # One process resumes what two processes began: all answers are there.
    assert main(["eval", *command, str(tmp_path / "two")]) == 0
    assert len(records(tmp_path / "two" / "direct-nq.jsonl")) == 5


def test_everything_that_determines_the_scores_is_recorded(tmp_path, questions, index, capsys):
    command = ["eval", "tiny", "--datasets", str(questions), "--retriever", str(index), "--limit", "4"]
    command += ["--published", "3B", "--output", str(tmp_path / "out")]
    assert main([*command, "--modes", "direct"]) == 0
    assert main([*command, "--modes", "direct,rag"]) == 0  # a mode may be added
    report = json.loads((tmp_path / "out" / "results.json").read_text())
    settings = report["settings"]
    assert settings["model_name"] == "tiny" and len(settings["model"]["sha256"]) == 64
    assert (settings["backend"]["name"], settings["dtype"]) == ("transformers", "float32")
    assert settings["sampling"] == {"temperature": 0.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "seed": 0}
    assert settings["agent"]["protocol"] == "qwen_tools" and settings["agent"]["passages_per_query"] == 3
    assert 'Doc 1(Title: "{title}") {text}' in settings["prompts"]["rag"]
    assert (
        settings["retriever"]["kind"] == "bm25" and len(settings["retriever"]["indexes"][0]["manifest_sha256"]) == 64
    )
    nq = settings["sets"]["nq"]
    assert (nq["asked"], nq["total"], nq["source"]) == (4, QUESTIONS, str(questions)) and len(nq["fingerprint"]) == 16
    assert [set(session) for session in settings["sessions"]] == [
        {"started_at", "command", "concurrency", "engine_options", "versions", "git", "hardware"}
    ] * 2
    assert "torch" in settings["sessions"][0]["versions"] and len(report["settings_hash"]) == 16
    rag = report["results"]["rag"]["nq"]
    assert rag["questions"] == 4 and rag["failed"] == 0 and rag["latency_s"] > 0 and rag["model_tokens"] > 0
    markdown = (tmp_path / "out" / "results.md").read_text()
    assert markdown in capsys.readouterr().out
    assert "| 3B RAG [2°] | 0.348 |" in markdown and "**NQ is a sample: 4 of 10 questions.**" in markdown


def test_other_settings_are_refused_and_nothing_is_overwritten(tmp_path, questions, capsys):
    command = ["eval", "tiny", "--datasets", str(questions), "--modes", "direct", "--limit", "2"]
    command += ["--output", str(tmp_path / "out")]
    assert main(command) == 0
    files = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    capsys.readouterr()
    for change, difference in (
        (["--temperature", "0.7"], "sampling.temperature: 0.0 there, 0.7 now"),
        (["--max_turn_length", "50"], "agent.max_turn_length: 96 there, 50 now"),
        (["--limit", "3"], "sets.nq.asked: 2 there, 3 now"),
        (["--dtype", "bfloat16"], 'dtype: "float32" there, "bfloat16" now'),
    ):
        assert main([*command, *change]) == 2
        assert difference in capsys.readouterr().err
    assert files == {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}


def test_a_broken_retriever_stops_the_evaluation_and_is_named(tmp_path, questions, capsys):
    def answer(request):
        if request.json["queries"] == ["probe"]:  # the check before the run succeeds
            return Said({"result": [[]]})
        return Said({"error": "the index is on fire"}, 422)

    with serving(answer) as server:
        command = ["eval", "tiny", "--datasets", str(questions), "--modes", "rag", "--retriever", server.url]
        assert main([*command, "--output", str(tmp_path / "out")]) == 2
        said = capsys.readouterr().err
        assert "rag, nq: the search of 1 of 1 questions failed" in said and "on fire" in said
        assert not (tmp_path / "out" / "results.json").exists()
        assert main([*command, "--output", str(tmp_path / "all"), "--max_failed_share", "1"]) == 0
    report = json.loads((tmp_path / "all" / "results.json").read_text())  # NaN is not JSON
    rag = report["results"]["rag"]["nq"]
    assert rag["em"] is None and rag["failed"] == QUESTIONS and "on fire" in next(iter(rag["errors"]))
    assert "no answers" in (tmp_path / "all" / "results.md").read_text()


def test_a_model_on_the_hub_is_identified_by_its_revision(tmp_path, questions, monkeypatch, capsys):
    """The cache of the hub's client, as after a download; the real code finds the model there without a network."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "hub" / "models--acme--tiny-3b"
    shutil.copytree(tiny_policy_path(), repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("transformers.utils.hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    command = ["eval", "acme/tiny-3b", "--datasets", str(questions), "--modes", "direct", "--limit", "2"]
    assert main([*command, "--output", str(tmp_path / "out")]) == 0
    settings = json.loads((tmp_path / "out" / "settings.json").read_text())
    assert settings["model"] == {"name": "acme/tiny-3b", "revision": commit}
    assert "[2°]" not in (tmp_path / "out" / "results.md").read_text()  # 3.5 million parameters, whatever its name


def test_an_adapter_folder_is_evaluated_as_base_model_with_adapter(tmp_path):
    base = AutoModelForCausalLM.from_pretrained(tiny_policy_path())
    config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    adapted = get_peft_model(base, config)
    adapted.save_pretrained(tmp_path / "adapter")
    tokenizer = load_tokenizer(str(tmp_path / "adapter"))
    merged = adapted.merge_and_unload()
    ids = tokenizer("Who wrote it?", return_tensors="pt")
    with open_policy(Backend(device="cpu"), str(tmp_path / "adapter"), tokenizer) as (policy, facts):
        found = policy.model(**ids).logits
    assert facts["dtype"] == "float32"
    assert (found - merged(**ids).logits).abs().max() < 1e-3
    plain = AutoModelForCausalLM.from_pretrained(tiny_policy_path())
    assert (found - plain(**ids).logits).abs().max() > 0.1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nowhere/to/be/found", "--datasets", "FILE"], "there is no model at nowhere/to/be/found"),
        (["tiny", "--datasets", "nqq"], "unknown dataset 'nqq': did you mean 'nq'? There are: 2wiki"),
        (["tiny", "--datasets", "gone.jsonl"], "there is no file gone.jsonl"),
        (["tiny", "--datasets", "EMPTY"], "has no golden answer"),
        (["tiny", "--datasets", "world,FILE"], "without other sets"),
        (
            ["tiny", "--datasets", "FILE", "--modes", "agent"],
            "unknown mode 'agent': did you mean 'rag'? There are: cot",
        ),
        (
            ["tiny", "--datasets", "FILE", "--modes", "direct,search"],
            "--modes search needs something to search: give --retriever",
        ),
        (["tiny", "--datasets", "FILE", "--limit", "0"], "limit=0 must be at least 1"),
        (["tiny", "--datasets", "FILE", "--backend", "vlm"], "unknown backend 'vlm': did you mean 'vllm'"),
        (["tiny", "--datasets", "FILE", "--temperature", "-1"], "temperature=-1.0 must be"),
        (["tiny", "--datasets", "FILE", "--max_searches", "-1"], "max_searches=-1 must be at least 0"),
        (["tiny", "--datasets", "FILE", "--concurrency", "0"], "concurrency=0 must be at least 1"),
        (
            ["tiny", "--datasets", "FILE", "--max_failed_share", "5"],
            "max_failed_share=5.0 must be a number from 0 to 1",
        ),
        (["tiny", "--datasets", "FILE", "--retriever_options", "[]"], "must be a JSON object"),
        (["tiny", "--datasets", "FILE", "--protocol", "qwen"], "unknown protocol 'qwen'"),
    ],
)
def test_mistakes_are_reported_in_one_line_and_nothing_is_written(tmp_path, questions, capsys, arguments, said):
    empty = tmp_path / "empty.jsonl"
    empty.write_text('{"question": "who?", "golden_answers": []}\n')
    words = [word.replace("FILE", str(questions)).replace("EMPTY", str(empty)) for word in arguments]
    if "--modes" not in words:
        words += ["--modes", "direct"]
    assert main(["eval", *words, "--output", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_the_help_describes_the_options(capsys):
    with pytest.raises(SystemExit):
        main(["eval", "--help"])
    shown = " ".join(capsys.readouterr().out.split())
    for option in ("--modes", "--datasets", "--retriever", "--backend", "--max_failed_share", "--published"):
        assert option in shown
    assert "does not repeat finished questions" in shown and Path("docs/evaluation.md").name in shown
