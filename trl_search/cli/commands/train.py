"""Trains a policy to search with GRPO, from a recipe.

    trl-search train quickstart                                   a recipe that ships, by name
    trl-search train recipes/qwen3b.yaml --learning_rate 5e-7     a file; every key can be overridden
    accelerate launch -m trl_search train qwen3b                  several processes

A recipe is a flat YAML file of TRL's GRPOConfig and ModelConfig keys and ours beside them. The folder output_dir then
holds the model, results.json, curves.png and checkpoints. Everything that is missing is said before the first expensive
step, as `trl-search doctor RECIPE` says it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def main(argv: list[str]) -> int:
    from trl import ModelConfig

    from trl_search.cli.recipe_help import print_help
    from trl_search.config.grpo import SearchGRPOConfig
    from trl_search.config.recipe import build_arguments, recipe_values
    from trl_search.trainer.pipeline import TaskArguments, run_training

    classes = (TaskArguments, SearchGRPOConfig, ModelConfig)
    if print_help(argv, "train", __doc__, groups(), classes):
        return 0
    values = recipe_values(argv, classes, command="train")
    arguments, config, model_config = build_arguments(values, classes)
    run_training(arguments, config, model_config)
    return 0


def groups() -> Mapping[str, Any]:
    """Our keys, under the headings of the help."""
    import dataclasses

    from trl_search.cli.recipe_help import own_fields
    from trl_search.config.agent import AgentSettings
    from trl_search.config.grpo import SearchGRPOConfig
    from trl_search.config.task import TaskArguments

    asked = [field.name for field in dataclasses.fields(AgentSettings)]
    config = {field.name: field for field in own_fields(SearchGRPOConfig)}
    return {
        "Questions, retriever, rewards, evaluation": own_fields(TaskArguments),
        "The agent": [config[name] for name in asked if name in config],
        "Rollouts, loss, logging": [field for name, field in config.items() if name not in asked],
    }
