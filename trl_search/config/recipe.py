"""Recipes: flat YAML files of TRL's keys and ours, given as a path or as the name of a shipped recipe."""

from __future__ import annotations

import dataclasses
import importlib.resources
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import yaml
from trl import TrlParser

from trl_search.common.errors import UserError, unknown_name
from trl_search.config.recipe_values import checked_values

# Names that other libraries and habit give our keys, to which no spelling of ours is near.
_OF_OTHERS = {
    "lr": "learning_rate",
    "epochs": "num_train_epochs",
    "steps": "max_steps",
    "model": "model_name_or_path",
    "use_lora": "use_peft",
    "lora": "use_peft",
    "lora_rank": "lora_r",
    "dataset": "questions",
    "dataset_name": "questions",
    "train_dataset": "questions",
    "eval_dataset": "eval_questions",
    "index": "retriever",
    "topk": "passages_per_query",
    "max_turns": "max_searches",
    "n_agent": "num_generations",
    "reward": "reward_funcs",
    "rewards": "reward_funcs",
}
_DOTTED = "keys with dots are those of verl and Search-R1; docs/coming-from.md names ours, written --key value"


def shipped_recipes() -> dict[str, Path]:
    """The shipped recipes: name -> file."""
    folder = importlib.resources.files("trl_search.recipes")
    return {Path(str(file)).stem: Path(str(file)) for file in folder.iterdir() if file.name.endswith(".yaml")}


def find_recipe(name: str, command: str | None = None) -> Path:
    """The file of a recipe: `recipes/quickstart.yaml` is a path, `quickstart` the name of a shipped recipe. A recipe
    for another command is an error.

    Raises:
        UserError: if there is no such file or name; the message lists the names.
    """
    shipped = shipped_recipes()
    path, stem = Path(name), Path(name).stem
    named = stem if path.suffix in (".yaml", ".yml") and path.parent.name == "recipes" else name
    if not path.is_file() and named in shipped:  # a path from the README also works outside a checkout
        path, stem = shipped[named], named
    if path.is_file():
        if command and stem in shipped and shipped[stem].samefile(path) and command != recipe_command(stem):
            raise UserError(f"{stem} is a recipe for another command: run trl-search {recipe_command(stem)} {stem}")
        return path
    names = [one for one in sorted(shipped) if command in (None, recipe_command(one))]
    if path.suffix in (".yaml", ".yml"):
        raise UserError(f"there is no recipe {name}; the shipped recipes are {', '.join(names)}")
    if path.is_dir():
        raise UserError(
            f"{name} is a folder, but a recipe is a YAML file: give one, and the model as --model_name_or_path {name}"
        )
    raise unknown_name("recipe", name, names)


def recipe_values(argv: Sequence[str], arguments: Sequence[Any], *, command: str) -> dict[str, Any]:
    """The value of every key: from the command line, else from the recipe, else the default. Builds no dataclass.

    A dataclass may have a static method `settled(values) -> values`, which changes keys that others make irrelevant.

    Raises:
        UserError: for an unknown key in the recipe or on the command line (the message names the nearest valid keys),
            and for a value of the wrong type.
    """
    known = {field.name for cls in arguments for field in dataclasses.fields(cls) if field.init}
    path, options = split_recipe(argv, command)
    _refuse_unknown_options(options, known)
    parser = _Parser(arguments, prog=f"trl-search {command}", add_help=False)
    if path is not None:
        parser.set_defaults_with_config(**_read(path, arguments, known))
    values = vars(parser.parse_args(options))
    for cls in arguments:
        values = cls.settled(values) if hasattr(cls, "settled") else values
    return values


def build_arguments(values: Mapping[str, Any], arguments: Sequence[Any]) -> tuple[Any, ...]:
    """Builds the dataclasses. Their own checks run here, and some look for devices.

    Raises:
        UserError: if a configuration class rejects a value.
    """
    try:
        return tuple(
            cls(**{field.name: values[field.name] for field in dataclasses.fields(cls) if field.init})
            for cls in arguments
        )
    except UserError:
        raise
    except Exception as error:  # TRL and transformers raise a dozen types of exceptions, with long messages
        raise UserError(
            f"the configuration is invalid: {' '.join(str(error).split()) or type(error).__name__}"
        ) from error


def split_recipe(argv: Sequence[str], command: str) -> tuple[Path | None, list[str]]:
    """Splits a command line into the file of its recipe, if it names one, and the other words. Imports no TRL.

    Raises:
        UserError: if there is no such recipe, if it is for another command, or if no recipe and no model is named.
    """
    words = list(argv)
    if words and not words[0].startswith("-"):
        words = ["--config", *words]
    path, options = None, []
    while words:
        word = words.pop(0)
        if word == "--config" and words:
            path = find_recipe(words.pop(0), command)
        else:
            options.append(word)
    if path is None and not any(option.startswith("--model_name_or_path") for option in options):
        raise UserError(
            f"no recipe is given: run trl-search {command} RECIPE, where RECIPE is a file or one of "
            f"{', '.join(name for name in sorted(shipped_recipes()) if recipe_command(name) == command)}"
        )
    return path, options


def _refuse_unknown_options(options: Sequence[str], known: set[str]) -> None:
    for word in options:
        key = word[2:].split("=")[0].replace("-", "_")
        if word.startswith("--") and key not in known and key.removeprefix("no_") not in known:
            raise _unknown_key("option", key, known, "--")


def _unknown_key(kind: str, key: str, known: set[str], prefix: str = "") -> UserError:
    """The error for a key that is not ours, but perhaps that of another library."""
    if "." in key:
        return UserError(f"unknown {kind} '{prefix}{key}': {_DOTTED}")
    if (ours := _OF_OTHERS.get(key)) in known:  # `sft` has no rewards
        return UserError(f"unknown {kind} '{prefix}{key}': it is called {prefix}{ours} here")
    return unknown_name(kind, f"{prefix}{key}", [f"{prefix}{name}" for name in known])


class _Parser(TrlParser):
    """TRL's parser, with one-line errors."""

    def error(self, message: str) -> NoReturn:
        hint = ""
        if re.match(r"unrecognized arguments: \+*[a-z_]+\.[\w.]+=", message):
            hint = f": {_DOTTED}"
        elif re.search(r"invalid (int|float) value: '[^']+,", message):  # --reward_weights 1.0,0.1
            hint = ": several values are separate words"
        raise UserError(message.removeprefix("argument ") + hint)


def read_recipe(path: Path) -> dict[str, Any]:
    """The keys of a recipe with their values as YAML reads them.

    Raises:
        UserError: if the file is not YAML, or has no keys.
    """
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise UserError(f"{path} must consist of `key: value` lines")
    return values


def _read(path: Path, arguments: Sequence[Any], known: set[str]) -> dict[str, Any]:
    """The keys and checked values of a recipe. Its `env` sets environment variables, as in TRL's commands."""
    values = read_recipe(path)
    environment = values.pop("env", {})
    if not isinstance(environment, dict):
        raise UserError(f"{path}: env must be a mapping of names to values")
    for key in values:
        if key not in known:
            raise _unknown_key(f"key of {path}", str(key), known)
    checked = checked_values(values, arguments, str(path))
    os.environ.update({str(name): str(value) for name, value in environment.items()})
    return checked


def recipe_command(name: str) -> str:
    """The command for a shipped recipe."""
    return "sft" if "sft" in name.split("_") else "train"
