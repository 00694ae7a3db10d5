"""`Registry`: things that are chosen by name, ours and those of installed packages.

A package adds a name through the registry's entry-point group, in its own pyproject.toml:

    [project.entry-points."trl_search.retrievers"]
    elastic = "my_package.elastic:load"
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import entry_points
from typing import Any

from trl_search.common.errors import UserError, unknown_name


@dataclass(frozen=True)
class Registry:
    """Names and what they stand for, imported when it is asked for.

    Args:
        noun (`str`): What a name stands for, as messages call it: `"retriever"`.
        group (`str`): The entry-point group of other packages.
        built_in (`Mapping[str, str]`): Our own names, each with its `"module:attribute"`. No package replaces them.

    Example:
        >>> Registry("retriever", "trl_search.retrievers", {"bm25": "trl_search.retrieval.bm25.retriever:load"})
    """

    noun: str
    group: str
    built_in: Mapping[str, str]

    def names(self) -> list[str]:
        """Every name: ours first, then those of installed packages."""
        return [*self.built_in, *sorted({point.name for point in entry_points(group=self.group)} - set(self.built_in))]

    def __contains__(self, name: str) -> bool:
        return name in self.names()

    def get(self, name: str) -> Any:
        """Imports what `name` stands for.

        Raises:
            UserError: for a name that nobody has, and for an installed package whose entry cannot be imported.
        """
        if name in self.built_in:
            module, _, attribute = self.built_in[name].partition(":")
            return getattr(importlib.import_module(module), attribute)
        for point in entry_points(group=self.group, name=name):
            try:
                return point.load()
            except (ImportError, AttributeError) as error:
                package = point.dist.name if point.dist else "unknown"
                raise UserError(
                    f"{self.noun} {name!r} of package {package!r} ({point.value}) cannot be imported: {error}"
                ) from error
        raise unknown_name(self.noun, name, self.names())
