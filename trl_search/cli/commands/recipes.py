"""Lists, shows and copies the recipes that ship.

    trl-search recipes                         list them, one line per recipe
    trl-search recipes show qwen3b             print the file, with notes on memory, time and results
    trl-search recipes copy qwen3b mine.yaml   make a copy to edit; `trl-search train mine.yaml` runs it

`trl-search train --help` and `trl-search sft --help` describe the keys of a recipe.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

from trl_search.common.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "action",
        nargs="?",
        default="list",
        choices=("list", "show", "copy"),
        metavar="ACTION",
        help="list, show or copy (default: list)",
    )
    parser.add_argument("name", nargs="?", metavar="NAME", help="name of a recipe")
    parser.add_argument("file", nargs="?", metavar="FILE", help="path of the copy (default: NAME.yaml)")


def run(args: argparse.Namespace) -> int:
    from trl_search.cli.recipe_help import recipe_lines
    from trl_search.config.recipe import find_recipe, recipe_command

    if args.action == "list":
        print("trl-search train:\n\n" + "\n".join(recipe_lines("train")))
        print("\ntrl-search sft:\n\n" + "\n".join(recipe_lines("sft")))
        return 0
    if args.name is None:
        raise UserError(f"no recipe given: `trl-search recipes {args.action} NAME`; `trl-search recipes` lists them")
    recipe = find_recipe(args.name)
    if args.action == "show":
        print(recipe.read_text(encoding="utf-8"), end="")
        return 0
    copy = Path(args.file or f"{recipe.stem}.yaml")
    if copy.exists():
        raise UserError(f"{copy} exists already: give the copy another name")
    shutil.copyfile(recipe, copy)
    print(f"{copy}: edit it, then run trl-search {recipe_command(recipe.stem)} {copy}")
    return 0
