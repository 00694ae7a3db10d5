"""Reads tokens and keys from the environment and checks that a header can hold them. No message contains one."""

from __future__ import annotations

import os

from trl_search.common.errors import UserError


def from_environment(variable: str) -> str | None:
    """The key in an environment variable, without surrounding white space; `None` if it is unset or empty."""
    return os.environ.get(variable, "").strip() or None


def bearer_token(token: str, source: str) -> str:
    """The token for `Authorization: Bearer ...`.

    Raises:
        UserError: if no header can hold the token. The error of an HTTP client would print it.
    """
    token = token.strip()
    if not token or not token.isascii() or not token.isprintable():
        raise UserError(f"the token from {source} must be printable ASCII and not empty: it is sent in an HTTP header")
    return token


def authorization(variable: str | None) -> dict[str, str]:
    """The header with the bearer token in the environment variable that `token_env` names; empty without a name.

    Raises:
        UserError: if the variable is not set, or no header can hold the token.
    """
    if variable is None:
        return {}
    token = from_environment(variable)
    if token is None:
        raise UserError(f"the environment variable {variable}, named by token_env, is not set: set it to the token")
    return {"Authorization": f"Bearer {bearer_token(token, variable)}"}
