"""Collects all problems before a command starts, and reports them in one error, each with its remedy."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TypeVar

from trl_search.cli.preflight import Check, Status
from trl_search.common.errors import Explained, UserError

Value = TypeVar("Value")


class StartChecks:
    """Collects problems, and raises one error with all of them.

    Example:
        >>> found = StartChecks()
        >>> searched = found.see("retriever", lambda: resolve_searched("indexes/wiki"))
        >>> found.refuse()
        UserError: there is no index folder indexes/wiki; build it with: trl-search index ...
    """

    def __init__(self) -> None:
        self.checks: list[Check] = []

    def see(self, name: str, work: Callable[[], Value]) -> Value | None:
        """Returns the result of `work`; if it raises an `Explained` error, records a problem and returns `None`."""
        try:
            return work()
        except Explained as error:
            self.checks.append(Check(name, Status.PROBLEM, str(error)))
            return None

    def add(self, checks: Iterable[Check]) -> None:
        self.checks += checks

    def refuse(self) -> None:
        """Raises `UserError` with every problem if there is any."""
        refuse(self.checks)


def refuse(checks: Iterable[Check]) -> None:
    """Raises `UserError` with every problem among the checks and its remedy, if there is any.

    A problem that several checks met, such as an environment that cannot be imported, is listed once.
    """
    problems: list[Check] = []
    for check in checks:
        if check.status is Status.PROBLEM and check.said not in [problem.said for problem in problems]:
            problems.append(check)
    if len(problems) == 1:
        raise UserError(problems[0].text)
    if problems:
        lines = [f"  {check.name}: {check.text}" for check in problems]
        raise UserError("\n".join(["this cannot run here:", *lines]))
