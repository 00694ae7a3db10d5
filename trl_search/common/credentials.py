"""Tokens and keys: read from the environment, and checked for use in a header. No message contains one."""

from __future__ import annotations

import os

from trl_search.common.errors import UserError


def from_environment(variable: str) -> str | None:
    """The key in a variable, without a trailing newline as mounted files have it; `None` if there is none."""
    return os.environ.get(variable, "").strip() or None


def bearer_token(token: str, source: str) -> str:
    """The token for `Authorization: Bearer ...`.

    Args:
        source (`str`): Where it comes from, for the message: a variable, a file.

    Raises:
        UserError: if no header can hold it. An HTTP client's own error would print the token.
    """
    token = token.strip()
    if not token or not token.isascii() or not token.isprintable():
        raise UserError(f"the token from {source} must be printable ASCII and not empty: it travels in an HTTP header")
    return token


def required_token(variable: str) -> str:
    """The bearer token in a variable that `token_env` names.

    Raises:
        UserError: if it is not set, or no header can hold it.
    """
    token = from_environment(variable)
    if token is None:
        raise UserError(f"the environment variable {variable}, named by token_env, is not set")
    return bearer_token(token, variable)
