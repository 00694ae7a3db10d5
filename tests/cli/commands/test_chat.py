"""`trl-search chat`: one question, questions from a pipe, and a session on a real terminal, with interrupts."""

from __future__ import annotations

import contextlib
import io
import json
import os
import pty
import re
import select
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from tests.support.forked import ForkedProcess
from tests.support.servers import Asked, Said, retrieve_from, serving
from trl_search.cli.main import main
from trl_search.data.world import generate_world
from trl_search.policies.tiny import tiny_policy_path
from trl_search.protocols import load_protocol
from trl_search.retrieval import load_retriever
from trl_search.retrieval.index.folder import build_index
from trl_search.types import Answer, Search

WORLD = generate_world(300, 0)
# A one-hop question, which the tiny policy answers correctly.
QUESTIONS = [question for question in WORLD.questions("test") if question.type == "one_hop"][:2]
ASKED = [question.question for question in QUESTIONS]
TINY = ("chat", "tiny", "--world_passages", "300", "--temperature", "0", "--device", "cpu")


class Pipe(io.StringIO):
    def isatty(self) -> bool:
        return False


def test_one_question(capsys, monkeypatch):
    monkeypatch.setenv("NO_COLOR", "1")
    assert main([*TINY, ASKED[0], "--seed", "3"]) == 0
    lines = capsys.readouterr().out.splitlines()
    order = [next(i for i, line in enumerate(lines) if line.startswith(start)) for start in
             ("<think>", "<tool_call>", "searching: ", "  1. ", "<answer>", "[1 search, ")]  # fmt: skip
    assert order == sorted(order) and lines[-1].endswith("s, seed 3]")
    assert f"<answer> {QUESTIONS[0].golden_answers[0]} </answer>" in lines


