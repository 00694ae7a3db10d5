"""The shipped recipes: each parses and takes a step; errors in keys and names suggest what was meant."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.trainer_callback import PrinterCallback
from trl import ModelConfig

from trl_search.cli.main import main
from trl_search.common.errors import UserError
from trl_search.config.grpo import SearchGRPOConfig
from trl_search.config.recipe import _OF_OTHERS, build_arguments, find_recipe, recipe_values, shipped_recipes
from trl_search.config.task import TaskArguments, set_names
from trl_search.data import HUB_SETS
from trl_search.policies.adapters import adapter_config
from trl_search.policies.tiny import tiny_policy_path
from trl_search.retrieval import load_retriever
from trl_search.rewards import resolve_rewards
from trl_search.trainer.cold_start.arguments import ColdStartArguments
from trl_search.trainer.cold_start.run import run_sft
from trl_search.trainer.grpo import SearchGRPOTrainer
from trl_search.trainer.sft import SearchSFTConfig

ROOT = Path(__file__).parents[2]
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))
SFT = [path for path in RECIPES if "sft" in path.stem.split("_")]
GRPO = [path for path in RECIPES if path not in SFT]
ACCELERATE = sorted((ROOT / "recipes/accelerate").glob("*.yaml"))
# Options with which a recipe for GPUs can be parsed on a machine without one.
ON_CPU = ["--use_cpu", "true", "--bf16", "false"]
# Parameters, layers, and width of keys and values of the models that the headers name.
QWEN_3B, QWEN_7B = (3.09e9, 36, 256), (7.62e9, 28, 512)

each_recipe = pytest.mark.parametrize("path", GRPO, ids=lambda path: path.stem)
each_sft_recipe = pytest.mark.parametrize("path", SFT, ids=lambda path: path.stem)


def parse(*argv: str) -> tuple[TaskArguments, SearchGRPOConfig, ModelConfig]:
    classes = (TaskArguments, SearchGRPOConfig, ModelConfig)
    return build_arguments(recipe_values([*argv, *ON_CPU], classes, command="train"), classes)


def parse_sft(*argv: str) -> tuple[ColdStartArguments, SearchSFTConfig, ModelConfig]:
    classes = (ColdStartArguments, SearchSFTConfig, ModelConfig)
    return build_arguments(recipe_values([*argv, *ON_CPU], classes, command="sft"), classes)


def test_every_recipe_ships() -> None:
    assert (
        {path.stem for path in RECIPES}
        == set(shipped_recipes())
        == {
            *("quickstart", "qwen3b", "qwen3b_lora", "qwen3b_base_search_r1", "qwen7b"),
            *("sft_cold_start", "sft_world"),
            *("qwen1.5b_kit", "qwen1.5b_kit_sft"),
            *("qwen0.5b_24gb", "qwen0.5b_24gb_sft", "qwen1.5b_24gb", "qwen1.5b_24gb_sft"),
        }
    )


@each_recipe
def test_a_path_and_a_bare_name_mean_the_same(path: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    by_path, here = parse(str(path)), Path.cwd()
    monkeypatch.chdir(tmp_path)
    for name in (path.stem, f"recipes/{path.name}"):  # neither is a file in this folder
        task, config, model = parse(name)
        assert task == by_path[0] and model == by_path[2]
        found, expected = config.to_dict(), by_path[1].to_dict()
        assert Path(found.pop("output_dir")).relative_to(tmp_path) == Path(expected.pop("output_dir")).relative_to(
            here
        )
        assert found == expected


def test_a_path_outside_the_checkout_finds_the_shipped_recipe(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    assert find_recipe("recipes/qwen3b.yaml").read_bytes() == (ROOT / "recipes/qwen3b.yaml").read_bytes()
    for missing in ("recipes/qwen4b.yaml", "elsewhere/qwen3b.yaml"):
        with pytest.raises(UserError, match=f"there is no recipe {missing}; the shipped recipes are quickstart, qwen"):
            find_recipe(missing)


def test_a_file_of_that_name_takes_precedence_over_the_shipped_recipe(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes/qwen3b.yaml").write_text("max_searches: 7\n")
    monkeypatch.chdir(tmp_path)
    assert parse("recipes/qwen3b.yaml")[1].max_searches == 7


def test_an_unknown_recipe_suggests_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"is a folder, but a recipe is a YAML file: .*--model_name_or_path"):
        find_recipe(str(tmp_path))
    with pytest.raises(UserError, match="unknown recipe 'quickstrat': did you mean 'quickstart'"):
        parse("quickstrat")


@pytest.mark.parametrize(
    ("read", "recipe", "command"),
    [
        (parse, "sft_world", "trl-search sft sft_world"),
        (parse, "recipes/sft_cold_start.yaml", "trl-search sft sft_cold_start"),
        (parse_sft, "qwen3b", "trl-search train qwen3b"),
    ],
)
def test_a_recipe_of_another_command_names_that_command(read: Callable[..., Any], recipe: str, command: str) -> None:
    with pytest.raises(UserError, match=f"for another command: run {command}$"):
        read(recipe)


def test_an_unknown_key_of_a_recipe_suggests_the_nearest(tmp_path: Path) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("max_serches: 3\n")
    with pytest.raises(UserError, match=r"unknown key of .*mine\.yaml 'max_serches': did you mean 'max_searches'"):
        parse(str(recipe))


@pytest.mark.parametrize(
    "option", [["--learning_rat", "1e-5"], ["--learning_rat=1e-5"], ["--learning-rat", "1e-5"]], ids=str
)
def test_an_unknown_option_suggests_the_nearest(option: list[str]) -> None:
    with pytest.raises(UserError, match="unknown option '--learning_rat': did you mean '--learning_rate'"):
        parse("quickstart", *option)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--lr", "1e-5"], r"unknown option '--lr': it is called --learning_rate here$"),
        (["--dataset_name=nq"], r"'--dataset_name': it is called --questions here$"),
        (["--actor_rollout_ref.rollout.n", "5"], "'--actor_rollout_ref.rollout.n': keys with dots .*coming-from.md"),
        (["data.train_batch_size=512"], r"arguments: data.train_batch_size=512: keys with dots .*coming-from.md"),
        (["recipes/qwen3b.yaml"], r"^unrecognized arguments: recipes/qwen3b.yaml$"),
    ],
)
def test_a_key_of_another_library_is_told_ours(words: list[str], told: str) -> None:
    with pytest.raises(UserError, match=told):
        parse("quickstart", *words)


def test_values_with_commas_are_told_to_be_separate_words() -> None:
    with pytest.raises(UserError, match=r"invalid float value: '1\.0,0\.1': several values are separate words$"):
        parse("quickstart", "--reward_weights", "1.0,0.1")


def test_the_names_for_keys_of_other_libraries_are_keys_here() -> None:
    known = {field.name for cls in (TaskArguments, SearchGRPOConfig, ModelConfig) for field in dataclasses.fields(cls)}
    assert set(_OF_OTHERS.values()) <= known and not set(_OF_OTHERS) & known


@pytest.mark.parametrize(
    ("text", "message"), [("a: [1\n", "is not YAML"), ("- a\n", "must consist of `key: value` lines")]
)
def test_other_files_are_not_recipes(tmp_path: Path, text: str, message: str) -> None:
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
def test_the_commands_in_the_header_of_a_recipe_parse(path: Path) -> None:
    trained = commands(path, "trl-search train", "-m trl_search train")
    assert trained and any(path.stem in command[0] for command in trained)
    for command in trained:
        parse(*command)


@each_sft_recipe
def test_the_commands_in_the_header_of_an_sft_recipe_parse(path: Path) -> None:
    tuned = commands(path, "trl-search sft")
    assert tuned and all(path.stem in command[0] for command in tuned)
    for command in tuned:
        parse_sft(*command)
    for command in commands(path, "trl-search train"):
        task, config, model = parse(*command)
        # GRPO prompts the policy as SFT did.
        taught = parse_sft(str(path))[0]
        for key in dataclasses.fields(taught.agent):
            if key.name not in (
                "passage_template",
                "max_turn_length",
                "max_observation_length",
                "max_completion_length",
            ):
                assert getattr(config, key.name) == getattr(taught.agent, key.name), key.name
        assert taught.retriever_options == task.retriever_options
        assert Path(model.model_name_or_path).absolute() == Path(parse_sft(*tuned[0])[1].output_dir)


def commands(path: Path, *names: str) -> list[list[str]]:
    """The arguments of these commands in a recipe's header."""
    header = path.read_text("utf-8").split("\n\n")[0].replace("\\\n#  ", "")
    lines = [line[1:].strip() for line in header.splitlines() if line.startswith("#   ")]
    found = [(line, name) for line in lines for name in names if name in line]
    # Several spaces separate a command from its explanation.
    return [shlex.split(re.split(r" {2,}(?=[^-\s])", line.partition(name)[2].strip())[0]) for line, name in found]


