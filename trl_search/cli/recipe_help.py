"""The help of `train` and `sft`: what the command does, the recipes, and our keys in groups. TRL's 200 keys have the
same meaning as in TRL, and are listed by `--help_all`."""

from __future__ import annotations

import dataclasses
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from trl_search.config.recipe import recipe_command, shipped_recipes

WIDTH = 118


def recipe_lines(command: str | None = None) -> list[str]:
    """One line per recipe that ships: its name and the first sentence of its header."""
    names = [name for name in sorted(shipped_recipes()) if command in (None, recipe_command(name))]
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


def short_help(command: str, description: str, groups: Mapping[str, Sequence[dataclasses.Field[Any]]]) -> str:
    """What `trl-search train --help` prints.

    Args:
        description (`str`): The docstring of the command.
        groups (`Mapping`): Fields of our dataclasses, under a heading each.
    """
    lines = [f"usage: trl-search {command} RECIPE [--key value ...]", "", description.strip(), "", "Recipes:", ""]
    lines += recipe_lines(command)
    for heading, fields in groups.items():
        lines += ["", f"{heading}:", ""]
        for field in fields:
            lines += _described(field)
    return "\n".join(
        [
            *lines,
            "",
            f"`trl-search {command} --help_all` lists TRL's keys too, `trl-search recipes show NAME` prints a recipe.",
        ]
    )


def own_fields(cls: Any, *, but: Sequence[str] = ()) -> list[dataclasses.Field[Any]]:
    """The fields that a dataclass declares itself, without what it inherits."""
    declared = cls.__dict__.get("__annotations__", {})
    return [field for field in dataclasses.fields(cls) if field.name in declared and field.name not in but]


def _described(field: dataclasses.Field[Any]) -> list[str]:
    made = field.default_factory() if field.default_factory is not dataclasses.MISSING else field.default
    default = "" if made is None or made == "" or made == [] else f" (default: {_shown(made)})"
    said = " ".join(str(field.metadata.get("help", "")).split())
    return [f"  --{field.name}", *textwrap.wrap(f"{said}{default}", WIDTH, initial_indent=" " * 6, subsequent_indent=" " * 6)]


def _shown(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value).replace("\n", "\\n")


def print_help(
    argv: Sequence[str], command: str, description: str, groups: Mapping[str, Any], classes: Sequence[Any]
) -> bool:
    """Prints the help that was asked for, if any was; says whether."""
    if "--help_all" in argv:
        from trl import TrlParser

        TrlParser(classes, prog=f"trl-search {command}", usage=f"trl-search {command} RECIPE [--key value ...]").print_help()
        return True
    if {"-h", "--help"} & set(argv):
        print(short_help(command, description, groups))
        return True
    return False
