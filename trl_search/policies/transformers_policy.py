"""The policy as a plain `transformers` model, on CPU or GPU: continuous batching, stop strings, warm conversations.

One engine thread owns the model. Between two forwards it takes in whatever requests have come, so a trajectory never
waits for another's turn to end. A finished turn leaves its keys and values in its slot: when the conversation comes
back with an observation appended, only the observation is computed.
"""

from __future__ import annotations

import asyncio
import queue
import random
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinPLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from trl_search.policies.base import Policy
from trl_search.policies.kv_cache import SLOT_ATTENTION, SlotCache
from trl_search.types import Completion, FinishReason, Sampling

# Padded tokens of one prefill forward; bounds its activations.
_MAX_PREFILL_TOKENS = 16_384
# A stop string can begin this many tokens before the one that completes it, at one character a token or more.
_STOP_TAIL_TOKENS = 32


@dataclass
class _Request:
    """One turn being generated."""

    prompt_ids: list[int]
    max_tokens: int
    stop: tuple[str, ...]
    sampling: Sampling
    future: Future[Completion] = field(default_factory=Future)
    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.random = random.Random(self.sampling.seed)


@dataclass
class _Slot:
    """One row of the cache: the ids whose keys and values it holds, and the request that runs in it, if any."""

    row: int
    ids: list[int] = field(default_factory=list)
    request: _Request | None = None
    used_at: int = 0


