"""TRL's client of a vLLM server, which reaches the server as our other requests do (`vllm_address.py`)."""

from __future__ import annotations

import os
from typing import Any

import requests
from trl.generation.vllm_client import VLLMClient

from trl_search.policies.vllm_address import key_header
from trl_search.policies.vllm_server import server_start_time


class ServerClient(VLLMClient):
    """[`~trl.generation.vllm_client.VLLMClient`] with the server's key, and without the proxies of the environment."""

    def check_server(self, total_timeout: float = 0.0, retry_interval: float = 2.0) -> None:
        """Waits for the server. TRL's constructor calls it before its first other request."""
        prepare(self.session)
        server_start_time(self.base_url, total_timeout)


def post(url: str, **asked: Any) -> requests.Response:
    """A request without the retries of TRL's client, for which a server that answers with status 500 is a lost one."""
    with requests.Session() as session:
        prepare(session)
        return session.post(url, timeout=None, **asked)


def prepare(session: requests.Session) -> None:
    """Gives a session the options of `vllm_address.client_options`."""
    session.trust_env = False
    session.verify = os.environ.get("SSL_CERT_FILE") or True
    session.headers.update(key_header())
