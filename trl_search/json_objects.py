"""JSON objects from outside: a file that another program wrote, an option that a user typed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from trl_search.errors import UserError


def read_object(path: Path, remedy: str) -> dict[str, Any]:
    """The JSON object that a file holds.

    Args:
        remedy (`str`): What to do about a file that holds none: the end of the message.

    Raises:
        UserError: where it is not JSON, was cut off, or is another value than an object.
    """
    try:
        value = json.loads(path.read_bytes())
    except ValueError as error:
        raise UserError(f"{path} is not JSON ({error}): {remedy}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} holds no JSON object: {remedy}")
    return value


def parse_object(text: str, option: str, example: str) -> dict[str, Any]:
    """The JSON object that stands in an option or in a recipe's key.

    Example:
        >>> parse_object('["wiki"]', "--retriever_options", '{"index": "indexes/wiki"}')
        UserError: --retriever_options must be a JSON object such as {"index": "indexes/wiki"}, not ["wiki"]
    """
    try:
        value = json.loads(text)
    except ValueError as error:
        raise UserError(f"{option} is not JSON ({error}): write an object such as {example}, not {text}") from None
    if not isinstance(value, dict):
        raise UserError(f"{option} must be a JSON object such as {example}, not {text}")
    return value
