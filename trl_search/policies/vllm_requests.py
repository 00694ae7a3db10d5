"""Many requests at once to one vLLM server.

These go through aiohttp, all others through httpx. For each request httpx walks through all its connections, so that
a rank with 512 trajectories spent nine tenths of the rollout there, and the engines waited
(docs/performance.md#the-client-of-a-server).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import aiohttp

from trl_search.common.tls import tls_context
from trl_search.policies.vllm_address import key_header
from trl_search.policies.vllm_completions import error_text

# Requests in flight at once per process. Others queue here, to save file descriptors of the server.
MAX_CONNECTIONS = 512
# Well below the 5 s after which vLLM closes an idle connection (VLLM_HTTP_TIMEOUT_KEEP_ALIVE): with 4 s, a busy rank
# still lost a request.
_KEEP_ALIVE_S = 2.0


class Trouble(Exception):
    """A failure of the server, not of the request: send it again."""


class Refused(Exception):
    """The server would reject this request again."""


class VLLMRequests:
    """Sends requests to a vLLM server, each on a connection of its own, which later requests use again.

    Must be created on the running event loop. When a coroutine is cancelled, its connection closes.

    Args:
        base_url (`str`): The server's address (`server_address`).
        connect_timeout_s (`float`): How long a connection may take.
        timeout_s (`float`): How long the server may send nothing.
    """

    def __init__(self, base_url: str, *, connect_timeout_s: float, timeout_s: float) -> None:
        self.base_url = base_url
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=MAX_CONNECTIONS, keepalive_timeout=_KEEP_ALIVE_S, ssl=tls_context()),
            timeout=aiohttp.ClientTimeout(sock_connect=connect_timeout_s, sock_read=timeout_s),
            headers=key_header(),
            cookie_jar=aiohttp.DummyCookieJar(),
        )

    async def post(self, path: str, body: Mapping[str, Any], headers: Mapping[str, str]) -> dict[str, Any]:
        """The server's answer.

        Raises:
            Trouble: if the connection breaks, or the server is busy or fails.
            Refused: for other answers that are no success, with the server's message.
        """
        url = self.base_url + path
        try:
            async with self._session.post(url, json=body, headers=headers, allow_redirects=False) as response:
                status, content = response.status, await response.read()
        except aiohttp.SocketTimeoutError as error:
            raise Trouble("no answer in time") from error
        except aiohttp.ClientError as error:
            raise Trouble(str(error) or type(error).__name__) from error
        if 200 <= status < 300:
            try:
                answer: dict[str, Any] = json.loads(content)
            except (ValueError, RecursionError) as error:
                raise Trouble(f"an answer that is no JSON: {error_text(content)[:200]}") from error
            return answer
        said = f"{status}: {error_text(content) or response.reason}"
        raise Trouble(said) if status == 429 or status >= 500 else Refused(said)

    async def close(self) -> None:
        await self._session.close()
