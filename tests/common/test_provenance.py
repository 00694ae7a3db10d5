"""A run records its versions, git state and command, but never secrets."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trl_search.common import provenance
from trl_search.common.provenance import command_without_secrets, git_state, versions, without_secrets


def git(folder: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=n", "-c", "user.email=e@example.org", "-c", "init.defaultBranch=main"]
    command = ["git", *identity, *arguments]
    return subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True).stdout.strip()


def test_git_state_of_a_repository(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert git_state() is None  # no repository
    git(tmp_path, "init")
    assert git_state() is None  # no commit
    (tmp_path / "a").write_text("a")
    git(tmp_path, "add", "a")
    git(tmp_path, "commit", "-m", "first")
    commit = git(tmp_path, "rev-parse", "HEAD")
    assert git_state() == {"commit": commit, "branch": "main", "dirty": False}
    (tmp_path / "b").write_text("b")
    git(tmp_path, "checkout", "--detach")
    assert git_state() == {"commit": commit, "branch": None, "dirty": True}


def test_without_git_there_is_no_git_state(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert git_state() is None


def test_a_hanging_git_is_given_up(monkeypatch, tmp_path):
    (tmp_path / "git").write_text("#!/bin/sh\nexec /bin/sleep 5\n")
    (tmp_path / "git").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(provenance, "GIT_TIMEOUT_S", 0.1)
    assert git_state() is None


def test_versions_are_those_of_the_installed_packages():
    found = versions()
    assert {"python", "trl", "torch", "transformers", "trl-search"} <= set(found) and "faiss-gpu" not in found


@pytest.mark.parametrize(
    "name",
    ["hub_token", "push_to_hub_token", "api_key", "X-Api-Key", "apikey", "Authorization", "OPENAI_API_KEY", "password",
     "client_secret", "aws_secret_access_key", "auth-key", "cookie"],
)  # fmt: skip
def test_secrets_are_recognized_by_name(name):
    assert without_secrets({name: "s3cr3t"}) == {name: "<redacted>"}
    assert without_secrets({"outer": [{name: {"inner": "s3cr3t"}}]}) == {"outer": [{name: "<redacted>"}]}
    assert "s3cr3t" not in command_without_secrets(["train", f"--{name}", "s3cr3t", f"--{name}=s3cr3t"])
    assert without_secrets({name: None}) == {name: None}  # a value that was not given is not a secret


@pytest.mark.parametrize(
    "name", ["max_completion_length", "max_packed_tokens", "include_num_input_tokens_seen", "key"]
)
def test_values_that_only_sound_like_secrets_are_kept(name):
    assert without_secrets({name: 7}) == {name: 7}
    assert command_without_secrets(["train", f"--{name}", "7"]) == f"train --{name} 7"


def test_secrets_inside_texts_are_redacted():
    options = '{"url": "https://me:pw@host/x", "headers": {"Authorization": "Bearer s3cr3t"}, "k": 3}'
    assert json.loads(without_secrets({"retriever_options": options})["retriever_options"]) == {
        "url": "https://<redacted>@host/x", "headers": {"Authorization": "<redacted>"}, "k": 3,
    }  # fmt: skip
    assert without_secrets("see hf_abcdefghijklmnopqrstuv.") == "see <redacted>."
    assert without_secrets("[a note] me@example.org") == "[a note] me@example.org"
    assert "s3cr3t" not in command_without_secrets(["train", '--retriever_options={"api_key": "s3cr3t"}'])


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary() | st.just(Path("x")),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text() | st.integers(), inner, max_size=3)
    | st.frozensets(st.integers(), max_size=3) | st.tuples(inner),
    max_leaves=10,
)  # fmt: skip


@settings(max_examples=60)
@given(VALUES)
def test_any_value_becomes_valid_json(value):
    json.dumps(without_secrets(value), allow_nan=False)
