"""Converts golden answers from the formats of common datasets to a list of strings.

    "Lyon"   ["Lyon", "Lugdunum"]   numpy.array(["Lyon"])   b"Lyon"
    1998   1998.0                                             numbers: "1998"
    '["Lyon", "Lugdunum"]'   "['Lyon', 'Lugdunum']"           a list as JSON (PopQA), or as pandas writes it
    {"value": "Lyon", "aliases": ["Lugdunum"], …}             TriviaQA
    {"text": ["Lyon", "Lyon"], "answer_start": [17, 80]}      SQuAD
    {"target": ["Lyon"]}                                      Search-R1's ground truth
    '{"value": "Lyon", "aliases": ["Lugdunum"]}'               one of these structs as text, in a csv

Any other format is an error: as a string it would match no answer, and every reward of a run would be 0.
"""

from __future__ import annotations

import ast
import json
import math
from collections.abc import Mapping
from typing import Any

from trl_search.common.errors import UserError


def golden_list(value: Any) -> list[str]:
    """Returns golden answers as a list of strings, without missing values (`None`, NaN).

    Raises:
        UserError: for a value in another format; the message names its type.

    Example:
        >>> golden_list("Paris"), golden_list(None), golden_list(1998.0)
        (['Paris'], [], ['1998'])
        >>> golden_list({"value": "Paris", "aliases": ["Paname", "Paris"]})
        ['Paris', 'Paname']
    """
    value = _plain(value)
    if isinstance(value, str):
        value = _read_literal(value)
    if isinstance(value, Mapping):
        value = _unpacked(value)
    if not isinstance(value, (list, tuple)):
        return _answers(value)
    answers: list[str] = []
    for one in map(_plain, value):
        if isinstance(one, (list, tuple)):
            raise UserError(f"a golden answer is a nested list, {one!r:.80}: give one flat list of strings")
        answers += golden_list(one) if isinstance(one, (Mapping, str)) else _answers(one)
    return answers


def _answers(value: Any) -> list[str]:
    text = read_text(value, "a golden answer")
    return [] if text is None else [text]


def read_text(value: Any, name: str) -> str | None:
    """Returns a string or a number as text, and `None` for a missing value (`None`, NaN).

    Raises:
        UserError: for a value of another type; the message names the type.
    """
    value = _plain(value)
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, bytes):
        try:
            return value.decode("utf-8")
        except UnicodeDecodeError:
            raise UserError(f"{name} is {value!r:.80}, bytes that are not UTF-8: write it as text") from None
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if isinstance(value, float) and not math.isinf(value):
        if math.isnan(value):
            return None
        return str(int(value)) if value.is_integer() else str(value)
    raise UserError(f"{name} is {value!r:.80}, of type {type(value).__name__}: write it as a string")


def _plain(value: Any) -> Any:
    """Converts a NumPy array to a list, and a NumPy scalar to a Python scalar."""
    return value.tolist() if hasattr(value, "tolist") else value


def _unpacked(struct: Mapping[str, Any]) -> list[Any]:
    """The answers of a struct, without duplicates."""
    if "value" in struct and "aliases" in struct:
        held = [struct["value"], *_as_list(struct["aliases"])]
    elif "text" in struct and "answer_start" in struct:
        held = _as_list(struct["text"])
    elif "target" in struct:
        held = _as_list(struct["target"])
    else:
        raise UserError(
            f"the golden answers are {dict(struct)!r:.80}, a struct with the fields {', '.join(map(str, struct))}: "
            "give a list of strings"
        )
    return [one for index, one in enumerate(held) if one not in held[:index]]


def _as_list(value: Any) -> list[Any]:
    value = _plain(value)
    if value is None:
        return []
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _read_literal(text: str) -> str | list[Any] | dict[str, Any]:
    """Parses a string that is a struct, or a list of strings (some may be null); returns any other string unchanged,
    such as `[1]`, `[sic]` and `(1, 2)`.

    Raises:
        UserError: for a string that begins like one of these, but cannot be parsed.
    """
    stripped = text.strip()
    if stripped[:1] + stripped[-1:] not in ("[]", "{}", "()"):
        return text
    for read in (json.loads, ast.literal_eval):
        try:
            value = read(stripped)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
        # Python joins the strings of "['a' 'b']", which is how NumPy prints an array, into one.
        if read is ast.literal_eval and repr(value) != stripped:
            continue
        if isinstance(value, dict) and value:
            return value
        types = {*map(type, value)} if isinstance(value, list | tuple) else set()
        if value == [] or types in ({str}, {str, type(None)}):
            return list(value)
    if stripped[0] != "(" and stripped[1:].lstrip().startswith(("'", '"')):
        raise UserError(
            f"the golden answers {text!r:.80} look like a list or a struct but do not parse: write them as JSON"
        )
    return text