@each_recipe
def test_the_batch_is_in_the_range_known_to_be_stable(path: Path) -> None:
    """Ten optimizer steps per batch lead to collapse (Search-R1); top_p below 1 makes the log-probs wrong."""
    task, config, model = parse(str(path))
    assert config.steps_per_generation * config.num_iterations <= 2 * config.gradient_accumulation_steps
    assert (config.temperature, config.top_p, config.top_k or 0, config.min_p or 0) == (1.0, 1.0, 0, 0)
    assert config.mask_observations and not (model.use_peft and model.lora_dropout)
    assert config.generation_batch_size % config.num_generations == 0
    asked = {task.questions, *set_names(task.eval_questions)}
    assert task.questions == "world" or all(name in HUB_SETS or name.startswith("kit/") for name in asked)
    resolve_rewards(task.reward_funcs)
    assert config.reward_weights is None or len(config.reward_weights) == len(task.reward_funcs)


@each_recipe
def test_vllm_has_room_for_a_prompt_and_a_completion(path: Path) -> None:
    _, config, _ = parse(str(path))
    served = re.search(r"--max-model-len (\d+)", path.read_text("utf-8"))
    room = int(served[1]) if served else config.vllm_max_model_length
    assert config.use_vllm == (path.stem != "quickstart")
    if config.use_vllm:
        assert room is not None and room - config.max_completion_length >= 512
        assert bool(served) == (config.vllm_mode == "server")
        # Parsing has already refused keys that neither TRL nor we have. Values that vLLM restricts:
        assert config.vllm_mode in ("server", "colocate") and 0 < config.vllm_gpu_memory_utilization < 1
        assert config.vllm_tensor_parallel_size == 1


