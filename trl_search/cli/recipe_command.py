"""What `train` and `sft` have in common: help, the values of a recipe, the checks before it, then the run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any


def run_recipe(
    argv: list[str],
    command: str,
    description: str | None,
    classes: Sequence[Any],
    run: Callable[..., Any],
    go_on: Callable[[Any], str],
) -> int:
    """Runs a command that takes a recipe.

    Args:
        description (`str`): The docstring of the command, which is its help.
        classes (`Sequence[type]`): The dataclasses of the recipe's keys, ours first.
        run (`Callable`): Takes one value of each class.
        go_on (`Callable`): Says, of the training's configuration, how to go on after Ctrl-C.
    """
    from trl_search.cli.options import explained_interrupt
    from trl_search.cli.recipe_checks import refuse_problems
    from trl_search.cli.recipe_help import print_help
    from trl_search.config.recipe import build_arguments, recipe_values

    if print_help(argv, command, description or "", classes):
        return 0
    values = recipe_values(argv, classes, command=command)
    refuse_problems(values, classes)
    built = build_arguments(values, classes)
    with explained_interrupt(lambda: go_on(built[1])):
        run(*built)
    return 0
