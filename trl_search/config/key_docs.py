"""The keys of a configuration: each declared with its help, which is also added to the docstring of its class."""

from __future__ import annotations

import dataclasses
import inspect
import textwrap
from collections.abc import Sequence
from typing import Any, TypeVar

Config = TypeVar("Config", bound=type)
_WIDTH = 115


def key(default: Any, text: str, *, choices: Sequence[str] = ()) -> Any:
    """The field of a dataclass that is a key of recipes: its default, its help, and its values if only some are
    allowed."""
    metadata = {"help": text, **({"choices": list(choices)} if choices else {})}
    if isinstance(default, list):
        return dataclasses.field(default_factory=default.copy, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def with_documented_keys(cls: Config) -> Config:
    """Adds every key that trl-search declares with a help to the docstring of a dataclass, in TRL's form.

    Example:
        >>> help(SearchGRPOConfig)
        ...
        max_searches (`int`, *optional*, defaults to `4`):
            Searches per trajectory. ...
    """
    lines = [inspect.cleandoc(cls.__doc__ or ""), "", "Keys:"]
    declared = {
        name
        for base in cls.__mro__
        if base.__module__.startswith("trl_search.")
        for name in inspect.get_annotations(base)
    }
    for key in dataclasses.fields(cls):
        if key.name in declared and "help" in key.metadata:
            made = key.default_factory() if key.default_factory is not dataclasses.MISSING else key.default
            lines.append(f"    {key.name} (`{key.type}`, *optional*, defaults to `{made!r}`):")
            lines += textwrap.wrap(key.metadata["help"], _WIDTH, initial_indent=" " * 8, subsequent_indent=" " * 8)
    cls.__doc__ = "\n".join(lines) + "\n"
    return cls
