"""Checks this environment, a recipe, a model or a vLLM server, and prints what to change.

    trl-search doctor                                       versions, extras, devices
    trl-search doctor --server http://localhost:8000        also how that server answers test requests
    trl-search doctor qwen3b --use_vllm false               also whether this machine can run a recipe, with overrides
    trl-search doctor Qwen/Qwen3-4B                         also which protocols are exact for a model (docs/models.md)

Each check prints one line: ok, note, warning or problem, and the remedy. The exit status is 1 if there is a problem.
`train` and `sft` run the checks of a recipe first and do not start if there is a problem.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trl_search.cli.options import tell_of_imports
from trl_search.cli.parser import CommandParser
from trl_search.cli.preflight import Check, Status, environment_checks
from trl_search.cli.server_checks import server_checks


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "recipe", nargs="?", metavar="RECIPE|MODEL", help="a recipe to check, or a model whose protocols are checked"
    )
    parser.add_argument("--server", nargs="+", metavar="URL", help="vLLM servers, such as http://localhost:8000")
    parser.add_argument(
        "--prompt_tokens", type=int, default=512, metavar="N", help="length of the longest prompt (default: 512)"
    )
    parser.add_argument("--json", action="store_true", help="print a list of objects instead of lines")


def main(argv: list[str]) -> int:
    parser = CommandParser(
        prog="trl-search doctor",
        usage="trl-search doctor [MODEL | RECIPE [--key value ...]] [--server URL ...] [--prompt_tokens N] [--json]",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add_arguments(parser)
    args, overrides = parser.parse_known_args(argv)
    # A recipe's own options stand behind it: the x of `doctor --serv x` is no recipe.
    early = [option for option in overrides if args.recipe and argv.index(option) < argv.index(args.recipe)]
    if early or (overrides and (args.recipe is None or is_model(args.recipe))):
        parser.error(f"unrecognized arguments: {' '.join(early or overrides)}")
    tell_of_imports()
    recipe: Mapping[str, Any] | None = None
    classes: tuple[Any, ...] = ()
    if args.recipe is not None and not is_model(args.recipe):
        recipe, classes = _recipe([args.recipe, *overrides])  # first: a typo in it needs no check of the machine
    from trl_search.cli.model_checks import model_checks
    from trl_search.cli.recipe_checks import recipe_checks

    checks = environment_checks()
    if recipe is not None:
        checks += recipe_checks(recipe, classes)
    elif args.recipe is not None:
        checks += model_checks(args.recipe)
    for server in args.server or []:
        checks += server_checks(server, recipe, prompt_tokens=args.prompt_tokens)
    if args.json:
        print(json.dumps([dataclasses.asdict(check) for check in checks], indent=2))
    else:
        print("\n".join(line(check) for check in checks))
    return int(any(check.status is Status.PROBLEM for check in checks))


def is_model(name: str) -> bool:
    """Whether a word on the command line names a model (a folder or `owner/name`), not a recipe."""
    return name == "tiny" or Path(name).is_dir() or ("/" in name and not name.endswith((".yaml", ".yml")))


def _recipe(argv: list[str]) -> tuple[dict[str, Any], tuple[Any, ...]]:
    """The values of a recipe for `train` or for `sft`: its keys decide, or, if they fit both, its name."""
    from trl_search.cli.recipe_command import command_of, recipe_classes
    from trl_search.config.recipe import find_recipe, recipe_command, recipe_values

    path = find_recipe(argv[0])
    command = command_of(path, recipe_command(path.stem))
    classes = recipe_classes(command)
    return recipe_values(argv, classes, command=command), classes


def line(check: Check) -> str:
    return f"{check.status.value:<8} {check.name:<17} {check.text}"
