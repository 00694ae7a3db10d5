"""Checks the values of a recipe against the types of their keys before any of TRL's classes is built.

YAML guesses types: `save_strategy: no` is false, `learning_rate: 1e-6` is a string, and `reward_funcs: em` is a string
instead of a list. A value with only one possible meaning is converted; any other is an error.
"""

from __future__ import annotations

import dataclasses
import enum
import json
import types
from collections.abc import Mapping, Sequence
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from trl_search.common.errors import UserError

_WORDS = {bool: "true or false", int: "a whole number", float: "a number", str: "a string", dict: "a mapping"}
_BOOLEANS = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}
_NUMERIC = {int, float, bool, type(None), list[int], list[float]}


class _Mismatch(Exception):
    """The value has the wrong type."""


def checked_values(values: Mapping[str, Any], arguments: Sequence[type], source: str) -> dict[str, Any]:
    """Returns the values of a recipe, each converted to the type of its key.

    Raises:
        UserError: for values of the wrong type; the message names all their keys and the types that they need.

    Example:
        >>> checked_values({"save_strategy": False, "learning_rate": "1e-6"}, [SearchGRPOConfig], "mine.yaml")
        {'save_strategy': 'no', 'learning_rate': 1e-06}
    """
    hints: dict[str, Any] = {}
    for one in arguments:
        hints |= get_type_hints(one)
    checked, wrong = {}, []
    for key, value in values.items():
        try:
            if key.endswith("_options") and isinstance(value, Mapping) and hints.get(key) is str:
                value = json.dumps(value)  # the command line takes it as JSON
            checked[key] = _convert(value, hints[key]) if key in hints else value
        except _Mismatch:
            shown = "empty" if value is None else f"{value!r:.60}"
            wrong.append(f"{key} is {shown}, but must be {_described(hints[key])}")
    if wrong:
        raise UserError(f"{source}: {'; '.join(wrong)}")
    return checked


def convert_numbers(settings: Any) -> None:
    """Converts the numbers and booleans of a configuration that is made in Python: `"1e-6"` from YAML, or NumPy's.

    Raises:
        UserError: for values of the wrong type; the message names all their keys and the types that they need.
    """
    hints = get_type_hints(type(settings))
    given = {
        one.name: getattr(settings, one.name)
        for one in dataclasses.fields(settings)
        if _NUMERIC.issuperset(_kinds(hints[one.name]))
    }
    # Some keys are None by default, though their type does not say so.
    known = {name: value for name, value in given.items() if value is not None}
    for name, value in checked_values(known, [type(settings)], type(settings).__name__).items():
        setattr(settings, name, value)


def _convert(value: Any, hint: Any) -> Any:
    kinds = _kinds(hint)
    if value is None:
        if type(None) in kinds or Any in kinds:
            return None
        raise _Mismatch
    if value is False and any(map(_is_enum, kinds)):
        return "no"  # YAML reads `save_strategy: no` as false
    # Try the value's own type first, so that `int | str` keeps a number.
    for kind in sorted(kinds, key=lambda kind: type(value) is not (get_origin(kind) or kind)):
        try:
            return _as(value, kind)
        except _Mismatch:
            continue
    raise _Mismatch


def _kinds(hint: Any) -> tuple[Any, ...]:
    """The types of a union. `SaveStrategy | str` means the names of the enumeration, so `str` is dropped."""
    kinds = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    return tuple(kind for kind in kinds if kind is not str) if any(map(_is_enum, kinds)) else tuple(kinds)


def _is_enum(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, enum.Enum)


def _as(value: Any, kind: Any) -> Any:
    origin = get_origin(kind) or kind
    if origin is Any:
        return value
    if origin is Literal:
        if value in get_args(kind):
            return value
    elif origin is list:
        value = value.tolist() if hasattr(value, "tolist") else value  # of NumPy
        (element,) = get_args(kind) or (Any,)
        if not isinstance(value, (Mapping, bool)):
            return [_convert(one, element) for one in (value if isinstance(value, (list, tuple)) else [value])]
    elif origin in (dict, Mapping):
        if isinstance(value, Mapping):
            return dict(value)
    elif isinstance(origin, type):
        return _scalar(value, origin)
    raise _Mismatch


def _scalar(value: Any, kind: type) -> Any:
    if hasattr(value, "item"):  # of NumPy
        value = value.item()
    if _is_enum(kind):
        if isinstance(value, str):
            return value  # transformers checks the name
    elif kind is bool:
        if isinstance(value, bool):
            return value
        if isinstance(value, str) and value.lower() in _BOOLEANS:
            return _BOOLEANS[value.lower()]
    elif kind in (int, float):
        if isinstance(value, (int, float, str)) and not isinstance(value, bool):
            return _number(value, kind)
    elif kind is str:
        if isinstance(value, (str, int, float)) and not isinstance(value, bool):
            return str(value)
    elif isinstance(value, kind):
        return value
    raise _Mismatch


def _number(value: int | float | str, kind: type) -> int | float:
    try:
        number = kind(value)
    except (ValueError, OverflowError):  # "three"; infinity for an int
        raise _Mismatch from None
    if kind is int and isinstance(value, float) and number != value:
        raise _Mismatch
    return number


def _described(hint: Any) -> str:
    words = dict.fromkeys(_word(kind) for kind in _kinds(hint) if kind is not type(None))
    return " or ".join(words)


def _word(kind: Any) -> str:
    origin = get_origin(kind) or kind
    if origin is Literal:
        return "one of " + ", ".join(map(str, get_args(kind)))
    if origin is list:
        (element,) = get_args(kind) or (str,)
        return f"a list ({_described(element)} each)"
    if _is_enum(origin):
        return "one of " + ", ".join(str(one.value) for one in origin)
    return _WORDS.get(origin, f"a {getattr(origin, '__name__', origin)}")
