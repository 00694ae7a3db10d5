"""The registry of environments. Register a new one here, or from an installed package:

    [project.entry-points."trl_search.environments"]
    calculator = "my_package.calculator:Calculator"

A name maps to a subclass of `Environment`, or to a function that returns an environment; its parameters are the
`environment_options` of a recipe. A parameter `retriever` receives the retriever that `retriever` and
`retriever_options` name; without that parameter, no retriever is needed.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trl_search.common.errors import UserError, unknown_name
from trl_search.common.registry import Registry, check_options
from trl_search.environment.base import Environment, check_environment
from trl_search.environment.search import SearchEnvironment
from trl_search.retrieval.base import Retriever

SEARCH = "search"
ENVIRONMENTS = Registry(
    "environment", "trl_search.environments", {SEARCH: "trl_search.environment.search:SearchEnvironment"}
)


def load_environment(
    name: str,
    *,
    retriever: Retriever | str | Path | None = None,
    budgets: Mapping[str, Any] | None = None,
    **options: Any,
) -> Environment:
    """Makes the named environment.

    Args:
        name (`str`): `"search"`, a name that an installed package adds, or an import path, `my_package.world:World`.
        retriever ([`Retriever`] or `str`, *optional*): The retriever that the environment searches.
        budgets (`Mapping`, *optional*): Options that are dropped if the environment has no such parameter.
        options: The environment's own options.

    Raises:
        UserError: for an unknown name or option, a missing retriever, or a retriever that the environment does not
            accept.

    Example:
        >>> load_environment("search", retriever="indexes/wiki", max_searches=2)
        >>> load_environment("my_package.calculator:Calculator", max_calls=3)
    """
    make = ENVIRONMENTS.find(name)
    if not callable(make) or (isinstance(make, type) and not issubclass(make, Environment)):
        raise UserError(f"environment {name!r} is neither a subclass of Environment nor a function that makes one")
    given = {key: value for key, value in (budgets or {}).items() if _has_parameter(make, key)} | options
    if needs_retriever(name) and retriever is None:
        raise UserError(f"environment {name!r} searches: give a retriever")
    if retriever is not None:
        if not _has_parameter(make, "retriever"):
            raise UserError(f"environment {name!r} has no parameter `retriever`: leave the retriever out")
        given["retriever"] = retriever
    check_options(f"environment {name!r}", make, given)
    known = _search_options(make)
    for key in given:
        if known and key not in known:
            raise UserError(f"environment {name!r}: {unknown_name('option', key, known)}")
    made = make(**given)
    if not isinstance(made, Environment):
        raise UserError(f"environment {name!r} returned a {type(made).__name__}, not an Environment")
    return check_environment(made)


def takes_retriever(name: str) -> bool:
    """Whether the environment of that name has a parameter `retriever`."""
    return _has_parameter(ENVIRONMENTS.find(name), "retriever")


def call_word(name: str) -> str:
    """The word for an environment's tool calls in tables."""
    return "searches" if name == SEARCH else "calls"


def needs_retriever(name: str) -> bool:
    """Whether the environment of that name cannot be made without a retriever."""
    make = ENVIRONMENTS.find(name)
    if not _has_parameter(make, "retriever"):
        return False
    parameter = inspect.signature(make).parameters.get("retriever")
    return parameter is None or parameter.default is inspect.Parameter.empty


def name_of(environment: Environment) -> str:
    """The name or import path that `load_environment` takes to make another environment of this kind."""
    kind = type(environment)
    return SEARCH if kind is SearchEnvironment else f"{kind.__module__}:{kind.__qualname__}"


def options_of(environment: Environment) -> dict[str, Any]:
    """The environment's options that differ from their defaults: plain values stored under a parameter's name.

    Example:
        >>> options_of(Calculator(max_calls=3))
        {'max_calls': 3}
    """
    kind = type(environment)
    kinds: list[type[Environment]] = [kind, SearchEnvironment] if issubclass(kind, SearchEnvironment) else [kind]
    defaults = {
        name: parameter.default for one in kinds for name, parameter in inspect.signature(one).parameters.items()
    }
    held = {name: value for name, value in vars(environment).items() if _is_told(name, value)}
    return {name: value for name, value in held.items() if name in defaults and value != defaults[name]}


def described(environment: Environment) -> dict[str, Any]:
    """The description of an environment in `run.json`: its name, its plain values, its tools and its instruction."""
    return {
        "name": name_of(environment),
        "options": {name: value for name, value in vars(environment).items() if _is_told(name, value)},
        "tools": list(environment.tools),
        "instruction": environment.instruction,
    }


def _is_told(name: str, value: Any) -> bool:
    return not name.startswith("_") and isinstance(value, str | int | float | None)


def _search_options(make: Any) -> list[str]:
    """The options of a subclass of `SearchEnvironment`, whose `**options` go to the class above it; else none."""
    if not (isinstance(make, type) and issubclass(make, SearchEnvironment)):
        return []
    classes = make.__mro__[: make.__mro__.index(SearchEnvironment) + 1]
    parameters = [one for cls in classes for one in inspect.signature(cls).parameters.values()]
    # Both classes may have the same parameter, `retriever` above all: each name once, in order.
    return list(dict.fromkeys(one.name for one in parameters if one.kind is not inspect.Parameter.VAR_KEYWORD))


def _has_parameter(make: Any, name: str) -> bool:
    """Whether a class or function accepts this keyword. A subclass's `**options` are passed to `SearchEnvironment`."""
    if not callable(make):
        return False
    try:
        parameters = inspect.signature(make).parameters
    except ValueError:  # some built-in functions have no signature
        return False
    if name in parameters:
        return True
    passed_on = any(one.kind is inspect.Parameter.VAR_KEYWORD for one in parameters.values())
    inherits = isinstance(make, type) and issubclass(make, SearchEnvironment)
    return passed_on and inherits and name in inspect.signature(SearchEnvironment).parameters
