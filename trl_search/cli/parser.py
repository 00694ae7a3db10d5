"""The parser of the commands that take no recipe. A mistake is one line, without the usage of twenty lines above it.

trl-search: error: unknown option '--retreiver': did you mean '--retriever'?
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any, NoReturn

from trl_search.common.errors import UserError, unknown_name

_UNRECOGNIZED = "unrecognized arguments: "  # how argparse begins the message


class CommandParser(argparse.ArgumentParser):
    """argparse's parser, with one-line errors."""

    def error(self, message: str) -> NoReturn:
        """Raises `UserError`; for an unknown option, with the nearest ones."""
        words = message.removeprefix(_UNRECOGNIZED).split() if message.startswith(_UNRECOGNIZED) else []
        for word in words:
            if word.startswith("--"):
                self._refuse_named_positional(word.partition("=")[0])
                raise unknown_name("option", word.partition("=")[0], set(self._options()))
        raise UserError(f"{message.removeprefix('argument ')}; {self.prog} --help describes the command")

    def _refuse_named_positional(self, option: str) -> None:
        """Refuses `--model M` of a command that takes MODEL as its first word."""
        for action in self._actions:
            shown = str(action.metavar or action.dest).upper()
            if not action.option_strings and shown == option.removeprefix("--").upper():
                raise UserError(f"{shown} is given without {option}; {self.prog} --help describes the command")

    def _options(self) -> Iterator[str]:
        for action in self._actions:
            yield from (option for option in action.option_strings if option.startswith("--"))

    def add_subparsers(self, **options: Any) -> Any:
        return super().add_subparsers(**{"parser_class": ActionParser, **options})


class ActionParser(CommandParser):
    """The parser of one of a command's actions, such as `data audit`."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Refuses unknown words here. Else argparse leaves them to the parser of the command, which does not have this
        action's options."""
        found, unknown = super().parse_known_args(args, namespace)
        if unknown:
            self.error(_UNRECOGNIZED + " ".join(unknown))
        return found, unknown
