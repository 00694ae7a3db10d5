"""Recipes: flat YAML files of TRL's keys and ours, by path or by the name of one that ships with the package."""

from __future__ import annotations

import dataclasses
import importlib.resources
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from trl import TrlParser

from trl_search.common.errors import UserError, unknown_name


def shipped_recipes() -> dict[str, Path]:
    """The recipes inside the package: name -> file."""
    folder = importlib.resources.files("trl_search.recipes")
    return {Path(str(file)).stem: Path(str(file)) for file in folder.iterdir() if file.name.endswith(".yaml")}


def find_recipe(name: str) -> Path:
    """The file of a recipe: `recipes/quickstart.yaml` is a path, `quickstart` one of those that ship.

    Raises:
        UserError: if there is no such file or name; says which names there are.
    """
    if Path(name).is_file():
        return Path(name)
    if name.endswith((".yaml", ".yml")):
        # A path from the README, used away from a checkout, still means the recipe of that name.
        if Path(name).parent.name == "recipes" and Path(name).stem in shipped_recipes():
            return shipped_recipes()[Path(name).stem]
        raise UserError(f"there is no recipe {name}; shipped ones go by name: {', '.join(sorted(shipped_recipes()))}")
    if name not in shipped_recipes():
        raise unknown_name("recipe", name, shipped_recipes())
    return shipped_recipes()[name]


def parse_recipe(argv: Sequence[str], arguments: Sequence[Any], *, command: str) -> tuple[Any, ...]:
    """Reads `RECIPE --key value ...` into one object of each dataclass; the command line overrides the recipe.

    Args:
        arguments (`Sequence[type]`): The dataclasses.
        command (`str`): Who asks: `train` or `sft`.

    Raises:
        UserError: for a key that no dataclass has, in the recipe or on the command line; the nearest one is named.
    """
    argv = list(argv)
    if argv and not argv[0].startswith("-"):
        argv = ["--config", argv[0], *argv[1:]]
    known = {field.name for cls in arguments for field in dataclasses.fields(cls) if field.init}
    for i, word in enumerate(argv):
        if word == "--config" and i + 1 < len(argv):
            argv[i + 1] = str(find_recipe(argv[i + 1]))
            _check_command(Path(argv[i + 1]), command)
            _check_keys(Path(argv[i + 1]), known)
        elif word.startswith("--") and word not in ("--help", "--config"):
            key = word[2:].split("=")[0].replace("-", "_")
            if key not in known and key.removeprefix("no_") not in known:
                raise unknown_name("option", f"--{key}", [f"--{name}" for name in known])
    usage = f"trl-search {command} RECIPE [--key value ...]"
    parser = TrlParser(list(arguments), prog="trl-search", usage=usage)
    parsed: tuple[Any, ...] = tuple(parser.parse_args_and_config(argv))
    return parsed


def _check_command(path: Path, command: str) -> None:
    """A recipe that ships is for one of two commands; its keys would be unknown to the other."""
    its = "sft" if "sft" in path.stem.split("_") else "train"
    shipped = shipped_recipes().get(path.stem)
    if shipped is not None and shipped.samefile(path) and command != its:
        raise UserError(f"{path.stem} is a recipe of another command: trl-search {its} {path.stem}")


def _check_keys(path: Path, known: set[str]) -> None:
    try:
        keys = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not YAML: {error}") from error
    if not isinstance(keys, dict):
        raise UserError(f"{path} must be `key: value` lines")
    for key in keys:
        if key not in known | {"env"}:
            raise unknown_name(f"key of {path}", str(key), known)
