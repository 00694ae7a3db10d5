"""A policy behind a standard `vllm serve`: sends token ids, receives sampled ids and logprobs, one request per turn.

    CUDA_VISIBLE_DEVICES=0 VLLM_SERVER_DEV_MODE=1 vllm serve MODEL --logprobs-mode processed_logprobs \\
        --weight-transfer-config '{"backend": "nccl"}'            (docs/vllm.md has both terminals)

Each rank sends the requests of its own trajectories and never waits for another rank (`vllm_completions.py` has the
format). Requests are repeatable, so they can be sent again after a broken connection. When a coroutine is cancelled,
its connection closes, and vLLM aborts the request.

A server with several engines (`--data-parallel-size`) would send the turns of a trajectory to any of them, and all but
the one that has the tokens in its prefix cache would compute them again. So each request names an engine (`homes.py`).

If the server is lost, one probe per process waits for it, and then all requests are sent again. A server that was
restarted meanwhile serves the weights that it was started with until the next sync: see `restarted`.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Sequence
from typing import Any

import httpx

from trl_search.common.errors import UserError
from trl_search.common.retrying import attempts, attempts_async
from trl_search.policies.base import Policy
from trl_search.policies.homes import Homes
from trl_search.policies.vllm_address import client_options, read_models, server_address
from trl_search.policies.vllm_completions import format_request, read_completion, refusal
from trl_search.policies.vllm_metrics import ASK_WORKER_START, count_engines, read_start_time, read_worker_start
from trl_search.policies.vllm_requests import Refused, Trouble, VLLMRequests
from trl_search.policies.vllm_versions import version_problem
from trl_search.types import Completion, Sampling

logger = logging.getLogger(__name__)

_PROBE_TIMEOUT_S = 10.0
_CLOSED = "the policy is closed: await policy.open() first"
_RPC = "/collective_rpc"


class VLLMServerPolicy(Policy):
    """Samples from a `vllm serve` process over HTTP.

    Args:
        base_url (`str`): The server's address: `http://localhost:8000`.
        model (`str`, *optional*): The name of the model or adapter on the server. By default the first one it lists.
        context_length (`int`, *optional*, defaults to `0`): Tokens of the longest prompt with its completion. `open`
            raises if the server allows less. 0: the first request that is too long raises.
        patience_s (`float`, *optional*, defaults to `300.0`): How long to wait for a lost server, and how long to
            repeat a request that a running server fails to answer.
        request_timeout_s (`float`, *optional*, defaults to `600.0`): A request without a response for this long counts
            as lost. This includes its time in the server's queue.
        weights_since (`float`, *optional*): The start time of the server process that received the weights. If the
            server was restarted since, it has lost them, and every request raises `ServerLost`.

    Attributes:
        max_model_len (`int`): The context length of the server, once open.
        restarted (`bool`): Whether the server was restarted since this policy first connected. It then has lost the
            weights of the training and its connection to the NCCL group: sync the weights, or restart the run, before
            training on its samples.

    Raises:
        UserError: if the address is none (`server_address`).
    """

    def __init__(
        self,
        base_url: str,
        *,
        model: str | None = None,
        context_length: int = 0,
        patience_s: float = 300.0,
        request_timeout_s: float = 600.0,
        weights_since: float | None = None,
    ) -> None:
        self.base_url = server_address(base_url)
        self.model, self.context_length = model, context_length
        self.patience_s, self.request_timeout_s = patience_s, request_timeout_s
        self.max_model_len = 0  # 0: never connected
        self.restarted = False
        self.weights_since = self._started_at = weights_since
        self._client: httpx.AsyncClient | None = None
        self._requests: VLLMRequests | None = None
        self._interrupted = False
        self._recovery: asyncio.Task[None] | None = None
        self._engines = range(1)
        self._homes: Homes[int] = Homes()

    async def open(self) -> None:
        """Connects, on the running event loop. On the first call, the server must be up; later calls wait for it.

        Raises:
            ServerLost: if the server does not answer.
            UserError: if it is not a vLLM server, does not serve the model, or has too short a context length.
        """
        self._client = httpx.AsyncClient(timeout=_PROBE_TIMEOUT_S, **client_options(self.base_url))
        self._requests = VLLMRequests(
            self.base_url, connect_timeout_s=_PROBE_TIMEOUT_S, timeout_s=self.request_timeout_s
        )
        try:
            if self.max_model_len or self.weights_since is not None:
                await self._wait_for_server()
            await self._meet(self._client)
        except UserError:
            await self.close()
            raise

    async def _meet(self, client: httpx.AsyncClient) -> None:
        """Asks the server what it is and serves; the errors are those of `open`."""
        try:
            (await client.get("/health")).raise_for_status()
            models = read_models(await client.get("/v1/models"))
            await self._look(client)
            problem = version_problem((await client.get("/version")).raise_for_status().json()["version"])
        except httpx.HTTPError as error:
            raise ServerLost(
                f"no vLLM server answers at {self.base_url} ({_reason(error)})",
                "start it first (`vllm serve`, see docs/vllm.md), or correct vllm_server_base_url",
            ) from error
        except UserError:
            raise
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(
                f"the server at {self.base_url} is not a vLLM server (see its /v1/models and /version): give the "
                "address of a `vllm serve`"
            ) from error
        self._interrupted = False
        self._require_weights()
        if problem and not self.max_model_len:
            logger.warning("The server at %s: %s.", self.base_url, problem)
        self._choose(models)

    async def interrupt(self) -> None:
        """Pauses and resumes the server, which aborts the requests of all its clients but keeps its cache.

        The requests of other clients also return their tokens so far; their rollouts then continue them.

        Raises:
            UserError: if the server cannot be paused.
            ServerLost: if the server does not answer.
        """
        if self._client is None:
            raise RuntimeError(_CLOSED)
        self._interrupted = True
        started = time.monotonic()
        try:
            for path in ("/pause?mode=abort&clear_cache=false", "/resume"):
                response = await self._client.post(path)
                if response.status_code == httpx.codes.NOT_FOUND:
                    raise UserError(
                        f"carry_over and max_staleness must pause the vLLM server, but the one at {self.base_url} "
                        "cannot be paused: start it with VLLM_SERVER_DEV_MODE=1"
                    )
                response.raise_for_status()
        except httpx.HTTPError as error:
            raise _lost(self.base_url, time.monotonic() - started, error) from error

    async def close(self) -> None:
        if self._recovery is not None:
            self._recovery.cancel()
            self._recovery = None
        if self._client is not None and self._requests is not None:
            client, requests, self._client, self._requests = self._client, self._requests, None, None
            await client.aclose()
            await requests.close()

    async def generate(
        self,
        prompt_ids: Sequence[int],
        *,
        max_tokens: int,
        sampling: Sampling,
        stop: Sequence[str] = (),
        stop_token_ids: Sequence[int] = (),
    ) -> Completion:
        if self._requests is None:
            raise RuntimeError(_CLOSED)
        if not prompt_ids:
            raise ValueError("prompt_ids is empty")
        body = format_request(self.model or "", prompt_ids, max(1, max_tokens), sampling, stop, stop_token_ids)
        needed = len(prompt_ids) + body["max_tokens"]
        if 0 < self.max_model_len < needed:  # vLLM rejects such a request; from 0.32 on, it ends the turn early
            said = f"its maximum context length is {self.max_model_len} tokens"
            raise refusal(self.base_url, said, needed=max(self.context_length, needed), model=body["model"])
        failing_since: float | None = None
        tries = 0
        while True:
            tries += 1
            try:
                answer = await self._requests.post("/v1/completions", body, self._engine())
                try:
                    completion = read_completion(answer, body, self.base_url)
                except (KeyError, IndexError, TypeError, AttributeError) as error:  # of a gateway before the server
                    raise Trouble(f"an answer that is no completion: {str(answer)[:200]}") from error
                if completion.ids or self._interrupted:
                    return completion
                raise Trouble("it aborted the request")  # the server is shutting down or paused
            except Refused as error:
                longest = max(self.context_length, needed)
                raise refusal(self.base_url, str(error), needed=longest, model=body["model"]) from error
            except Trouble as error:
                await self._recover(error)
                self._require_weights()
                failing_since = failing_since or time.monotonic()
                seconds = time.monotonic() - failing_since
                if seconds > self.patience_s:
                    raise ServerLost(
                        f"the vLLM server at {self.base_url} is up, but failed a request {tries} times in "
                        f"{seconds:.0f} s, the last time with {error}",
                        "read its log",
                    ) from error
            await asyncio.sleep(min(30.0, 0.25 * 2**tries) * random.uniform(0.5, 1.0))

    # Connections and outages

    def _engine(self) -> dict[str, str]:
        """The header that names the trajectory's engine, if there are several."""
        return {"X-data-parallel-rank": str(self._homes.choose(self._engines))} if len(self._engines) > 1 else {}

    async def _recover(self, trouble: Trouble) -> None:
        """Waits until the server answers again. All lost requests share one probe."""
        if self._recovery is None or self._recovery.done():
            logger.warning("vLLM server at %s: %s. Trying again.", self.base_url, trouble)
            self._recovery = asyncio.create_task(self._wait_for_server())
        await asyncio.shield(self._recovery)

    async def _wait_for_server(self) -> None:
        assert self._client is not None
        started, gone = time.monotonic(), False
        # Spreads the ranks, which lost the server at the same time.
        await asyncio.sleep(0.2 * random.random())
        try:
            async for attempt in attempts_async(httpx.HTTPError, patience_s=self.patience_s):
                with attempt:
                    try:
                        (await self._client.get("/health")).raise_for_status()
                    except httpx.ConnectError:
                        gone = True
                        raise
                    await self._look(self._client, gone)
        except httpx.HTTPError as error:
            raise _lost(self.base_url, time.monotonic() - started, error) from error

    def _require_weights(self) -> None:
        if self.restarted and self.weights_since is not None:
            raise ServerLost(
                f"the vLLM server at {self.base_url} was restarted during training and has lost the policy's weights",
                "resume this run from its last checkpoint, which sends them again",
            )

    async def _look(self, client: httpx.AsyncClient, gone: bool = False) -> None:
        metrics = (await client.get("/metrics")).text
        self._engines = range(count_engines(metrics))
        started_at = read_start_time(metrics)
        if started_at is None:
            worker = await client.post(_RPC, **ASK_WORKER_START)
            started_at = read_worker_start(worker)
        self.see(started_at, gone)

    def see(self, started_at: float | None, gone: bool = False) -> None:
        """Records the server's start time. If that is unknown, a refused connection (`gone`) counts as a restart."""
        if gone if started_at is None else self._started_at not in (None, started_at):
            self.restarted = True
            logger.warning(
                "The vLLM server at %s was restarted: until the next weight sync it samples from the weights that it "
                "was started with.",
                self.base_url,
            )
        self._started_at = started_at or self._started_at

    def _choose(self, models: list[dict[str, Any]]) -> None:
        served = {str(model["id"]): model for model in models}
        self.model = self.model or next(iter(served), None)
        if self.model not in served:
            raise UserError(
                f"the vLLM server at {self.base_url} serves {', '.join(served) or 'nothing'}, not {self.model}: "
                "start it with that model"
            )
        # The entry of an adapter has no context length.
        self.max_model_len = max(int(model.get("max_model_len") or 0) for model in models)
        if self.context_length > self.max_model_len:
            raise UserError(
                f"the longest prompt and max_completion_length need {self.context_length} tokens, but the vLLM server "
                f"at {self.base_url} has room for {self.max_model_len}: start it with --max-model-len "
                f"{self.context_length}, or lower max_completion_length"
            )