@pytest.mark.parametrize("name", ["qwen3b", "qwen3b_lora", "qwen7b"])
def test_the_arithmetic_of_the_headers(name: str) -> None:
    """The figures in a header follow from the shape of the model."""
    header = find_recipe(name).read_text("utf-8").split("\n\n")[0].replace("\n# ", " ")
    parameters, layers, width = QWEN_7B if name == "qwen7b" else QWEN_3B
    assert f"{parameters / 1e9:.2f} B parameters" in header
    assert f"{2 * layers * width * 2:,} bytes per token" in header  # keys and values, two bytes each
    if name == "qwen3b":
        assert "5 x 12.4 = 62 GB" in header and round(4 * parameters / 1e9, 1) == 12.4
        assert "master weights and moments (4.6)" in header and round(12 * parameters / 8e9, 1) == 4.6
        assert "20 x 3.09 / 4 = 15.5 GB" in header and 20 * parameters / 4e9 == pytest.approx(15.45)
        assert round(77 / 512 * 2560 / 8) == 48 and round(331 * 77 / 512 * 2560 / 8 / 3600, 1) == 4.4  # seconds, hours
    if name == "qwen3b_lora":
        # Inputs plus outputs of q, k, v, o, gate, up and down of a layer; the rank multiplies them.
        sizes = 2 * 4096 + 2 * (2048 + 256) + 3 * (2048 + 11008)
        rank = parse(name)[2].lora_r
        assert f"rank {rank} adds {rank * sizes * layers / 1e6:.1f} M" in header
        assert "Adam moments 1.0 GB" in header and round(16 * rank * sizes * layers / 1e9, 1) == 1.0
    if name == "qwen7b":
        assert "16 bytes per parameter, 122 GB" in header and round(16 * parameters / 1e9) == 122
        assert "four GPUs 34 GB" in header and round(18 * parameters / 4e9) == 34
        assert "16 bytes per parameter, 30 GB" in header and round(16 * parameters / 4e9) == 30
        assert "in a rollout 23 GB" in header and round(12 * parameters / 4e9) == 23


@pytest.mark.parametrize("path", ACCELERATE, ids=lambda path: path.stem)
def test_accelerate_reads_the_accelerate_files(path: Path) -> None:
    from accelerate.commands.config.config_args import load_config_from_file

    config = load_config_from_file(str(path))
    assert config.mixed_precision == "bf16"
    if path.stem == "fsdp2":
        assert config.distributed_type.value == "FSDP" and config.fsdp_config["fsdp_version"] == 2
        assert config.fsdp_config["fsdp_state_dict_type"] == "FULL_STATE_DICT"  # other types are refused
        return
    assert config.distributed_type.value == "DEEPSPEED"
    assert config.deepspeed_config["zero_stage"] == int(path.stem[-1])
    recipe = "qwen7b" if path.stem == "zero3" else "qwen3b"
    # With the number of processes in the file, the recipe's batch has 512 questions.
    _, grpo, _ = parse(recipe)
    trajectories = config.num_processes * grpo.per_device_train_batch_size * grpo.steps_per_generation
    assert trajectories == 512 * grpo.num_generations
    assert f"recipes/accelerate/{path.name}" in find_recipe(recipe).read_text("utf-8")


