"""The address of a vLLM server, and the key that it asks for.

    http://gpu-1:8000        https://cluster/engine-1        without /v1, which every request adds

The key of `vllm serve --api-key KEY` is read from VLLM_API_KEY, as by `vllm serve` itself. It protects only /v1: who
reaches the port of a server in development mode can still change its weights.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import httpx

from trl_search.common.credentials import authorization, from_environment
from trl_search.common.errors import UserError
from trl_search.common.tls import tls_context

API_KEY = "VLLM_API_KEY"
KEY_REMEDY = f"set {API_KEY}, in the environment of this process, to the key of its --api-key"


def server_address(url: str) -> str:
    """The address without a slash at its end.

    Raises:
        UserError: if no request could reach a server there.
    """
    address = url.rstrip("/")
    try:
        whole = re.fullmatch(r"https?://[^/\s,?#]+(/[^/\s,?#]+)*", address) and (httpx.URL(address).port or 0) < 65536
    except httpx.InvalidURL:
        whole = None
    if not whole:
        raise UserError(
            f"the address of a vLLM server must begin with http:// and have no more than a host, a port and a path, "
            f"like http://localhost:8000; got {url!r}"
        )
    if address.endswith("/v1"):
        raise UserError(f"the address of a vLLM server is given without /v1: {address.removesuffix('/v1')}")
    return address


def server_addresses(urls: Sequence[str]) -> list[str]:
    """The addresses of several servers.

    Raises:
        UserError: if one is wrong, or given twice.
    """
    addresses = [server_address(url) for url in urls]
    if twice := next((address for address in addresses if addresses.count(address) > 1), None):
        raise UserError(f"the vLLM server at {twice} is given twice: give each server once")
    return addresses


def client_options(url: str) -> dict[str, Any]:
    """Arguments of an `httpx.Client` for a server. Proxies of the environment cannot reach the hosts of a cluster."""
    return {"base_url": server_address(url), "headers": key_header(), "verify": tls_context(), "trust_env": False}


def key_header() -> dict[str, str]:
    """The header with the key of the server; empty without one.

    Raises:
        UserError: if no header can hold the key.
    """
    return authorization(API_KEY) if from_environment(API_KEY) else {}


def read_models(listed: httpx.Response) -> list[dict[str, Any]]:
    """The models and adapters of a server, from its answer to `/v1/models`.

    Raises:
        UserError: if the server refuses the key.
        httpx.HTTPStatusError: for other errors.
    """
    if listed.status_code == httpx.codes.UNAUTHORIZED:
        raise UserError(f"the vLLM server refuses {listed.url} (401): {KEY_REMEDY}")
    models: list[dict[str, Any]] = listed.raise_for_status().json()["data"]
    return models