def test_a_pipe_of_questions_gives_one_json_object_per_line(capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", Pipe(f"\ufeff{ASKED[0]}\n\n  {ASKED[1]}  \n"))
    assert main([*TINY, "--json", "--seed", "7", "--passages_per_query", "2"]) == 0
    records = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [record["question"] for record in records] == ASKED and [record["seed"] for record in records] == [7, 8]
    for record, question in zip(records, QUESTIONS, strict=True):
        assert record["answer"] in question.golden_answers and record["stop_reason"] == "answer"
        assert [turn["role"] for turn in record["turns"]] == ["assistant", "tool"] * record["searches"] + ["assistant"]
        assert len(record["passages"]) == 2 * len(record["queries"]) and record["failed_searches"] == []
        assert {"id", "title", "url", "score", "text"} == set(record["passages"][0])
        assert record["tokens"]["model"] > 10 and record["seconds"] > 0


def test_a_question_that_is_no_text_is_refused_before_anything_is_loaded(capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", Pipe(f"{ASKED[0]}\nwhere is Z\udcfcrich?\n"))
    assert main([*TINY, "--json"]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and "a question is not UTF-8" in captured.err


def test_a_question_that_is_too_long_is_refused_before_the_first_answer(capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", Pipe(f"{ASKED[0]}\n{'qz' * 1100}\n"))
    assert main([*TINY, "--json"]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and "'qzqz" in captured.err and "is too long: its prompt has 2" in captured.err


def test_without_searches_the_policy_answers_from_memory(capsys):
    main([*TINY, ASKED[0], "--json", "--max_searches", "0"])
    record = json.loads(capsys.readouterr().out)
    assert record["searches"] == 0 and [turn["role"] for turn in record["turns"]] == ["assistant"]


def test_an_index_folder_or_a_server_can_be_searched(tmp_path, capsys):
    build_index(WORLD.passages, tmp_path / "index")
    with serving(retrieve_from(load_retriever("bm25", passages=WORLD.passages))) as server:
        for what in (str(tmp_path / "index"), server.url):
            assert main([*TINY, ASKED[0], "--json", "--retriever", what]) == 0
        assert any(asked.target == "/retrieve" for asked in server.asked)
    records = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert records[0]["passages"] == records[1]["passages"] and records[0]["answer"] == records[1]["answer"]


def test_a_web_search_without_network_fails_and_is_not_empty(tmp_path, capsys):
    options = {
        "provider": "searxng",
        "base_url": "http://127.0.0.1:9",
        "cache": str(tmp_path / "c"),
        "patience_s": 0.2,
    }
    status = main([*TINY, ASKED[0], "--retriever", "web", "--retriever_options", json.dumps(options)])
    out = capsys.readouterr().out
    assert re.search(r"the search failed: searxng: \w+", out)
    assert re.search(r"\d of \d searches failed: the answer may be a guess", out.replace("\n", " "))
    assert "Nothing was found" not in out and status in (0, 1)


def test_a_vllm_server_generates_whole_turns(capsys):
    """A scripted server with the routes of `vllm serve` that a chat uses; only the tokenizer is loaded here."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_policy_path())
    protocol = load_protocol("qwen_tools", tokenizer)
    turns = [protocol.write("a", Search(("town",))), protocol.write("b", Answer("Orlune"))]

    def answer(asked: Asked) -> Said:
        if asked.target == "/collective_rpc":  # as without VLLM_SERVER_DEV_MODE=1
            return Said(status=404)
        if asked.target == "/tokenize":
            return Said({"tokens": [token + shift for token in tokenizer.encode(asked.json["prompt"])]})
        if asked.target != "/v1/completions":
            return Said({"data": [{"id": "tiny", "max_model_len": 2048}], "version": "0.31.0"})
        first = "<tool_response>" not in tokenizer.decode(asked.json["prompt"])
        ids = [*protocol.encode(turns[0 if first else 1]), tokenizer.eos_token_id]
        logprobs = {"token_logprobs": [-0.1] * len(ids)}
        return Said({"choices": [{"token_ids": ids, "logprobs": logprobs, "finish_reason": "stop"}]})

    shift = 0
    with serving(answer) as server:
        assert main([*TINY, ASKED[0], "--json", "--server", server.url, "--served_model", "tiny"]) == 0
        assert main([*TINY, ASKED[0], "--server", server.url, "--served_model", "other"]) == 2
        shift = 1
        assert main([*TINY, ASKED[0], "--json", "--server", server.url]) == 2
    captured = capsys.readouterr()
    assert "has another tokenizer than tiny, so it serves another model" in captured.err
    reply = json.loads(captured.out)
    assert reply["queries"] == ["town"] and reply["answer"] == "Orlune" and len(reply["passages"]) == 3


def test_a_missing_extra_is_named(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "ddgs", None)
    assert main([*TINY, ASKED[0], "--retriever", "web"]) == 2
    assert "pip install 'trl-search[web]'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["./no/model", "q", "--world"], "there is no model at no/model"),
        (["tiny", "q", "--passages_per_query", "0"], "passages_per_query=0 must be at least 1"),
        (
            [str(tiny_policy_path()), "q", "--environment", "trl_search:SearchEnvironment"],
            "no record says what trl_search:SearchEnvironment searches: give --retriever",
        ),
        (["tiny", "q", "--temperature", "-1"], "temperature=-1.0 must be a finite number, at least 0"),
        (["tiny", "q", "--world", "--retriever", "web"], "give only one of them"),
        (["tiny", "q", "--protocol", "qwen_tool"], "did you mean 'qwen_tools'?"),
        (["tiny", "q", "--max_searches", "-1"], "max_searches=-1 must be at least 0"),
        (["tiny", "q", "--retriever", "bm52"], "did you mean 'bm25'?"),
        (["tiny", "q", "--retriever_options", "{"], "--retriever_options is not JSON"),
        (["tiny", "q", "--retriever_options", "[]"], "must be a JSON object"),
        (["tiny", "q", "--server", "http://127.0.0.1:9"], "no vLLM server answers"),
        (["tiny", "q", "--served_model", "policy"], "--served_model is the name of MODEL on a --server"),
        (["tiny", "q", "--retriever", "http://127.0.0.1:9"], "start its server: `trl-search serve`"),
        (["tinny", "q", "--world"], "there is no model tinny: did you mean 'tiny'?"),
        (["tiny", "--world"], "there is no question"),
        (["tiny", " ", "--world"], "the question is empty"),
    ],
)
def test_impossible_calls_are_refused_in_one_line(capsys, monkeypatch, arguments, message):
    monkeypatch.setattr(sys, "stdin", Pipe("\n"))
    assert main(["chat", *arguments]) == 2
    captured = capsys.readouterr()
    error = [line for line in captured.err.splitlines() if line.startswith("trl-search: error: ")]
    assert len(error) == 1 and message in error[0]


class Terminal:
    """A session with the tiny policy on a pseudo-terminal. `until(pattern)` reads until the pattern appears.

    While the folder contains a file `slow`, searches take two minutes.
    """

    def __init__(self, folder: Path) -> None:
        self.master, slave = pty.openpty()
        environment = {**os.environ, "TERM": "xterm-256color"}
        for name in ("NO_COLOR", "FORCE_COLOR", "COLUMNS"):
            environment.pop(name, None)
        self.process = ForkedProcess(
            "tests.support.chat_terminal",
            [str(folder / "slow"), *TINY],
            environment=environment,
            log=folder / "errors.log",
            streams=(slave, slave),
        )
        os.close(slave)
        self.seen, self.at = "", 0

    def type(self, text: str) -> None:
        os.write(self.master, text.encode())

    def until(self, pattern: str, seconds: float = 600) -> str:
        """The output from the end of the last call to the end of the pattern."""
        deadline = time.monotonic() + seconds
        while not (found := re.compile(pattern).search(self.seen, self.at)):
            ready, _, _ = select.select([self.master], [], [], max(0.0, deadline - time.monotonic()))
            assert ready, f"{pattern!r} did not come; the terminal shows: {self.seen[self.at :]!r}"
            self.seen += os.read(self.master, 4096).decode(errors="replace")
        start, self.at = self.at, found.end()
        return self.seen[start : self.at]

    def interrupt(self, then: str) -> str:
        """Sends Ctrl-C and waits for the pattern. Python's readline does not notice an interrupt that comes right
        before it waits for keys; then the end of the line raises it."""
        self.type("\x03")
        with contextlib.suppress(AssertionError):
            return self.until(then, seconds=30)
        self.type("\n")
        return self.until(then)


def plain(shown: str) -> str:
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown)


@pytest.fixture
def terminal(tmp_path: Path) -> Iterator[Terminal]:
    terminal = Terminal(tmp_path)
    yield terminal
    terminal.process.kill()
    os.close(terminal.master)


@pytest.mark.slow
def test_a_session_on_a_terminal(terminal: Terminal, tmp_path: Path):
    prompt = r"(?:\n|\^C)> $"
    # 1. It shows questions that can be asked in this world.
    shown = terminal.until(prompt)
    assert all(question.question in shown for question in WORLD.questions("test", 3))

    # 2. An answer streams in order, in colours.
    terminal.type(f"{ASKED[0]}\n")
    shown = terminal.until(r"seed \d+\]")
    marks = ["\x1b[2;3m<think>", "\x1b[36m<tool_call>", "searching: ", "1. ", "\x1b[1;32m<answer>", "[1 search, "]
    assert sorted(marks, key=shown.index) == marks
    assert f"<answer> {QUESTIONS[0].golden_answers[0]} </answer>" in plain(shown)
    terminal.until(prompt)

    # 3. Ctrl-C during a search returns to the prompt at once, and the next question is answered.
    (tmp_path / "slow").touch()
    terminal.type(f"{ASKED[0]}\n")
    terminal.until("searching: ")
    pressed = time.monotonic()
    terminal.interrupt(prompt)
    assert time.monotonic() - pressed < 60, "it waited for the search"
    (tmp_path / "slow").unlink()
    terminal.type(f"{ASKED[1]}\n")
    assert f"<answer> {QUESTIONS[1].golden_answers[0]} </answer>" in plain(terminal.until(r"seed \d+\]"))
    terminal.until(prompt)

    # 4. Ctrl-C at the prompt ends the line, not the session; commands work.
    terminal.type("half a quest")
    terminal.until("quest")
    terminal.interrupt(prompt)
    for wrong in ("0", "\N{SUPERSCRIPT TWO}"):
        terminal.type(f"/k {wrong}\n")
        terminal.until(prompt)
    terminal.type("/k 1\n")
    terminal.until(prompt)
    terminal.type("qz" * 1100 + "\n")  # more tokens than the model has positions
    terminal.until(prompt)
    told = (tmp_path / "errors.log").read_text()
    assert told.count("write it as /k 5") == 2 and "error: a conversation of 2" in told
    terminal.type("/help\n")
    assert "passages per query (now 1)" in terminal.until(prompt)
    terminal.type(f"{ASKED[0]}\n")
    shown = terminal.until(r"seed \d+\]")
    assert "1. " in shown and "2. " not in shown
    terminal.until(prompt)

    # 5. Ctrl-D ends the session.
    terminal.type("\x04")
    assert terminal.process.wait(timeout=600) == 0
