"""`environment:` in a recipe: one key for training, evaluation, chat and publishing, here without a search."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from trl_search.cli.main import main

CALCULATOR = "tests.support.calculator:Calculator"
SMALL = {
    "model_name_or_path": "tiny",
    "environment": CALCULATOR,
    "environment_options": '{"max_calls": 2}',
    "questions": "sums.jsonl",
    "eval_questions": "held_out.jsonl",
    "output_dir": "run",
    "per_device_train_batch_size": 4,
    "num_generations": 4,
    "max_steps": 1,
    "logging_steps": 1,
    "max_completion_length": 48,
    "max_turn_length": 24,
    "use_cpu": "true",
    "bf16": "false",
    "report_to": "none",
    "save_strategy": "no",
    "disable_tqdm": "true",
}


def options(**changed: object) -> list[str]:
    return [word for key, value in {**SMALL, **changed}.items() for word in (f"--{key}", str(value))]


@pytest.fixture
def sums(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name, first in (("sums.jsonl", 0), ("held_out.jsonl", 20)):
        rows = [{"question": f"What is {n} + {n}?", "golden_answers": [str(2 * n)]} for n in range(first, first + 4)]
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


@pytest.mark.slow
def test_one_key_from_training_to_the_hub(sums: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", *options()]) == 0
    told = capsys.readouterr().out
    assert "calls per question" in told and f"trl-search chat run --environment {CALCULATOR} " in told
    info = json.loads((sums / "run" / "run.json").read_text())
    assert info["environment"]["options"]["max_calls"] == 2 and info["config"]["environment"] == CALCULATOR
    assert "call the tool add" in info["prompt"] and "search" not in info["prompt"]
    logged = [json.loads(line) for line in (sums / "run" / "metrics.jsonl").read_text().splitlines()]
    (step,) = (row for row in logged if "loss" in row)
    assert "tools/calls" in step and "search/searches" not in step

    # Code that only a folder names is not run; the command must name it.
    asked = ["eval", "run", "--datasets", "held_out.jsonl", "--output", "measured", "--device", "cpu"]
    assert main(asked) == 2
    assert f"name it: --environment {CALCULATOR}" in capsys.readouterr().err
    assert main([*asked, "--environment", CALCULATOR]) == 0
    told = capsys.readouterr().out
    assert " calls (4 questions" in told and f"environment {CALCULATOR}" in told
    assert json.loads((sums / "measured" / "settings.json").read_text())["agent"]["environment_options"] == {
        "max_calls": 2
    }

    question = ["chat", "run", "What is 1 + 1?", "--json", "--device", "cpu", "--temperature", "0"]
    main([*question, "--environment", CALCULATOR])
    assert json.loads(capsys.readouterr().out)["searches"] == 0
    assert main([*question, "--environment", CALCULATOR, "--retriever", "web"]) == 2
    assert "takes no retriever: leave --retriever out" in capsys.readouterr().err

    assert main(["push", "run", "me/adder", "--dry_run"]) == 0
    for card in (sums / "run").glob("README*.md"):
        told = card.read_text()
        assert "calls tools (add)" in told and "calls per question" in told
        assert f' --environment {CALCULATOR} "..."' in told


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"environment": "calculater"}, "unknown environment 'calculater'"),
        ({"environment": "no_such_module:World"}, "cannot be imported"),
        ({"environment_options": "max_calls=2"}, "environment_options is not JSON"),
        ({"environment_options": '{"max_cals": 2}'}, "unexpected keyword argument 'max_cals'"),
        ({"warm_start_steps": 2, "questions": "world"}, "warm_start_steps shows searches"),
        ({"protocol": "search_r1"}, "'search_r1' has tags for search only, not for .* 'add'"),
    ],
)
def test_mistakes_are_reported_in_one_line(
    sums: Path, capsys: pytest.CaptureFixture[str], changed: dict[str, object], message: str
) -> None:
    import re

    assert main(["train", *options(**changed)]) == 2
    said = capsys.readouterr().err
    assert re.search(message, said) and "Traceback" not in said
