"""The policy as the trainer's own vLLM engine, in this process: `use_vllm=True, vllm_mode="colocate"`.

TRL makes the engine and syncs its weights; here it is driven. One thread owns it and steps it as long as anything is
unfinished; requests come in and go out between two steps, so hundreds of trajectories generate while others search.

What the engine does for a request it does in Python, on that thread, and every trajectory waits for it. So a request
asks for little: one output at its end and not one a token, logprobs in flat lists, and no text where no stop string
has to be found in it.
"""

from __future__ import annotations

import asyncio
import gc
import itertools
import queue
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from trl_search.policies.base import Policy
from trl_search.types import Completion, FinishReason, Sampling

# The engine lets go of the interpreter at each of the hundred operations of a step, and gets it back after this long
# where the trajectories' thread wants it too. With Python's own 5 ms a burst of observations holds up a step for long.
SWITCH_INTERVAL_S = 1e-4


@dataclass(frozen=True)
class _Request:
    """One turn to generate. `id` is unique in the engine's life: a cancelled turn's late output meets nobody."""

    id: str
    prompt_ids: list[int]
    params: Any  # vllm.SamplingParams
    future: Future[Completion] = field(default_factory=Future)


class VLLMColocatePolicy(Policy):
    """Samples from a `vllm.LLM` of this process.

    Logprobs are those of the engine's `logprobs_mode`; TRL starts it with `processed_logprobs`, the distribution after
    temperature, and after top-p, top-k and min-p where those are set. Leave these off in training.

    Args:
        llm (`vllm.LLM`): The engine, awake, in this process (`external_launcher`, or without multiprocessing), with a
            tensor parallel size of 1.
        lora_request (`vllm.lora.request.LoRARequest`, *optional*): The adapter that every request goes through.

    Example:
        ```python
        policy = VLLMColocatePolicy(trainer.vllm_generation.llm)
        trajectories = rollout(prompts, rows, policy=policy, environment=environment, protocol=protocol, ...)
        ```
    """

    _ids = itertools.count()

    def __init__(self, llm: Any, *, lora_request: Any = None) -> None:
        self._engine = llm.llm_engine
        self._lora_request = lora_request
        self._inbox: queue.SimpleQueue[_Request | str | None] = queue.SimpleQueue()
        self._running: dict[str, _Request] = {}
        self._thread: threading.Thread | None = None

    async def open(self) -> None:
        # What lives now, a trainer's millions of objects, is not walked through by collections during the rollout.
        gc.freeze()
        self._switch_interval_s = sys.getswitchinterval()
        sys.setswitchinterval(SWITCH_INTERVAL_S)
        self._thread = threading.Thread(target=self._run, name="vllm-engine", daemon=True)
        self._thread.start()

    async def close(self) -> None:
        if self._thread is None:
            return
        self._inbox.put(None)
        await asyncio.to_thread(self._thread.join)
        self._thread = None
        sys.setswitchinterval(self._switch_interval_s)
        gc.unfreeze()

    async def generate(
        self, prompt_ids: Sequence[int], *, max_tokens: int, sampling: Sampling, stop: Sequence[str] = ()
    ) -> Completion:
        if self._thread is None:
            raise RuntimeError("the policy is closed: await policy.open() first")
        if not prompt_ids:
            raise ValueError("prompt_ids is empty")
        request = _Request(f"turn-{next(self._ids)}", list(prompt_ids), _params(max(1, max_tokens), sampling, stop))
        self._inbox.put(request)
        try:
            return await asyncio.wrap_future(request.future)
        except asyncio.CancelledError:
            self._inbox.put(request.id)
            raise

    # The engine thread

    def _run(self) -> None:
        try:
            self._take_device()
            while self._receive():
                for output in self._engine.step():
                    if output.finished and (request := self._running.pop(output.request_id, None)):
                        _resolve(request.future, _completion(output.outputs[0]))
        # Whatever breaks the engine must reach every coroutine that waits on it, or the rollout hangs.
        except BaseException as error:
            for request in self._running.values():
                _fail(request.future, error)
            while (message := self._inbox.get()) is not None:
                if isinstance(message, _Request):
                    _fail(message.future, error)
        finally:
            # Nobody waits any more: a broken engine may refuse this too.
            self._abort(list(self._running))

    def _take_device(self) -> None:
        """A thread begins on device 0, and vLLM has chosen its own on the main thread alone."""
        import torch

        # None where the workers are processes of their own.
        worker = getattr(self._engine.model_executor, "driver_worker", None)
        if worker is not None and worker.device.type == "cuda":
            torch.cuda.set_device(worker.device)

    def _receive(self) -> bool:
        """Takes in what has come, waiting for it where there is nothing to do. False once the policy is closed."""
        cancelled: list[str] = []
        try:
            while True:
                message = self._inbox.get(block=not self._running and not cancelled)
                if message is None:
                    for request in self._running.values():
                        request.future.cancel()
                    return False
                if isinstance(message, _Request):
                    self._add(message)
                else:
                    cancelled.append(message)
        except queue.Empty:
            self._abort(cancelled)
            return bool(self._running) or self._receive()

    def _add(self, request: _Request) -> None:
        self._running[request.id] = request
        try:
            self._engine.add_request(
                request.id, {"prompt_token_ids": request.prompt_ids}, request.params, lora_request=self._lora_request
            )
        # This request asks for what the engine cannot do, and the others go on. Older versions raise a ValueError.
        except Exception as error:
            del self._running[request.id]
            _fail(request.future, error)

    def _abort(self, ids: list[str]) -> None:
        self._engine.abort_request([id for id in ids if self._running.pop(id, None)])


def _params(max_tokens: int, sampling: Sampling, stop: Sequence[str]) -> Any:
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    return SamplingParams(
        max_tokens=max_tokens,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        min_p=sampling.min_p,
        # vLLM's seeds are signed.
        seed=sampling.seed & (2**63 - 1),
        stop=list(stop),
        # Stop strings are found in text, and nothing else needs it: the ids are what comes back.
        detokenize=bool(stop),
        # In the text as it is: a stop string may be a special token.
        skip_special_tokens=False,
        spaces_between_special_tokens=False,
        logprobs=0,
        flat_logprobs=True,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )


def _completion(output: Any) -> Completion:
    """A `vllm.CompletionOutput` as ours. Its ids are all that were sampled, a stop string's tail included."""
    if output.finish_reason == "length":
        reason = FinishReason.LENGTH
    else:
        reason = FinishReason.STOP if isinstance(output.stop_reason, str) else FinishReason.EOS
    # Flat lists hold one or two entries a token: the sampled one first, then the likeliest where that is another.
    logprobs = [output.logprobs.logprobs[start] for start in output.logprobs.start_indices]
    return Completion(tuple(output.token_ids), tuple(logprobs), reason)


def _resolve(future: Future[Completion], completion: Completion) -> None:
    if future.set_running_or_notify_cancel():
        future.set_result(completion)


def _fail(future: Future[Completion], error: BaseException) -> None:
    if future.set_running_or_notify_cancel():
        future.set_exception(error)
