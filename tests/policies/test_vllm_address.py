"""Addresses of vLLM servers, and the key that a server asks for."""

from __future__ import annotations

import asyncio

import pytest

from tests.support.servers import Said, serving
from trl_search.cli.evaluation_checks import check_server
from trl_search.cli.preflight import Status
from trl_search.cli.server_checks import server_checks
from trl_search.common.errors import UserError
from trl_search.config.grpo import SearchGRPOConfig
from trl_search.policies.vllm_address import server_address
from trl_search.policies.vllm_server import VLLMServerPolicy
from trl_search.trainer.generation.adapter_sync import post
from trl_search.types import Sampling


@pytest.mark.parametrize(
    ("given", "address"),
    [
        ("http://localhost:8000", "http://localhost:8000"),
        ("https://cluster.example/engine-1/", "https://cluster.example/engine-1"),
        ("http://[::1]:8000//", "http://[::1]:8000"),
        ("http://gpu-1", "http://gpu-1"),
    ],
)
def test_addresses(given, address):
    assert server_address(given) == address


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("localhost:8000", "must begin with http://"),
        ("http://", "must begin with http://"),
        ("", "must begin with http://"),
        ("http://a:99999", "must begin with http://"),
        ("http://gpu-1:8000,http://gpu-2:8000", "got 'http://gpu-1:8000,http://gpu-2:8000'"),
        ("http://gpu-1:port", "no more than a host, a port and a path"),
        ("http://gpu-1:8000 ", "no more than a host, a port and a path"),
        ("http://gpu-1:8000/?key=1", "no more than a host, a port and a path"),
        ("http://http://gpu-1:8000", "got 'http://http://gpu-1:8000'"),
        ("http://gpu-1:8000/v1/", "without /v1: http://gpu-1:8000$"),
    ],
)
def test_wrong_addresses_are_refused_at_once(tmp_path, given, said):
    """Training would wait for them for vllm_server_timeout, and then say that the server was lost."""
    with pytest.raises(UserError, match=said):
        SearchGRPOConfig(str(tmp_path), use_cpu=True, bf16=False, vllm_server_base_url=["http://gpu-2:8000", given])
    with pytest.raises(UserError, match=said):
        VLLMServerPolicy(given)
    assert [check.status for check in server_checks(given)] == [Status.PROBLEM]


def test_a_host_is_no_address(tmp_path):
    options = {"use_cpu": True, "bf16": False, "use_vllm": True, "vllm_mode": "server"}
    SearchGRPOConfig(str(tmp_path), **options, vllm_server_host="gpu-1")
    with pytest.raises(UserError, match="got 'http://http://gpu-1:8000'"):
        SearchGRPOConfig(str(tmp_path), **options, vllm_server_host="http://gpu-1")


def test_one_address_given_twice_is_refused(tmp_path):
    with pytest.raises(UserError, match="http://gpu-1:8000 is given twice"):
        twice = ["http://gpu-1:8000", "http://gpu-1:8000/"]
        SearchGRPOConfig(str(tmp_path), use_cpu=True, bf16=False, vllm_server_base_url=twice)


@pytest.fixture
def locked():
    """A server like `vllm serve --api-key sesame`, which guards /v1 only."""
    choice = {"token_ids": [5], "logprobs": {"token_logprobs": [-0.5]}, "finish_reason": "stop", "stop_reason": None}
    answers = {
        "/v1/models": {"data": [{"id": "tiny", "max_model_len": 64}]},
        "/v1/completions": {"choices": [choice]},
        "/v1/load_lora_adapter": {},
        "/version": {"version": "0.31.0"},
        "/health": {},
        "/metrics": {},
    }

    def answer(asked):
        if asked.target.startswith("/v1") and asked.headers.get("authorization") != "Bearer sesame":
            return Said({"error": "Unauthorized"}, 401)
        return Said(answers[asked.target]) if asked.target in answers else Said({}, 404)

    with serving(answer) as server:
        yield server.url


def ask(url):
    async def go():
        policy = VLLMServerPolicy(url)
        await policy.open()
        try:
            return await policy.generate([1], max_tokens=2, sampling=Sampling())
        finally:
            await policy.close()

    return asyncio.run(go())


def test_a_server_gets_its_key(monkeypatch, locked):
    monkeypatch.setenv("VLLM_API_KEY", "sesame\n")
    assert ask(locked).ids == (5,)
    assert check_server(locked, "tiny").status is Status.OK
    post(locked, "/v1/load_lora_adapter", {}, 8, 1.0)


@pytest.mark.parametrize("key", [None, "", "wrong"])
def test_a_refused_key_names_the_variable(monkeypatch, locked, key):
    """It is not a lost server, which would be waited for."""
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    if key is not None:
        monkeypatch.setenv("VLLM_API_KEY", key)
    said = r"/v1/models \(401\): set VLLM_API_KEY, in the environment of this process, to the key of its --api-key"
    with pytest.raises(UserError, match=said) as error:
        ask(locked)
    assert type(error.value) is UserError
    for check in (*server_checks(locked), check_server(locked, None)):
        assert check.status is Status.PROBLEM and "set VLLM_API_KEY" in check.said


def test_a_key_that_no_header_can_hold_is_not_shown(monkeypatch, locked):
    monkeypatch.setenv("VLLM_API_KEY", "se\nsame")
    with pytest.raises(UserError, match="VLLM_API_KEY must be printable ASCII") as error:
        ask(locked)
    assert "same" not in str(error.value)
