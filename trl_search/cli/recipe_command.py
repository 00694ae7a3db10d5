"""What `train` and `sft` have in common: help, the values of a recipe, the checks before it, then the run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def recipe_classes(command: str) -> tuple[Any, ...]:
    """The dataclasses of the keys of a command's recipes, ours first: of `train` or of `sft`."""
    from trl import ModelConfig

    if command == "train":
        from trl_search.config.grpo import SearchGRPOConfig
        from trl_search.config.task import TaskArguments

        return TaskArguments, SearchGRPOConfig, ModelConfig
    from trl_search.trainer.cold_start.arguments import ColdStartArguments
    from trl_search.trainer.sft import SearchSFTConfig

    return ColdStartArguments, SearchSFTConfig, ModelConfig


def run_recipe(
    argv: list[str], command: str, description: str | None, run: Callable[..., Any], go_on: Callable[[Any], str]
) -> int:
    """Runs a command that takes a recipe.

    Args:
        description (`str`): The docstring of the command, which is its help.
        run (`Callable`): Takes one value of each of its [`recipe_classes`].
        go_on (`Callable`): Says, of the training's configuration, how to go on after Ctrl-C.
    """
    from trl_search.cli.options import explained_interrupt
    from trl_search.cli.recipe_checks import refuse_problems
    from trl_search.cli.recipe_help import print_help
    from trl_search.config.recipe import build_arguments, recipe_values

    classes = recipe_classes(command)
    if print_help(argv, command, description or "", classes):
        return 0
    values = recipe_values(argv, classes, command=command)
    refuse_problems(values, classes)
    built = build_arguments(values, classes)
    with explained_interrupt(lambda: go_on(built[1])):
        run(*built)
    return 0
