"""A recipe runs or is refused in one line, whatever values its keys have."""

from __future__ import annotations

import dataclasses
import random
from pathlib import Path
from typing import Any

import pytest
import yaml
from trl import ModelConfig

from trl_search.cli.main import main
from trl_search.common.errors import UserError
from trl_search.config.grpo import SearchGRPOConfig
from trl_search.config.recipe import build_arguments, recipe_values, shipped_recipes
from trl_search.config.recipe_values import checked_values
from trl_search.config.task import TaskArguments

CLASSES = (TaskArguments, SearchGRPOConfig, ModelConfig)
ABSURD: list[Any] = [None, True, False, -1, 10**30, float("nan"), "", "nonsense", [], [[]], {}, {"a": {"b": [1]}}]
KEYS = sorted({field.name for cls in CLASSES for field in dataclasses.fields(cls) if field.init})


@pytest.mark.parametrize(
    ("key", "given", "expected"),
    [
        ("save_strategy", False, "no"),
        ("learning_rate", "1e-6", 1e-6),
        ("learning_rate", 1, 1.0),
        ("max_searches", 3.0, 3),
        ("max_searches", "3", 3),
        ("bf16", "yes", True),
        ("reward_funcs", "em", ["em"]),
        ("reward_weights", 1, [1.0]),
        ("run_name", 2026, "2026"),
        ("retriever_options", {"index": "indexes/wiki"}, '{"index": "indexes/wiki"}'),
        ("chat_template_kwargs", {"enable_thinking": False}, {"enable_thinking": False}),
        ("max_train_questions", None, None),
    ],
)
def test_a_value_with_one_meaning_is_converted(key: str, given: Any, expected: Any) -> None:
    value = checked_values({key: given}, CLASSES, "mine.yaml")[key]
    assert value == expected and type(value) is type(expected)


@pytest.mark.parametrize(
    ("key", "given", "message"),
    [
        ("learning_rate", "fast", "learning_rate is 'fast', but must be a number"),
        ("learning_rate", None, "learning_rate is empty, but must be a number"),
        ("max_searches", 2.5, "max_searches is 2.5, but must be a whole number"),
        ("max_searches", True, "max_searches is True, but must be a whole number"),
        ("bf16", "maybe", "bf16 is 'maybe', but must be true or false"),
        ("reward_funcs", {"em": 1}, r"reward_funcs is {'em': 1}, but must be a list \(a string each\)"),
        ("reward_weights", ["one"], r"must be a list \(a number each\)"),
        ("system_prompt", True, "system_prompt is True, but must be a string"),
        ("save_strategy", 3, "save_strategy is 3, but must be one of no, steps, epoch, best"),
    ],
)
def test_a_value_without_a_meaning_is_refused(key: str, given: Any, message: str) -> None:
    with pytest.raises(UserError, match=f"^mine.yaml: .*{message}"):
        checked_values({key: given}, CLASSES, "mine.yaml")


def test_every_wrong_key_is_named_at_once() -> None:
    with pytest.raises(UserError, match=r"learning_rate is 'fast'.*; max_searches is 'many'"):
        checked_values({"learning_rate": "fast", "max_searches": "many"}, CLASSES, "mine.yaml")


def test_any_value_of_any_key_gives_a_configuration_or_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Our keys with every value, TRL's keys with two each: all combinations would take minutes."""
    monkeypatch.chdir(tmp_path)
    ours = {field.name for field in dataclasses.fields(TaskArguments)} | set(SearchGRPOConfig.__annotations__)
    draw = random.Random(0)
    recipe = tmp_path / "mine.yaml"
    for key in KEYS:
        for value in draw.sample(ABSURD, 4 if key in ours else 1):
            recipe.write_text(
                yaml.safe_dump({"model_name_or_path": "tiny", "use_cpu": True, "bf16": False, key: value})
            )
            try:
                build_arguments(recipe_values([str(recipe)], CLASSES, command="train"), CLASSES)
            except UserError as error:
                assert str(error) and "\n" not in str(error), (key, value)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "no recipe is given: run trl-search train RECIPE, where RECIPE is a file or one of quickstart, qwen"),
        (["quickstart", "--learning_rate", "fast"], "--learning_rate"),
        (["quickstart", "--learning_rate"], "--learning_rate"),
        (["quickstart", "--num_generations", "7"], "num_generations"),
        (["quickstart", "--save_strategy", "sometimes"], "invalid choice: 'sometimes'"),
    ],
)
def test_mistakes_on_the_command_line_are_reported_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)  # an existing quickstart run would be a second mistake
    assert main(["train", *words]) == 2
    said = capsys.readouterr().err
    assert "trl-search: error: " in said and message in said.splitlines()[-1] and "Traceback" not in said


def test_the_baselines_of_a_recipe_can_be_left_out() -> None:
    for words, baselines in (([], ["direct", "rag"]), (["--baselines", "none"], [])):
        task, *_ = build_arguments(recipe_values(["quickstart", *words], CLASSES, command="train"), CLASSES)
        assert task.baselines == baselines


def test_the_help_is_short_and_lists_recipes_and_our_keys(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--help"]) == 0
    short = capsys.readouterr().out
    assert "usage: trl-search train RECIPE" in short and "  qwen3b " in short and "  sft_world " not in short
    assert "--passages_per_query" in short and "--num_generations" not in short and len(short.splitlines()) < 200
    assert main(["train", "--help-all"]) == 0
    assert "--num_generations" in capsys.readouterr().out


def test_recipes_can_be_listed_shown_and_copied(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["recipes"]) == 0
    listed = capsys.readouterr().out
    assert all(f"  {name} " in listed for name in shipped_recipes())
    assert main(["recipes", "show", "quickstart"]) == 0
    assert capsys.readouterr().out == shipped_recipes()["quickstart"].read_text("utf-8")
    assert main(["recipes", "copy", "quickstart", "mine.yaml"]) == 0
    assert (tmp_path / "mine.yaml").read_bytes() == shipped_recipes()["quickstart"].read_bytes()
    assert capsys.readouterr().out == "mine.yaml: edit it, then run trl-search train mine.yaml\n"
    assert main(["recipes", "copy", "sft_world"]) == 0
    assert capsys.readouterr().out == "sft_world.yaml: edit it, then run trl-search sft sft_world.yaml\n"
    assert main(["recipes", "copy", "quickstart", "mine.yaml"]) == 2
    assert main(["recipes", "show"]) == 2
    assert "no recipe given" in capsys.readouterr().err
