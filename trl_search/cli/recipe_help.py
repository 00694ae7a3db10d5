"""The help of `train` and `sft`: what the command does, the recipes, and our keys in groups. `--help_all` also lists
TRL's 200 keys, which have the same meaning as in TRL."""

from __future__ import annotations

import dataclasses
import inspect
import textwrap
from collections.abc import Sequence
from typing import Any

from trl import TrlParser

from trl_search.config.agent import AgentSettings
from trl_search.config.recipe import recipe_command, shipped_recipes

WIDTH, INDENT = 118, " " * 6


def recipe_lines(command: str) -> list[str]:
    """One line per recipe that ships for a command: its name and the first sentence of its header."""
    names = [name for name in sorted(shipped_recipes()) if command == recipe_command(name)]
    width = max(map(len, names))
    return [f"  {name.ljust(width)}  {recipe_title(name)}" for name in names]


def recipe_title(name: str) -> str:
    """The first sentence of a recipe's header."""
    words: list[str] = []
    for line in shipped_recipes()[name].read_text(encoding="utf-8").splitlines():
        text = line.removeprefix("#").strip()
        if not line.startswith("#") or not text:
            break
        words.append(text)
    return " ".join(words).partition(". ")[0].rstrip(".") + "."


def print_help(command: str, description: str, classes: Sequence[Any], *, all_keys: bool) -> None:
    """Prints the help of `train` or `sft`; our `classes` of keys come first. `all_keys`: TRL's, too, as argparse lists
    them."""
    if all_keys:
        usage = f"trl-search {command} RECIPE [--key value ...]"
        TrlParser(classes, prog=f"trl-search {command}", usage=usage).print_help()
        return
    lines = [f"usage: trl-search {command} RECIPE [--key value ...]", "", description.strip(), "", "Recipes:", ""]
    lines += recipe_lines(command)
    agent = dataclasses.fields(AgentSettings)
    names = {field.name for field in agent}
    own = inspect.get_annotations(classes[1])  # without the keys inherited from TRL
    for heading, fields in (
        ("The task", [field for field in dataclasses.fields(classes[0]) if field.name not in names]),
        ("The agent", agent),
        ("The training (TRL's keys not listed)", [f for f in dataclasses.fields(classes[1]) if f.name in own]),
    ):
        lines += ["", f"{heading}:"]
        lines += [line for field in fields for line in _described(field)]
    lines += [
        "",
        f"`trl-search {command} --help_all` also lists TRL's keys.",
        "`trl-search recipes show NAME` prints a recipe.",
    ]
    print("\n".join(lines))


def _described(field: dataclasses.Field[Any]) -> list[str]:
    made = field.default_factory() if field.default_factory is not dataclasses.MISSING else field.default
    default = "" if made is None or made in ("", []) else f" (default: {_shown(made)})"
    said = " ".join(str(field.metadata.get("help", "")).split())
    text = textwrap.wrap(f"{said}{default}", WIDTH, initial_indent=INDENT, subsequent_indent=INDENT)
    return [f"  --{field.name}", *text]


def _shown(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value).replace("\n", "\\n")
