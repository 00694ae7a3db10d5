"""The recipes that ship: each parses, each takes a step; mistakes in keys and names say what was meant."""

from __future__ import annotations

import json
import math
import shlex
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.trainer_callback import PrinterCallback
from trl import ModelConfig

from trl_search.cli import main
from trl_search.config import SearchGRPOConfig
from trl_search.data import HUB_SETS
from trl_search.errors import UserError
from trl_search.recipe import find_recipe, parse_recipe, shipped_recipes
from trl_search.retrieval import load_retriever
from trl_search.rewards import resolve_rewards
from trl_search.tiny_policy import tiny_policy_path
from trl_search.trainer import SearchGRPOTrainer
from trl_search.training import TaskArguments

ROOT = Path(__file__).parent.parent
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))
# What lets a recipe for GPUs be read on a machine without one.
ON_CPU = ["--use_cpu", "true", "--bf16", "false"]

each_recipe = pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)


def parse(*argv: str) -> tuple[TaskArguments, SearchGRPOConfig, ModelConfig]:
    return parse_recipe([*argv, *ON_CPU], (TaskArguments, SearchGRPOConfig, ModelConfig), usage="trl-search train")


def test_every_recipe_ships() -> None:
    assert {"quickstart", "qwen3b"} <= {path.stem for path in RECIPES} == set(shipped_recipes())


