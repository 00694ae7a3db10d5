"""`EngineThread`: a policy whose engine runs in its own thread. Requests enter and leave between two engine steps.

    event loop                           engine thread
    generate() ── request ─► inbox ──►   add(request)
                                         step() ─► [(request, completion), ...]
    await future ◄── completion ──────   request.finish(completion)
    (cancelled) ── request ─► inbox ──►  drop(request)
    interrupt() ── future ──► inbox ──►  drop(request) ─► the tokens so far, for each request

The two engines of this process, `transformers_policy.py` and `vllm_colocate.py`, implement `add`, `step` and `drop`.
"""

from __future__ import annotations

import abc
import asyncio
import itertools
import queue
import threading
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

from trl_search.policies.base import Policy
from trl_search.types import Completion, Sampling

_numbers = itertools.count()


@dataclass(eq=False)
class Request:
    """One turn to generate. `number` is unique within the process of rank `owner`, which runs the trajectory."""

    prompt_ids: list[int]
    max_tokens: int
    sampling: Sampling
    stop: tuple[str, ...] = ()
    stop_token_ids: frozenset[int] = frozenset()
    number: int = field(default_factory=_numbers.__next__)
    owner: int = 0
    future: Future[Completion] = field(default_factory=Future)

    @property
    def name(self) -> str:
        """Unique among the processes that share an engine."""
        return f"turn-{self.owner}-{self.number}"

    def finish(self, completion: Completion) -> None:
        if self.future.set_running_or_notify_cancel():
            self.future.set_result(completion)

    def fail(self, error: BaseException) -> None:
        if self.future.set_running_or_notify_cancel():
            self.future.set_exception(error)


class EngineThread(Policy):
    """Owns the thread, its inbox and the requests in flight. All methods from `start_engine` on run in the thread."""

    def __init__(self) -> None:
        # Requests, futures of interruptions, and None to stop.
        self._inbox: queue.SimpleQueue[Request | Future[None] | None] = queue.SimpleQueue()
        self._unfinished: set[Request] = set()
        self._thread: threading.Thread | None = None

    async def open(self) -> None:
        self._thread = threading.Thread(target=self._run, name=type(self).__name__, daemon=True)
        self._thread.start()

    async def close(self) -> None:
        if self._thread is None:
            return
        self._inbox.put(None)
        await asyncio.to_thread(self._thread.join)
        self._thread = None

    # Not **turn, as in policies that pass it on: a misspelt keyword would have no effect.
    async def generate(
        self,
        prompt_ids: Sequence[int],
        *,
        max_tokens: int,
        sampling: Sampling,
        stop: Sequence[str] = (),
        stop_token_ids: Sequence[int] = (),
    ) -> Completion:
        if self._thread is None:
            raise RuntimeError("the policy is closed: await policy.open() first")
        if not prompt_ids:
            raise ValueError("prompt_ids is empty")
        request = Request(list(prompt_ids), max(1, max_tokens), sampling, tuple(stop), frozenset(stop_token_ids))
        self._inbox.put(request)
        try:
            return await asyncio.wrap_future(request.future)
        except asyncio.CancelledError:
            self._inbox.put(request)  # the engine drops a cancelled request
            raise

    async def interrupt(self) -> None:
        done: Future[None] = Future()
        self._inbox.put(done)
        await asyncio.wrap_future(done)

    # What an engine implements

    def start_engine(self) -> None:
        """Called once, before the first step."""

    def stop_engine(self, unfinished: Sequence[Request]) -> None:
        """Called once, after the last step. No coroutine waits for `unfinished` any more."""

    @abc.abstractmethod
    def add(self, request: Request) -> None:
        """Adds a request. An exception fails only this request."""

    @abc.abstractmethod
    def drop(self, request: Request) -> Completion:
        """Removes an unfinished request (cancelled or interrupted), and returns its tokens so far."""

    @abc.abstractmethod
    def step(self) -> list[tuple[Request, Completion]]:
        """Computes one more token for the running requests, and returns the requests that finished."""

    # The thread

    def _run(self) -> None:
        try:
            self.start_engine()
            while self._receive():
                for request, completion in self.step():
                    self._unfinished.discard(request)
                    request.finish(completion)
        # Every waiting coroutine must get an engine's error, or the rollout hangs.
        except BaseException as error:
            for request in self._unfinished:
                request.fail(error)
            while (late := self._inbox.get()) is not None:
                if isinstance(late, Future):
                    late.set_exception(error)
                elif not late.future.done():
                    late.fail(error)
        finally:
            unfinished = list(self._unfinished)
            self._unfinished.clear()
            self.stop_engine(unfinished)

    def _receive(self) -> bool:
        """Empties the inbox; waits for an entry if no request is running. Returns False once the policy is closed."""
        while True:
            try:
                request = self._inbox.get(block=not self._unfinished)
            except queue.Empty:
                return True
            if request is None:
                for left in self._unfinished:
                    left.future.cancel()
                return False
            if isinstance(request, Future):
                self._interrupt()
                request.set_result(None)
            elif not request.future.cancelled():
                self._add(request)
            elif request in self._unfinished:
                self._unfinished.discard(request)
                self.drop(request)

    def _interrupt(self) -> None:
        for request in self._unfinished:
            request.finish(self.drop(request))
        self._unfinished.clear()

    def _add(self, request: Request) -> None:
        self._unfinished.add(request)
        try:
            self.add(request)
        # The engine cannot run this request. The others continue.
        except Exception as error:
            self._unfinished.discard(request)
            request.fail(error)
