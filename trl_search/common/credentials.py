"""Tokens and keys: where they come from, and what may travel in a header. No message ever holds one."""

from __future__ import annotations

import os

from trl_search.common.errors import UserError


def from_environment(variable: str) -> str | None:
    """The key that a variable holds, without the newline that ends a mounted file; `None` where it holds none."""
    return os.environ.get(variable, "").strip() or None


def bearer_token(token: str, source: str) -> str:
    """The token as it goes into `Authorization: Bearer ...`.

    Args:
        source (`str`): What the user knows it by: a variable, a file.

    Raises:
        UserError: for one that no header can hold. Whoever sent it would be told, and would tell it.
    """
    token = token.strip()
    if not token or not token.isascii() or not token.isprintable():
        raise UserError(f"the token from {source} must be printable ASCII and not empty: it travels in an HTTP header")
    return token


def required_token(variable: str) -> str:
    """The bearer token in a variable that `token_env` names.

    Raises:
        UserError: where it is not set, or no header can hold it.
    """
    token = from_environment(variable)
    if token is None:
        raise UserError(f"the environment variable {variable}, named by token_env, is not set")
    return bearer_token(token, variable)