@each_recipe
def test_a_path_and_a_bare_name_mean_the_same(path: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    by_path = parse(str(path))
    monkeypatch.chdir(tmp_path)
    for name in (path.stem, f"recipes/{path.name}"):  # neither is a file here
        task, config, model = parse(name)
        assert task == by_path[0] and model == by_path[2]
        assert config.to_dict() == by_path[1].to_dict()


def test_a_path_away_from_the_checkout_is_the_shipped_recipe(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    assert find_recipe("recipes/qwen3b.yaml").read_bytes() == (ROOT / "recipes/qwen3b.yaml").read_bytes()
    for missing in ("recipes/qwen4b.yaml", "elsewhere/qwen3b.yaml"):
        with pytest.raises(UserError, match=f"there is no recipe {missing}; shipped .*: quickstart, qwen3b"):
            find_recipe(missing)


def test_a_file_of_that_name_comes_before_the_shipped_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes/qwen3b.yaml").write_text("max_searches: 7\n")
    monkeypatch.chdir(tmp_path)
    assert parse("recipes/qwen3b.yaml")[1].max_searches == 7


def test_an_unknown_recipe_names_the_nearest() -> None:
    with pytest.raises(UserError, match="unknown recipe 'quickstrat': did you mean 'quickstart'"):
        parse("quickstrat")


def test_an_unknown_key_of_a_recipe_names_the_nearest(tmp_path: Path) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("max_serches: 3\n")
    with pytest.raises(UserError, match=r"unknown key of .*mine\.yaml 'max_serches': did you mean 'max_searches'"):
        parse(str(recipe))


@pytest.mark.parametrize(
    "option", [["--learning_rat", "1e-5"], ["--learning_rat=1e-5"], ["--learning-rat", "1e-5"]], ids=str
)
def test_an_unknown_option_names_the_nearest(option: list[str]) -> None:
    with pytest.raises(UserError, match="unknown option '--learning_rat': did you mean '--learning_rate'"):
        parse("quickstart", *option)


@pytest.mark.parametrize(("text", "message"), [("a: [1\n", "is not YAML"), ("- a\n", "must be `key: value` lines")])
def test_what_is_not_a_recipe(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "mine.yaml").write_text(text)
    with pytest.raises(UserError, match=message):
        parse(str(tmp_path / "mine.yaml"))


@each_recipe
def test_the_command_line_overrides_the_recipe(path: Path) -> None:
    before = parse(str(path))
    options = ["--learning_rate", "3e-5", "--max_searches", "9", "--reward_funcs", "f1", "--lora_r", "5"]
    task, config, model = parse(str(path), *options)
    assert (config.learning_rate, config.max_searches, task.reward_funcs, model.lora_r) == (3e-5, 9, ["f1"], 5)
    assert config.num_generations == before[1].num_generations and task.questions == before[0].questions


@each_recipe
def test_the_commands_in_its_header_parse(path: Path) -> None:
    header = path.read_text("utf-8").split("\n\n")[0].splitlines()
    commands = [line[1:].strip().split("   ")[0] for line in header if line.startswith("#   ")]
    trained = [shlex.split(command)[2:] for command in commands if command.startswith("trl-search train")]
    assert trained and all(path.stem in command[0] for command in trained)
    for command in trained:
        parse(*command)


@each_recipe
def test_its_batch_is_within_what_is_known_to_be_stable(path: Path) -> None:
    """FIELD.md §3 and §9: ten optimizer steps a batch collapse; top_p below 1 makes log-probs wrong; no vLLM yet."""
    task, config, _ = parse(str(path))
    assert config.steps_per_generation * config.num_iterations <= 2 * config.gradient_accumulation_steps
    assert (config.temperature, config.top_p, config.top_k or 0, config.use_vllm) == (1.0, 1.0, 0, False)
    assert config.mask_observations
    assert task.questions == "world" or {task.questions, task.eval_questions} <= set(HUB_SETS)
    resolve_rewards(task.reward_funcs)
    assert config.reward_weights is None or len(config.reward_weights) == len(task.reward_funcs)


def test_qwen3b_is_the_seeds_run() -> None:
    task, config, model = parse("qwen3b")
    assert (model.model_name_or_path, config.protocol) == ("Qwen/Qwen2.5-3B-Instruct", "qwen_tools")
    assert (task.questions, config.passages_per_query, config.max_searches) == ("nq_hotpotqa", 3, 4)
    assert (config.beta, config.learning_rate, config.max_completion_length) == (1e-3, 1e-6, 4096)
    # 8 processes make the published batch of 512 questions.
    trajectories = 8 * config.per_device_train_batch_size * config.steps_per_generation
    assert trajectories == 512 * config.num_generations


def test_qwen3b_opens_the_index_that_its_header_builds(world, monkeypatch, tmp_path, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    lines = [json.dumps({"id": p.id, "contents": f'"{p.title}"\n{p.text}'}) for p in world.passages[:50]]
    Path("wiki-18.jsonl").write_text("\n".join(lines))
    header = find_recipe("qwen3b").read_text("utf-8")
    command = next(line for line in header.splitlines() if "trl-search index --corpus" in line)
    assert main(shlex.split(command.split("trl-search", 1)[1].split("   ")[0])) == 0
    task = parse("qwen3b")[0]
    found = load_retriever(task.retriever, **json.loads(task.retriever_options)).search([world.passages[7].title], 3)
    assert world.passages[7].title in [passage.title for passage in found[0]]


@each_recipe
def test_a_step_from_the_recipe_with_a_stand_in(path: Path, world, retriever, tmp_path: Path) -> None:
    """Everything of the recipe but its model, its data and its sizes."""
    _, recipe, _ = parse(str(path))
    sizes = {
        "output_dir": tmp_path,
        "per_device_train_batch_size": recipe.num_generations,
        "gradient_accumulation_steps": 1,
        "steps_per_generation": max(1, recipe.steps_per_generation // recipe.gradient_accumulation_steps),
        "max_steps": 1,
        "max_completion_length": 96,
        "max_turn_length": 32,
        "max_observation_length": 40,
        "save_strategy": "no",
        "disable_tqdm": "true",
    }
    options = [word for key, value in sizes.items() for word in (f"--{key}", str(value))]
    task, config, _ = parse(str(path), *options)
    assert config.generation_batch_size % config.num_generations == 0
    rows: list[Any] = [question.row() for question in world.questions("train")[:8]]
    trainer = SearchGRPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(tiny_policy_path()),
        reward_funcs=list(task.reward_funcs),
        args=config,
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(tiny_policy_path()),
        retriever=retriever,
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    logged = trainer.state.log_history[0]
    assert trainer.state.global_step == 1 and math.isfinite(logged["loss"]) and logged["tokens/model"] > 0
    assert {f"rewards/{name}/mean" for name in task.reward_funcs} <= set(logged)
    assert ("kl" in logged) == (config.beta > 0)
