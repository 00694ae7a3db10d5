"""JSON objects from users: anything else is refused, with its place and the remedy."""

from __future__ import annotations

import pytest

from trl_search.common.errors import UserError
from trl_search.common.files import parse_object, read_object


def test_an_object_is_read(tmp_path):
    path = tmp_path / "run.json"
    path.write_text('{"a": [1, "ü"]}', encoding="utf-8")
    assert read_object(path, "remove it") == {"a": [1, "ü"]} == parse_object('{"a": [1, "ü"]}', "--options", "{}")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"a": ', r"run\.json is not JSON \(.*\): remove it"),
        (b"\xff\xfe\x00", r"run\.json is not JSON \(.*\): remove it"),
        (b"[1]", r"run\.json holds no JSON object: remove it"),
    ],
)
def test_a_file_without_an_object_is_refused(tmp_path, content, message):
    path = tmp_path / "run.json"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message):
        read_object(path, "remove it")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{index}", r"^--options is not JSON \(.*\): write an object such as \{\"k\": 3\}, not \{index\}$"),
        ("[]", r"^--options must be a JSON object such as \{\"k\": 3\}, not \[\]$"),
    ],
)
def test_an_option_without_an_object_is_refused(text, message):
    with pytest.raises(UserError, match=message):
        parse_object(text, "--options", '{"k": 3}')