class TransformersPolicy(Policy):
    """Samples from a `transformers` decoder whose layers all have full attention (Qwen2/3, Llama, Mistral v0.3 ...).

    Args:
        model (`PreTrainedModel`): Put into eval mode, and its attention set to ours, while open.
        tokenizer (`PreTrainedTokenizerBase`): Used to look for stop strings, and for the EOS.
        max_sequences (`int`, *optional*, defaults to `64`): Conversations that run at once; others queue.

    Attributes:
        on_token (`Callable[[Sequence[int]], None]`, *optional*): Called on the engine's thread with the ids of a turn
            so far, after each that was sampled. It does not say whose turn: for chats, of one sequence.

    Raises:
        ValueError: if a layer has no full attention (sliding window, linear): use vLLM for such a model.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, max_sequences: int = 64) -> None:
        config = model.config.get_text_config()
        kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
        if kinds != {"full_attention"}:
            raise ValueError(f"the transformers policy needs full attention, this model has {sorted(kinds)}: use vLLM")
        self.model = model
        self.tokenizer = tokenizer
        self.max_sequences = max_sequences
        self.on_token: Callable[[Sequence[int]], None] | None = None
        eos = model.generation_config.eos_token_id if model.generation_config else None
        self.eos_token_ids = {tokenizer.eos_token_id, *(eos if isinstance(eos, list) else [eos])} - {None}
        self._inbox: queue.SimpleQueue[_Request | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._stop_tokens: dict[tuple[str, ...], set[int]] = {}

    async def open(self) -> None:
        self._was_training = self.model.training
        self._attention = self.model.config._attn_implementation
        self.model.eval()
        self.model.set_attn_implementation(SLOT_ATTENTION)
        self._thread = threading.Thread(target=self._run, name="transformers-policy", daemon=True)
        self._thread.start()

    async def close(self) -> None:
        if self._thread is None:
            return
        self._inbox.put(None)
        await asyncio.to_thread(self._thread.join)
        self._thread = None
        self.model.train(self._was_training)
        self.model.set_attn_implementation(self._attention)

    async def generate(
        self, prompt_ids: Sequence[int], *, max_tokens: int, sampling: Sampling, stop: Sequence[str] = ()
    ) -> Completion:
        if self._thread is None:
            raise RuntimeError("the policy is closed: await policy.open() first")
        if not prompt_ids:
            raise ValueError("prompt_ids is empty")
        request = _Request(list(prompt_ids), max(1, max_tokens), tuple(stop), sampling)
        self._inbox.put(request)
        return await asyncio.wrap_future(request.future)

    # The engine thread

    def _run(self) -> None:
        self._cache = SlotCache(self.max_sequences)
        self._slots = [_Slot(row) for row in range(self.max_sequences)]
        self._clock = 0
        self._waiting: list[_Request] = []
        try:
            with torch.no_grad():
                while self._receive():
                    self._clock += 1
                    self._prefill(self._admit())
                    self._decode([slot for slot in self._slots if slot.request])
        # Whatever breaks the engine must reach every coroutine that waits on it, or the rollout hangs.
        except BaseException as error:
            for request in self._unfinished():
                _fail(request, error)
            while (queued := self._inbox.get()) is not None:
                _fail(queued, error)
        finally:
            del self._cache

    def _receive(self) -> bool:
        """Takes in new requests, waiting for one if there is nothing to do. False once the policy is closed."""
        while True:
            idle = not self._waiting and not any(slot.request for slot in self._slots)
            try:
                request = self._inbox.get(block=idle)
            except queue.Empty:
                return True
            if request is None:
                for left in self._unfinished():
                    left.future.cancel()
                return False
            self._waiting.append(request)

    def _unfinished(self) -> list[_Request]:
        return [*self._waiting, *(slot.request for slot in self._slots if slot.request)]

    def _admit(self) -> list[_Slot]:
        """Gives waiting requests a slot: the one that holds the conversation so far, or the longest unused one."""
        self._drop_cancelled()
        admitted: list[_Slot] = []
        free = [slot for slot in self._slots if slot.request is None]
        while self._waiting and free:
            request = self._waiting.pop(0)
            prompt = request.prompt_ids
            warm = [slot for slot in free if 0 < len(slot.ids) < len(prompt) and slot.ids == prompt[: len(slot.ids)]]
            slot = max(warm, key=lambda s: len(s.ids)) if warm else min(free, key=lambda s: (bool(s.ids), s.used_at))
            if not warm:
                slot.ids = []
            slot.request, slot.used_at = request, self._clock
            free.remove(slot)
            admitted.append(slot)
        return admitted

    def _drop_cancelled(self) -> None:
        self._waiting = [request for request in self._waiting if not request.future.cancelled()]
        for slot in self._slots:
            if slot.request and slot.request.future.cancelled():
                slot.request = None

    def _prefill(self, admitted: list[_Slot]) -> None:
        """Computes the prompts of new requests, each distinct one once, and samples their first tokens."""
        groups: dict[tuple[int, ...], list[_Slot]] = {}
        for slot in admitted:
            assert slot.request is not None
            # A warm slot has its own history to continue; cold ones with the same prompt share one computation.
            key = (slot.row, -1) if slot.ids else tuple(slot.request.prompt_ids)
            groups.setdefault(key, []).append(slot)
        batch: list[list[_Slot]] = []
        width = 0
        for group in sorted(groups.values(), key=lambda group: _missing(group[0])):
            width = max(width, _missing(group[0]))
            if batch and (len(batch) + 1) * width > _MAX_PREFILL_TOKENS:
                self._prefill_batch(batch)
                batch, width = [], _missing(group[0])
            batch.append(group)
        if batch:
            self._prefill_batch(batch)

    def _prefill_batch(self, groups: list[list[_Slot]]) -> None:
        leaders = [group[0] for group in groups]
        new = [(slot, slot.request.prompt_ids[len(slot.ids) :]) for slot in leaders if slot.request]
        logits_BV = self._forward(new)
        followers: list[tuple[_Slot, int]] = []
        for i, group in enumerate(groups):
            for slot in group:
                assert slot.request is not None
                slot.ids = list(slot.request.prompt_ids)
                if slot is not group[0]:
                    self._cache.copy_row(group[0].row, slot.row, len(slot.ids))
                followers.append((slot, i))
        self._sample([slot for slot, _ in followers], logits_BV[[i for _, i in followers]])

    def _decode(self, running: list[_Slot]) -> None:
        """One more token for every running request."""
        if not running:
            return
        logits_BV = self._forward([(slot, [slot.request.ids[-1]]) for slot in running if slot.request])
        for slot in running:
            assert slot.request is not None
            slot.ids.append(slot.request.ids[-1])
        self._sample(running, logits_BV)

    def _forward(self, new: list[tuple[_Slot, list[int]]]) -> torch.Tensor:
        """Runs the new ids of each slot, left-padded; returns the float32 logits after the last one, (B, V)."""
        width = max(len(ids) for _, ids in new)
        device = self.model.device
        length = max(len(slot.ids) + len(ids) for slot, ids in new)
        self._cache.reserve(length)
        ids_BT = torch.tensor([[0] * (width - len(ids)) + ids for _, ids in new], device=device)
        positions_BT = torch.tensor(
            [[-1] * (width - len(ids)) + list(range(len(slot.ids), len(slot.ids) + len(ids))) for slot, ids in new],
            device=device,
        )
        rows_B = torch.tensor([slot.row for slot, _ in new], device=device)
        mask = self._cache.select(rows_B, positions_BT, length)
        output = self.model(
            input_ids=ids_BT,
            attention_mask=mask,
            position_ids=positions_BT.clamp(min=0),
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=1,
        )
        logits: torch.Tensor = output.logits[:, -1].float()
        return logits

    def _sample(self, slots: list[_Slot], logits_BV: torch.Tensor) -> None:
        """Samples one token for each slot, and ends the requests that it completes."""
        by_sampling: dict[tuple[float, float, int, float], list[int]] = {}
        for i, slot in enumerate(slots):
            assert slot.request is not None
            how = slot.request.sampling
            by_sampling.setdefault((how.temperature, how.top_p, how.top_k, how.min_p), []).append(i)
        for rows in by_sampling.values():
            requests = [slots[i].request for i in rows]
            uniforms = torch.tensor([request.random.random() for request in requests if request])
            how = requests[0].sampling if requests[0] else Sampling()
            ids_B, logprobs_B = sample(logits_BV if len(rows) == len(slots) else logits_BV[rows], how, uniforms)
            for i, token, logprob in zip(rows, ids_B.tolist(), logprobs_B.tolist(), strict=True):
                self._append(slots[i], token, logprob)

    def _append(self, slot: _Slot, token: int, logprob: float) -> None:
        request = slot.request
        assert request is not None
        request.ids.append(token)
        request.logprobs.append(logprob)
        if self.on_token is not None:
            self.on_token(request.ids)
        if token in self.eos_token_ids:
            reason = FinishReason.EOS
        elif request.stop and self._at_stop(request):
            reason = FinishReason.STOP
        elif len(request.ids) >= request.max_tokens:
            reason = FinishReason.LENGTH
        else:
            return
        slot.request = None
        if request.future.set_running_or_notify_cancel():
            request.future.set_result(Completion(tuple(request.ids), tuple(request.logprobs), reason))

    def _at_stop(self, request: _Request) -> bool:
        """Whether the token just sampled completed a stop string."""
        if request.stop not in self._stop_tokens:
            # Byte-level vocabularies write ASCII as it is: only a token with a stop's last character can complete it.
            ends = {text[-1] for text in request.stop}
            tokens = self.tokenizer.get_vocab().items() if all(end.isascii() for end in ends) else ()
            self._stop_tokens[request.stop] = {i for token, i in tokens if ends & set(token)}
        candidates = self._stop_tokens[request.stop]
        if candidates and request.ids[-1] not in candidates:
            return False
        tail = self.tokenizer.decode(request.ids[-_STOP_TAIL_TOKENS:], skip_special_tokens=False)
        return any(text in tail for text in request.stop)


def sample(logits_BV: torch.Tensor, sampling: Sampling, uniforms_B: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Draws one token a row by inverting the cumulative distribution at `uniforms_B` (in [0, 1)).

    One number a token from the request's own generator makes a request repeatable whatever it is batched with.

    Returns:
        The ids (B) and their logprobs (B) at that temperature, before top-p, top-k and min-p.
    """
    greedy = sampling.temperature == 0
    scaled_BV = logits_BV if greedy else logits_BV / sampling.temperature
    logprobs_BV = torch.log_softmax(scaled_BV, dim=-1)
    if greedy:
        ids_B = scaled_BV.argmax(dim=-1)
    else:
        filters = LogitsProcessorList()
        if sampling.top_k > 0:
            filters.append(TopKLogitsWarper(sampling.top_k))
        if sampling.top_p < 1:
            filters.append(TopPLogitsWarper(sampling.top_p))
        if sampling.min_p > 0:
            filters.append(MinPLogitsWarper(sampling.min_p))
        # None of these reads the ids so far.
        kept_BV = filters(None, scaled_BV).softmax(dim=-1) if filters else logprobs_BV.exp()  # type: ignore[arg-type]
        cumulative_BV = kept_BV.cumsum(dim=-1)
        total_B1 = cumulative_BV[:, -1:]
        # A uniform just below 1 becomes 1 in float32; at the total itself stand tokens of no probability.
        below_B1 = total_B1.nextafter(torch.zeros_like(total_B1))
        targets_B1 = (uniforms_B.to(cumulative_BV).unsqueeze(-1) * total_B1).minimum(below_B1)
        ids_B = torch.searchsorted(cumulative_BV, targets_B1, right=True).squeeze(-1)
        ids_B = ids_B.clamp(max=logits_BV.shape[-1] - 1)
    return ids_B, logprobs_BV.gather(-1, ids_B.unsqueeze(-1)).squeeze(-1)


def _missing(slot: _Slot) -> int:
    """Tokens of the slot's prompt that its cache does not hold yet."""
    assert slot.request is not None
    return len(slot.request.prompt_ids) - len(slot.ids)


def _fail(request: _Request, error: BaseException) -> None:
    if request.future.set_running_or_notify_cancel():
        request.future.set_exception(error)
