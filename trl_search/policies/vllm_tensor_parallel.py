"""One colocated vLLM engine for several ranks: `vllm_mode="colocate"` with `vllm_tensor_parallel_size` above 1.

Each rank holds a share of the weights and of the KV cache, and runs its own scheduler. The schedulers make the same
decisions if they get the same requests in the same order. So before each step, the ranks exchange their new requests:

    rank 0: trajectories ── requests ─► news ┐                ┌─► add all, in the order of the ranks ─► step()
                                             ├─ all to all ───┤
    rank 1: trajectories ── requests ─► news ┘                └─► add all, in the order of the ranks ─► step()

Every rank computes all requests and returns the completions of its own. The engine stops when all ranks have closed
the policy.
"""

from __future__ import annotations

import contextlib
import queue
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from trl_search.policies.engine_thread import Request
from trl_search.policies.vllm_colocate import VLLMColocatePolicy
from trl_search.types import Completion

# While no request runs, a rank waits this long for its own requests before it exchanges news.
IDLE_S = 0.002


@dataclass
class News:
    """The changes on one rank since the last step."""

    requests: dict[str, dict[str, Any]] = field(default_factory=dict)  # by name: `Request` without its future
    dropped: list[str] = field(default_factory=list)
    is_closed: bool = False


# Returns the news of every rank, in the order of the ranks. All ranks must call it equally often.
Exchange = Callable[[News], list[News]]


class VLLMTensorParallelPolicy(VLLMColocatePolicy):
    """Samples from an engine that several ranks share. All ranks must open and close it.

    Args:
        llm (`vllm.LLM`): This rank's part of the engine, started with `external_launcher`.
        rank (`int`): The rank of this process within the engine.
        exchange (`Callable`): Exchanges the news of all ranks.
        lora_request (`vllm.lora.request.LoRARequest`, *optional*): The adapter that is applied to every request.

    Example:
        ```python
        from vllm.distributed import get_tp_group

        group = get_tp_group()
        policy = VLLMTensorParallelPolicy(llm, rank=group.rank_in_group, exchange=over_gloo(group.cpu_group))
        ```
    """

    def __init__(self, llm: Any, *, rank: int, exchange: Exchange, lora_request: Any = None) -> None:
        super().__init__(llm, lora_request=lora_request)
        self._rank, self._exchange = rank, exchange
        self._is_closed = False
        self._announced: dict[str, Request] = {}  # requests of this rank that were sent to the others
        self._interruptions: list[Future[None]] = []

    async def open(self) -> None:
        self._is_closed = False
        await super().open()

    # On the engine's thread

    def _receive(self) -> bool:
        """Exchanges news with the other ranks. Returns True if a request is running, False once all have closed."""
        while True:
            everyone = self._exchange(self._news())
            for rank, news in enumerate(everyone):
                for name, asked in news.requests.items():
                    self._add(self._announced[name] if rank == self._rank else Request(**asked))
                for name in news.dropped:
                    self._give_back(name)
            while self._interruptions:
                self._interruptions.pop().set_result(None)
            if self._unfinished:
                return True
            if all(news.is_closed for news in everyone):
                return False

    def _news(self) -> News:
        """Empties the inbox. While no request runs, waits a moment for the first entry."""
        news = News()
        waits = not self._unfinished
        with contextlib.suppress(queue.Empty):
            while True:
                request = self._inbox.get(timeout=IDLE_S) if waits else self._inbox.get_nowait()
                waits = False
                if request is None:
                    self._is_closed = True
                    for left in self._announced.values():
                        left.future.cancel()
                    news.dropped += self._announced
                elif isinstance(request, Future):
                    self._interruptions.append(request)
                    news.dropped += self._announced
                elif not request.future.cancelled():
                    request.owner = self._rank
                    self._announced[request.name] = request
                    asked = {key: value for key, value in vars(request).items() if key != "future"}
                    news.requests[request.name] = asked
                elif request.name in self._announced:
                    news.dropped.append(request.name)
        news.is_closed = self._is_closed
        return news

    def _add(self, request: Request) -> None:
        super()._add(request)
        if request not in self._unfinished:  # the engine has rejected it, on every rank
            self._announced.pop(request.name, None)

    def _give_back(self, name: str) -> None:
        """Drops a cancelled or interrupted request, in the same order on all ranks, because it frees cache blocks."""
        self._announced.pop(name, None)
        if request := self._running.get(name):
            self._unfinished.discard(request)
            request.finish(self.drop(request))

    def step(self) -> list[tuple[Request, Completion]]:
        finished = super().step()
        for request, _ in finished:
            self._announced.pop(request.name, None)
        return finished


def over_gloo(group: Any) -> Exchange:
    """An exchange over a process group: two numbers before each step, and the news if there are any.

    Args:
        group (`torch.distributed.ProcessGroup`): The processes of one engine, with the gloo backend.
    """
    import torch
    import torch.distributed as dist

    ranks = dist.get_world_size(group)

    def exchange(news: News) -> list[News]:
        tellers_and_closed = torch.tensor([bool(news.requests or news.dropped), news.is_closed], dtype=torch.int64)
        dist.all_reduce(tellers_and_closed, group=group)
        tellers, closed = tellers_and_closed.tolist()
        if not tellers:
            return [News(is_closed=closed == ranks)]
        everyone: list[Any] = [None] * ranks
        dist.all_gather_object(everyone, news, group=group)
        return everyone

    return exchange
