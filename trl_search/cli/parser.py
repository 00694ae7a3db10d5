"""The parser of the commands that take no recipe. A mistake is one line, without the usage of twenty lines above it.

trl-search: error: unknown option '--retreiver': did you mean '--retriever'?
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import NoReturn

from trl_search.common.errors import UserError, unknown_name

_UNRECOGNIZED = "unrecognized arguments: "  # how argparse begins the message


class CommandParser(argparse.ArgumentParser):
    """argparse's parser, with one-line errors. The parsers of a command's actions are of this class, too."""

    def error(self, message: str) -> NoReturn:
        """Raises `UserError`; for an unknown option, with the nearest ones."""
        words = message.removeprefix(_UNRECOGNIZED).split() if message.startswith(_UNRECOGNIZED) else []
        for word in words:
            if word.startswith("--"):
                raise unknown_name("option", word.partition("=")[0], set(self._options()))
        raise UserError(f"{message.removeprefix('argument ')}; {self.prog} --help describes the command")

    def _options(self) -> Iterator[str]:
        for action in self._actions:
            yield from (option for option in action.option_strings if option.startswith("--"))
            if isinstance(action, argparse._SubParsersAction):
                for parser in action.choices.values():
                    yield from parser._options()
