"""`trl-search data filter`: which questions it keeps, with which pass rates, and that training reads them."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest
from datasets import load_dataset

from trl_search.cli.main import USER_ERROR, main
from trl_search.common.errors import UserError
from trl_search.data import load_evaluation_questions, load_questions
from trl_search.data.world import generate_world
from trl_search.evaluation.answers_file import Records
from trl_search.evaluation.outcomes import Outcome
from trl_search.evaluation.settings import OtherSettings
from trl_search.trainer.groups.pass_rates import PassRates

QUESTIONS = [{"id": f"q{i}", "question": f"who is number {i}?", "golden_answers": ["x"]} for i in range(4)]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "mine.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in QUESTIONS))
    return path


@pytest.fixture
def answered(monkeypatch: pytest.MonkeyPatch) -> list[argparse.Namespace]:
    """Replaces the evaluation: question i is solved in i of its 3 samples; for the last one all searches failed."""
    calls = []

    def evaluate(args: argparse.Namespace) -> str:
        calls.append(args)
        rows = load_dataset("json", data_files=args.datasets, split="train")
        Path(args.output).mkdir()
        records = Records(Path(args.output), "search", "asked")
        for place, row in enumerate(rows):
            number, sample = map(int, row["id"].split("-"))
            records.append(place, outcome(row, em=float(sample < number), failed=number == 3))
        records.close()
        return "the table of results"

    monkeypatch.setattr("trl_search.cli.commands.eval.evaluate", evaluate)
    return calls


def outcome(row: dict[str, Any], *, em: float, failed: bool) -> Outcome:
    numbers = dict.fromkeys(["f1", "contains", "read", "latency_s"], 0.0) | dict.fromkeys(
        ["searches", "turns", "malformed", "model_tokens", "observation_tokens", "reflections"], 0
    )
    known = {"id": row["id"], "data_source": "asked", "question": row["question"], "golden_answers": ("x",)}
    stop = "retrieval_failed" if failed else "answer"
    return Outcome(**known, answer="x", em=em, stop_reason=stop, error="", **numbers)


def filtered(source: Path, *options: str) -> Path:
    output = source.with_name("out.parquet")
    argv = ["data", "filter", source, "--model", "tiny", "--pass_at", 3, "--output", output, *options]
    assert main(list(map(str, argv))) == 0
    return output


def test_questions_that_are_sometimes_solved_are_written_with_pass_rates(source, answered, capsys):
    written = load_questions(filtered(source))
    assert written.to_list() == [
        {**QUESTIONS[number], "data_source": "mine", "pass_rate": number / 3} for number in (1, 2)
    ]
    out = capsys.readouterr().out
    assert "never solved      1\n" in out and "sometimes         2\n" in out and "searches failed   1\n" in out
    assert len(answered) == 1 and answered[0].modes == ["search"] and answered[0].temperature == 1.0
    asked = load_dataset("json", data_files=answered[0].datasets, split="train")
    assert len(asked) == 12 and len(set(asked["id"])) == 12


def test_keep_all_keeps_all_questions_and_an_evaluation_ignores_the_rates(source, answered):
    output = filtered(source, "--keep", "all")
    rated = load_questions(output)
    assert rated["pass_rate"] == [0, 1 / 3, 2 / 3]
    assert PassRates(rated).weights_N.tolist() == [0.5, 1, 1]
    assert "pass_rate" not in load_evaluation_questions(output).column_names


@pytest.mark.parametrize(
    ("options", "cause"),
    [
        (["--pass_at", "1"], "at least 2"),
        (["--temperature", "0"], "same answer each time"),
        (["--output", "out.txt"], "ends in .parquet or .jsonl"),
    ],
)
def test_options_that_give_no_rates_are_refused_before_anything_is_asked(source, answered, capsys, options, cause):
    argv = ["data", "filter", str(source), "--model", "tiny", "--output", str(source.with_name("out.jsonl")), *options]
    assert main(argv) == USER_ERROR and cause in capsys.readouterr().err and not answered


def test_answers_of_another_filtering_are_named_with_their_folder(source, monkeypatch, capsys):
    def differs(args: argparse.Namespace) -> str:
        raise OtherSettings(Path(args.output), "sets.asked.asked: 36 there, 15 now")

    monkeypatch.setattr("trl_search.cli.commands.eval.evaluate", differs)
    output = source.with_name("out.jsonl")
    assert main(["data", "filter", str(source), "--model", "tiny", "--output", str(output)]) == USER_ERROR
    said = capsys.readouterr().err
    assert f"{output}.asked holds answers from other settings (sets.asked.asked: 36 there, 15 now)" in said
    assert "remove that folder, or give another --output" in said


@pytest.mark.parametrize("rate", ['"half"', "1.5", "true"])
def test_an_invalid_rate_is_refused_with_its_line(source, rate):
    source.write_text(json.dumps(QUESTIONS[0])[:-1] + f', "pass_rate": {rate}}}\n')
    with pytest.raises(UserError, match="line 1: pass_rate must be a number from 0 to 1"):
        load_questions(source)


def test_the_tiny_policy_answers_in_its_world(tmp_path, capsys):
    world = generate_world(passages=300, seed=0)
    rows = [question.row() for question in world.questions("test", limit=3)]
    rows[0]["golden_answers"] = ["nobody says this"]
    (tmp_path / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = ["--retriever", "world", "--world_passages", "300", "--device", "cpu", "--keep", "all"]
    rated = load_questions(filtered(tmp_path / "mine.jsonl", *options))
    assert rated["pass_rate"][0] == 0 and rated["pass_rate"][1] > 0 and len(rated) == 3
    assert "results.md" not in capsys.readouterr().out, "the report of the evaluation is printed, too"
