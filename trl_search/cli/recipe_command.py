"""The steps that `train` and `sft` share: print help, read the recipe, check the machine, run."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from trl_search.common.errors import UserError


def recipe_classes(command: str) -> tuple[Any, ...]:
    """The dataclasses that define the recipe keys of `train` or `sft`; ours come first."""
    from trl import ModelConfig

    if command == "train":
        from trl_search.config.grpo import SearchGRPOConfig
        from trl_search.config.task import TaskArguments

        return TaskArguments, SearchGRPOConfig, ModelConfig
    from trl_search.trainer.cold_start.arguments import ColdStartArguments
    from trl_search.trainer.sft import SearchSFTConfig

    return ColdStartArguments, SearchSFTConfig, ModelConfig


def command_of(path: Path, expected: str) -> str:
    """The command, `train` or `sft`, that knows more keys of a recipe; the expected one if both know as many."""
    from trl_search.config.recipe import read_recipe

    keys = read_recipe(path).keys() - {"env"}

    def unknown(command: str) -> int:
        return len(keys - {field.name for cls in recipe_classes(command) for field in dataclasses.fields(cls)})

    other = "sft" if expected == "train" else "train"
    return other if unknown(expected) and unknown(other) < unknown(expected) else expected


def run_recipe(argv: list[str], command: str, description: str | None) -> int:
    """Runs `train` or `sft`, of which `description` is the help."""
    from trl_search.cli.options import explained_interrupt, tell_of_imports
    from trl_search.cli.recipe_help import print_help
    from trl_search.config.recipe import build_arguments, recipe_values, split_recipe

    if {"-h", "--help", "--help_all"} & set(argv):
        print_help(command, description or "", recipe_classes(command), all_keys="--help_all" in argv)
        return 0
    path, _ = split_recipe(argv, command)  # finds a mistake in the recipe's name before TRL is imported, for 6 s
    tell_of_imports()
    if path is not None and (fitting := command_of(path, command)) != command:
        raise UserError(f"{path} has keys of another command: run trl-search {fitting} {path}")
    classes = recipe_classes(command)
    values = recipe_values(argv, classes, command=command)
    from trl_search.cli.recipe_checks import refuse_problems

    refuse_problems(values, classes)
    built = build_arguments(values, classes)

    def how_to_go_on() -> str:
        from trl_search.trainer.resume import how_to_resume

        how = how_to_resume(Path(built[1].output_dir or "."))
        return how if command == "train" else f"collected attempts are kept; {how}"

    with explained_interrupt(how_to_go_on):  # also while the trainer is imported, which takes seconds
        if command == "train":
            from trl_search.trainer.pipeline import run_training

            run_training(*built)
        else:
            from trl_search.trainer.cold_start.run import run_sft

            run_sft(*built)
    return 0
