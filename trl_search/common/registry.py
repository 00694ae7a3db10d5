"""`Registry`: objects that are chosen by name, from this package and from other installed packages.

| what               | entry-point group        | where the built-in names are                         |
|--------------------|--------------------------|------------------------------------------------------|
| a retriever        | `trl_search.retrievers`  | `RETRIEVERS` in `retrieval/registry.py`              |
| a kind of index    | `trl_search.index_kinds` | `INDEX_KINDS` in `retrieval/registry.py`             |
| a reward           | `trl_search.rewards`     | `REWARDS` in `rewards/registry.py`                   |
| a protocol         | `trl_search.protocols`   | `PROTOCOLS` in `protocols/registry.py`               |
| an environment     | `trl_search.environments`| `ENVIRONMENTS` in `environment/registry.py`          |

A package adds a name through the entry-point group in its own pyproject.toml (docs/extending.md has examples):

    [project.entry-points."trl_search.retrievers"]
    elastic = "my_package.elastic:load"
"""

from __future__ import annotations

import functools
import importlib
import inspect
import os
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import EntryPoints, entry_points
from pathlib import Path
from typing import Any

from trl_search.common.errors import UserError, nearest_names, unknown_name


@dataclass(frozen=True)
class Registry:
    """Maps names to objects, which are imported on first use. Packages add names through the entry-point group, but
    cannot replace ours."""

    noun: str
    group: str
    built_in: Mapping[str, str]

    def names(self) -> list[str]:
        """Every name: ours first, then those of installed packages."""
        installed = {point.name for point in _installed(self.group, tuple(sys.path))}
        return [*self.built_in, *sorted(installed - set(self.built_in))]

    def __contains__(self, name: str) -> bool:
        return name in self.built_in or name in self.names()

    def get(self, name: str) -> Any:
        """Imports the object called `name`.

        Raises:
            UserError: for an unknown name, or an entry of an installed package that cannot be imported.
        """
        if not isinstance(name, str):
            raise unknown_name(self.noun, name, self.names())
        if name in self.built_in:
            module, _, attribute = self.built_in[name].partition(":")
            return getattr(importlib.import_module(module), attribute)
        for point in _installed(self.group, tuple(sys.path)).select(name=name):
            try:
                return point.load()
            except (ImportError, AttributeError) as error:
                package = point.dist.name if point.dist else "unknown"
                raise UserError(
                    f"{self.noun} {name!r} of package {package!r} ({point.value}) cannot be imported: {error}"
                ) from error
        raise unknown_name(self.noun, name, self.names())

    def unknown(self, name: object) -> UserError:
        """The error for a name that is not registered, where an import path would also do."""
        own = name if isinstance(name, str) and name.isidentifier() else "name"
        if isinstance(name, str) and "," in name:
            return unknown_name(self.noun, name, self.names())
        return UserError(
            f"{unknown_name(self.noun, name, self.names())} Your own {self.noun} is given by its import path: "
            f"my_module:{own}, of my_module.py in the working directory or of an installed package."
        )

    def find(self, name: str) -> Any:
        """Imports the object of a registered name or of an import path (see [`import_object`]).

        Raises:
            UserError: for an unknown name, or if it cannot be imported.
        """
        if isinstance(name, str) and name not in self and is_import_path(name):
            return import_object(self.noun, name)
        if not isinstance(name, str) or name not in self:
            raise self.unknown(name)
        return self.get(name)


def import_object(noun: str, path: str) -> Any:
    """Imports the object of an import path, `my_package.module:attribute` or `my_package.module.attribute`.

    Raises:
        UserError: if it cannot be imported, or is the path of a file.
    """
    if is_python_file(path):
        raise UserError(_file_for_import_path(noun, path))
    module, _, attribute = path.replace(":", ".").rpartition(".")
    if not module:
        raise UserError(f"{noun} {path!r} cannot be imported: write module:name, as in {attribute or 'module'}:name")
    # Python does not put the working directory into the path of a console script.
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        imported = importlib.import_module(module)
    except (ImportError, ValueError) as error:
        top = module.partition(".")[0]
        missing = isinstance(error, ModuleNotFoundError) and error.name == top
        remedy = f": put {top}.py into {os.getcwd()}, or install the package" if missing else ""
        raise UserError(f"{noun} {path!r} cannot be imported: {error}{remedy}") from error
    try:
        return getattr(imported, attribute)
    except AttributeError as error:
        near = nearest_names(attribute, [name for name in vars(imported) if not name.startswith("_")], 1)
        remedy = f": did you mean {module}:{near[0]}?" if near else ""
        where = f" ({imported.__file__})" if getattr(imported, "__file__", None) else ""
        raise UserError(f"{noun} {path!r} cannot be imported: {error}{where}{remedy}") from error


@functools.lru_cache(maxsize=64)
def _installed(group: str, path: tuple[str, ...]) -> EntryPoints:
    """The entry points of a group, cached per `sys.path`, because finding them reads every installed package."""
    return entry_points(group=group)


def is_python_file(name: str) -> bool:
    """Whether a word is the path of a Python file, also with an attribute: `./rewards.py` or `rewards.py:brevity`."""
    return re.fullmatch(r".*[^./]\.py([:.]\w+)?", name) is not None


def _file_for_import_path(noun: str, path: str) -> str:
    """The error for the path of a file where an import path is needed."""
    file, _, attribute = path.rpartition(".py")
    where = Path(file)
    below = [] if where.is_absolute() or ".." in where.parts else where.parts[:-1]
    module = ".".join([*below, where.name])
    moved = "" if below or len(where.parts) == 1 else f", and start in the folder of {where.name}.py"
    return f"{noun} {path!r} is a file: give its import path, {module}:{attribute[1:] or 'NAME'}{moved}"


def is_import_path(name: str) -> bool:
    """Whether a word is an import path such as `my_package.module:attribute`, not a registered name."""
    return "." in name or ":" in name


def check_options(what: str, make: Callable[..., Any], options: Mapping[str, Any]) -> None:
    """Checks that `make(**options)` can be called. `what` is the beginning of the message.

    Raises:
        UserError: for an unknown or a missing option; the message lists all.
    """
    signature = inspect.signature(make)
    try:
        signature.bind(**options)
    except TypeError as error:
        named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
        names = [one.name for one in signature.parameters.values() if one.kind in named]
        all_of_them = f"its options are: {', '.join(names)}" if names else "it has no options"
        raise UserError(f"{what}: {error}; {all_of_them}") from None