def test_qwen3b_has_the_published_settings() -> None:
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


@pytest.mark.slow
@each_recipe
def test_a_training_step_of_the_recipe_with_the_tiny_policy(path: Path, world, retriever, tmp_path: Path) -> None:
    """Everything in the recipe except its model, its data, its sizes and vLLM, which is not used on a CPU."""
    _, recipe, _ = parse(str(path))
    sizes = {
        "output_dir": tmp_path,
        "num_generations": 2,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 1,
        "steps_per_generation": max(1, recipe.steps_per_generation // recipe.gradient_accumulation_steps),
        "max_steps": 1,
        "max_completion_length": 96,
        "max_turn_length": 32,
        "max_observation_length": 40,
        "save_strategy": "no",
        "disable_tqdm": "true",
        "use_vllm": "false",
        "lr_scheduler_type": "constant",  # the first step of a warm-up has a learning rate of 0
        "warmup_steps": 0,
    }
    options = [word for key, value in sizes.items() for word in (f"--{key}", str(value))]
    task, config, model_config = parse(str(path), *options)
    rows: list[Any] = [question.row() for question in world.questions("train")[:8]]
    config.reward_weights = [1.0, *config.reward_weights]
    trainer = SearchGRPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(tiny_policy_path(), dtype="float32"),  # bfloat16 is slow on a CPU
        reward_funcs=[spread, *task.reward_funcs],
        args=config,
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(tiny_policy_path()),
        retriever=retriever,
        peft_config=adapter_config(model_config),
    )
    trainer.remove_callback(PrinterCallback)
    before = {name: weight.detach().clone() for name, weight in trainer.model.named_parameters()}
    trainer.train()
    logged = trainer.state.log_history[0]
    assert trainer.state.global_step == 1 and math.isfinite(logged["loss"]) and logged["tokens/model"] > 0
    assert {f"rewards/{name}/mean" for name in task.reward_funcs} <= set(logged)
    assert ("kl" in logged) == (config.beta > 0)
    # Exactly the weights that the recipe trains have changed: the adapter on every linear layer, or all weights.
    moved = {name for name, weight in trainer.model.named_parameters() if not torch.equal(weight, before[name])}
    assert moved and model_config.use_peft == all("lora_" in name for name in moved)
    if model_config.use_peft:
        assert {name for name in before if "lora_B" in name} <= moved
        lora = trainer.model.peft_config["default"]
        assert (lora.r, lora.lora_alpha, lora.lora_dropout) == (model_config.lora_r, model_config.lora_alpha, 0.0)
    assert trainer.protocol.name == config.protocol
    shown = "<information>" if config.protocol == "search_r1" else "<tool_response>"
    for trajectory in trainer.last_rollout.trajectories:
        assert trajectory.searches == 0 or shown in trainer.protocol.tokenizer.decode(trajectory.ids)


def spread(completions: list[Any], **kwargs: Any) -> list[float]:
    """A reward that differs within every group, so that there is always a gradient."""
    return [float(i % 2) for i in range(len(completions))]


@each_sft_recipe
def test_fine_tuning_with_the_recipe_and_the_tiny_policy(path: Path, tmp_path: Path) -> None:
    """The recipe's rules, adapter and training; the tiny policy answers questions of the embedded world."""
    recipe = parse_sft(str(path))[0]
    sizes = {
        "model_name_or_path": "tiny",
        "dtype": "float32",
        "output_dir": tmp_path,
        "questions": "world",
        "world_passages": 1000,
        "retriever_options": "{}",
        "instruction": "",
        "max_steps": 2,  # a warm-up's first step has a learning rate of 0
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 1,
        "dataloader_pin_memory": "false",
        "disable_tqdm": "true",
    }
    if recipe.teacher != "scripts":
        # With so few tokens the tiny policy is seldom right and never well-formed.
        sizes |= {"teacher": "self", "collection": tmp_path / "collection", "max_train_questions": 8}
        sizes |= {"min_f1": 0.01, "well_formed": "false", "min_searches": 0, "max_completion_length": 160}
        sizes |= {"max_turn_length": 48, "max_observation_length": 60, "system_prompt": ""}
    options = [word for key, value in sizes.items() for word in (f"--{key}", str(value))]
    assert run_sft(*parse_sft(str(path), *options)) == tmp_path
    before, after = (
        dict(AutoModelForCausalLM.from_pretrained(name, dtype="float32").named_parameters())
        for name in (tiny_policy_path(), tmp_path)
    )
    assert any(not torch.equal(before[name], after[name]) for name in before)
