"""Every value of every option of `eval` and `serve` is accepted, or refused in one line before anything is loaded."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from trl_search.cli.commands import eval as eval_command
from trl_search.cli.commands import serve as serve_command
from trl_search.cli.main import USER_ERROR, main
from trl_search.retrieval.index.folder import build_index
from trl_search.types import Passage

# `None`: the option without a value.
ABSURD = (
    None, "", " ", "nonsense", "-1", "0", "nan", "inf", "1" + "0" * 30, "[]", '{"a": {"b": [1]}}', "no/such/folder",
)  # fmt: skip
EVAL = {"datasets": ["--datasets", "world"], "output": ["--output", "out"], "limit": ["--limit", "1"]}
EVERYTHING = [word for words in EVAL.values() for word in words]


@pytest.fixture(autouse=True)
def nothing_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.delenv("TRL_SEARCH_TOKEN", raising=False)
    monkeypatch.setattr("trl_search.evaluation.run.run_evaluation", lambda plan: "")
    monkeypatch.setattr(serve_command, "serve", lambda load, config, listening, loaded: listening.close())
    monkeypatch.setattr("trl_search.retrieval.server.ray_serve.serve_on_ray", lambda *given, **options: None)
    # The templates and weights of the tiny policy do not change.
    monkeypatch.setattr("trl_search.cli.evaluation_checks.checkpoint_checks", lambda plan, devices: [])
    build_index([Passage("1", "Orlune", "A harbour town.")], tmp_path / "wiki")


def options_of(command: Any) -> Iterator[argparse.Action]:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    yield from (action for action in parser._actions if action.option_strings and action.dest != "help")


def outcome(argv: list[str], capsys: pytest.CaptureFixture[str]) -> int:
    """The exit status of a command, which prints no traceback: 0, or 2 with one line that says what is wrong."""
    try:
        status = main(argv)
    except SystemExit as stop:  # argparse's own
        status = int(stop.code or 0)
    said = capsys.readouterr().err.strip().splitlines()
    assert status in (0, USER_ERROR), argv
    if status:
        assert "error: " in "".join(said) and "Traceback" not in "".join(said), argv
    return status


@pytest.mark.parametrize("name", [action.option_strings[-1] for action in options_of(eval_command)])
def test_any_value_of_an_option_of_eval(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    for value in ABSURD:
        rest = [word for key, words in EVAL.items() if f"--{key}" != name for word in words]
        outcome(["eval", "tiny", *rest, name, *([] if value is None else [value])], capsys)


@pytest.mark.parametrize("name", [action.option_strings[-1] for action in options_of(serve_command)])
@pytest.mark.parametrize("ray", [[], ["--ray"]], ids=["alone", "ray"])
def test_any_value_of_an_option_of_serve(name: str, ray: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    for value in ABSURD:
        rest = [] if name == "--port" else ["--port", "0"]
        outcome(["serve", "wiki", *rest, *ray, name, *([] if value is None else [value])], capsys)


@pytest.mark.parametrize("value", [word for word in ABSURD if word])
def test_any_model_and_anything_to_serve(
    value: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert outcome(["serve", value, "--port", "0"], capsys) == USER_ERROR
    monkeypatch.undo()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert outcome(["eval", value, *EVERYTHING], capsys) == USER_ERROR


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["eval", "tiny", "--temperature", "nan"], "temperature=nan must be a finite number, at least 0"),
        (["eval", "tiny", "--search_timeout_s", "inf"], "search_timeout_s=inf must be a finite number above 0"),
        (["eval", "tiny", "--dtype", "float8"], "there is no dtype 'float8'"),
        (["eval", "tiny", "--device", "gpu"], "there is no device 'gpu'"),
        (["serve", "wiki", "--search_timeout_s", "nan"], "search_timeout_s=nan must be"),
        (["serve", "bm25", "--retriever_options", '{"index": 3}'], "index must be a string, not 3"),
        (["serve", "wiki", "--replicas", "2"], "--replicas needs --ray"),
        (["serve", "wiki", "--ray", "--replica_cpus", "nan"], "cpus=nan must be a finite number above 0"),
        (["serve", "wiki", "--ray", "--ray_address", ""], "the address of the Ray cluster is empty"),
    ],
)
def test_values_that_were_once_accepted_and_failed_later_are_refused(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    more = EVERYTHING if words[0] == "eval" else ["--port", "0"]
    assert main([*words, *more]) == USER_ERROR
    assert message in capsys.readouterr().err


def test_a_search_for_no_passages_is_refused_before_the_index_is_opened(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["search", "no index", "who?", "--passages_per_query", "0"]) == USER_ERROR
    assert "passages_per_query=0 must be at least 1" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["-1", "[]", "{}", "a b", ""])
def test_a_name_that_the_hub_would_refuse_is_not_a_model(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "quickstart", f"--model_name_or_path={name}"]) == USER_ERROR
    said = capsys.readouterr().err
    assert "names no model: give a folder" in said or "model_name_or_path is missing" in said