class ServerLost(UserError):
    """A server no longer answers, or was restarted and has lost the weights that it was sent.

    Attributes:
        said (`str`): The message without the remedy, which is for a run that ends.
    """

    def __init__(self, said: str, remedy: str) -> None:
        super().__init__(f"{said}: {remedy}")
        self.said = said


def server_start_time(base_url: str, patience_s: float) -> float | None:
    """The start time of the server's process; `None` if it does not say it. Waits for a lost server.

    A server with several API servers says it only with `--worker-extension-cls` (`weight_checksums.py`).

    Raises:
        ServerLost: if the server does not answer within `patience_s`.
    """
    started = time.monotonic()
    with httpx.Client(timeout=_PROBE_TIMEOUT_S, **client_options(base_url)) as client:
        try:
            for attempt in attempts(httpx.HTTPError, patience_s=patience_s):
                with attempt:
                    client.get("/health").raise_for_status()
                    found = read_start_time(client.get("/metrics").text)
                    if found is None:
                        found = read_worker_start(client.post(_RPC, **ASK_WORKER_START))
        except httpx.HTTPError as error:
            raise _lost(base_url, time.monotonic() - started, error) from error
    return found


def _lost(base_url: str, seconds: float, error: httpx.HTTPError) -> ServerLost:
    return ServerLost(
        f"the vLLM server at {base_url} was lost, and did not come back in {seconds:.0f} s ({_reason(error)})",
        "start it again, then resume from the last checkpoint",
    )


def _reason(error: httpx.HTTPError) -> str:
    if isinstance(error, httpx.ReadTimeout):
        return "no answer in time"
    return str(error) or type(error).__name__
