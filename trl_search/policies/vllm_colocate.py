"""A policy that runs the trainer's own vLLM engine in this process: `use_vllm=True, vllm_mode="colocate"`.

TRL creates the engine and syncs its weights; this file drives it. One thread owns the engine and steps it while any
request is unfinished (`engine_thread.py`), so hundreds of trajectories generate while others search.

The engine handles requests in Python on that thread, and every trajectory waits for it. To keep that short, a request
asks for one output at its end instead of one per token, for logprobs in flat lists, and for text only if it has stop
strings.
"""

from __future__ import annotations

import queue
import sys
from collections.abc import Sequence
from typing import Any

from trl_search.policies.engine_thread import EngineThread, Request
from trl_search.policies.vllm_completions import finish_reason, sampling_parameters
from trl_search.types import Completion, FinishReason

# The engine releases the GIL at each of the hundred operations of a step. If the event loop wants it too, the engine
# gets it back after this interval. With Python's default of 5 ms, a burst of observations delays a step for long.
SWITCH_INTERVAL_S = 1e-4


class VLLMColocatePolicy(EngineThread):
    """Samples from a `vllm.LLM` in this process.

    Logprobs follow the engine's `logprobs_mode`. TRL sets `processed_logprobs`: the distribution after temperature,
    top-p, top-k and min-p. Leave the last three off in training.

    Args:
        llm (`vllm.LLM`): The engine, awake and in this process (`external_launcher`, or without multiprocessing). For
            an engine that several processes share, use `vllm_tensor_parallel.py`.
        lora_request (`vllm.lora.request.LoRARequest`, *optional*): The adapter that is applied to every request.

    Example:
        ```python
        policy = VLLMColocatePolicy(trainer.vllm_generation.llm)
        trajectories = rollout(prompts, rows, policy=policy, environment=environment, protocol=protocol, ...)
        ```
    """

    def __init__(self, llm: Any, *, lora_request: Any = None) -> None:
        super().__init__()
        self._engine = llm.llm_engine
        self._lora_request = lora_request
        self._running: dict[str, Request] = {}
        self._stream = stream_of(self._engine)
        self.slots = self._engine.vllm_config.scheduler_config.max_num_seqs

    async def open(self) -> None:
        self._switch_interval_s = sys.getswitchinterval()
        sys.setswitchinterval(SWITCH_INTERVAL_S)
        await super().open()

    async def close(self) -> None:
        if self._thread is None:
            return
        await super().close()
        sys.setswitchinterval(self._switch_interval_s)

    # On the engine's thread

    def start_engine(self) -> None:
        """Selects the GPU and the stream that vLLM chose in the thread that created the engine.

        A new thread starts on device 0 and the default stream. With several GPUs per engine, vLLM then creates a new
        stream in the middle of the first forward, at the first all-reduce, and the work on it does not wait for the
        work before.
        """
        import torch

        if self._stream is not None:
            torch.cuda.set_stream(self._stream)  # also sets its device

    def stop_engine(self, unfinished: Sequence[Request]) -> None:
        # On a broken engine, this may raise, too. Every request already has its error.
        self._abort(unfinished)

    def add(self, request: Request) -> None:
        prompt = {"prompt_token_ids": request.prompt_ids}
        self._engine.add_request(request.name, prompt, _params(request), lora_request=self._lora_request)
        self._running[request.name] = request

    def drop(self, request: Request) -> Completion:
        # Without a server, the engine returns the tokens of an aborted request only through a queue.
        outputs: queue.SimpleQueue[Any] = queue.SimpleQueue()
        for state in self._engine.output_processor.request_states.values():
            if state.external_req_id == request.name:
                state.queue = outputs
        self._abort([request])
        if outputs.empty():
            return Completion((), (), FinishReason.INTERRUPTED)
        return _completion(outputs.get().outputs[0])

    def step(self) -> list[tuple[Request, Completion]]:
        return [
            (request, _completion(output.outputs[0]))
            for output in self._engine.step()
            if output.finished and (request := self._running.pop(output.request_id, None))
        ]

    def _abort(self, requests: Sequence[Request]) -> None:
        self._engine.abort_request([request.name for request in requests if self._running.pop(request.name, None)])


def stream_of(engine: Any) -> Any:
    """The current thread's CUDA stream on the device of an engine in this process; `None` without a GPU."""
    import torch

    # If the workers are other processes, there is no driver worker here.
    worker = getattr(engine.model_executor, "driver_worker", None)
    if worker is None or worker.device.type != "cuda":
        return None
    return torch.cuda.current_stream(worker.device)


def _params(request: Request) -> Any:
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    return SamplingParams(
        **sampling_parameters(request.max_tokens, request.sampling, request.stop, request.stop_token_ids),
        # Only stop strings need text.
        detokenize=bool(request.stop),
        flat_logprobs=True,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )


def _completion(output: Any) -> Completion:
    """Converts a `vllm.CompletionOutput`. Its ids are all sampled ids, also those after a stop string."""
    # Flat lists have one or two entries per token: the sampled token, then the most likely one if it differs.
    logprobs = [output.logprobs.logprobs[start] for start in output.logprobs.start_indices]
    reason = finish_reason(output.finish_reason, output.stop_reason)
    return Completion(tuple(output.token_ids), tuple(logprobs), reason)
