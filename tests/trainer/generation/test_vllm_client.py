"""TRL's client with the server's key and without the proxies of the environment."""

from __future__ import annotations

import pytest
from trl.generation import vllm_client

from tests.support.ports import free_port
from tests.support.servers import Said, serving
from trl_search.trainer.generation.vllm_client import ServerClient, post


@pytest.fixture
def server(monkeypatch):
    """A server with a key, which cannot be reached through the proxy of the environment."""
    monkeypatch.setattr(vllm_client, "is_vllm_available", lambda **_: True)
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, f"http://127.0.0.1:{free_port()}")
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("VLLM_API_KEY", "sesame")

    def answer(asked):
        if asked.target.startswith("/v1") and asked.headers.get("authorization") != "Bearer sesame":
            return Said({"error": "Unauthorized"}, 401)
        if asked.target == "/collective_rpc":  # as without VLLM_SERVER_DEV_MODE=1
            return Said({}, 404)
        return Said({"data": [{"id": "tiny"}]} if asked.target == "/v1/models" else {})

    with serving(answer) as server:
        yield server


def test_the_client_reaches_the_server(server):
    assert ServerClient(base_url=server.url, connection_timeout=5.0).model == "tiny"


def test_a_request_without_the_client_reaches_the_server(server):
    assert post(f"{server.url}/reset_prefix_cache", params={"a": "b"}).status_code == 200
    assert server.asked[-1].target == "/reset_prefix_cache?a=b"
