"""Tokens and keys: stripped of newlines, refused if a header cannot hold them, and never shown."""

from __future__ import annotations

import pytest

from trl_search.common.credentials import authorization, bearer_token, from_environment
from trl_search.common.errors import UserError


def test_the_newline_of_a_mounted_file_is_stripped(monkeypatch):
    monkeypatch.setenv("KEY", "s3cret\n")
    assert from_environment("KEY") == bearer_token(" s3cret\r\n", "KEY") == "s3cret"
    assert authorization("KEY") == {"Authorization": "Bearer s3cret"} and authorization(None) == {}
    monkeypatch.setenv("KEY", " ")
    assert from_environment("KEY") is None
    with pytest.raises(UserError, match="KEY, named by token_env, is not set"):
        authorization("KEY")


@pytest.mark.parametrize("token", ["", "\n", "s3 cr\net", "s3crét", "s3\x00cret"])
def test_a_key_that_no_header_can_hold_is_refused_and_not_shown(token):
    with pytest.raises(UserError, match="the token from KEY must be printable ASCII") as raised:
        bearer_token(token, "KEY")
    assert "s3" not in str(raised.value)
