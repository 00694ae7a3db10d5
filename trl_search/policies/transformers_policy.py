"""A policy that runs a plain `transformers` model on CPU or GPU, with continuous batching and a prefix cache.

The engine's thread (`engine_thread.py`) owns the model. It adds new requests between two forwards, so a trajectory
never waits for another's turn to end. A finished turn leaves its keys and values in its slot. When the conversation
continues with an observation, only the observation is computed.
"""

from __future__ import annotations

import asyncio
import inspect
import random
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Unpack

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from trl_search.common.errors import UserError
from trl_search.policies import probe
from trl_search.policies.base import Turn
from trl_search.policies.engine_thread import EngineThread, Request
from trl_search.policies.kv_cache import SLOT_ATTENTION, SlotCache
from trl_search.policies.stop_strings import StopStrings
from trl_search.policies.thread_device import use_device
from trl_search.policies.token_sampling import sample
from trl_search.types import Completion, FinishReason, Sampling

# Tokens of one prefill forward, padding included; bounds its activations.
_MAX_PREFILL_TOKENS = 16_384
# An extra prefill forward must save this many padding tokens, about the cost of starting a forward.
_WORTH_A_FORWARD = 256
_REMEDY = "sample with vLLM instead (use_vllm: true in training, --backend vllm in an evaluation)"
# Models that have passed the probe.
_probed: weakref.WeakSet[PreTrainedModel] = weakref.WeakSet()


@dataclass
class _Turn:
    """A request and the tokens sampled for it so far."""

    request: Request
    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.random = random.Random(self.request.sampling.seed)

    @property
    def prompt_ids(self) -> list[int]:
        return self.request.prompt_ids


@dataclass
class _Slot:
    """One row of the cache: the ids whose keys and values it holds, and the running turn, if any."""

    row: int
    ids: list[int] = field(default_factory=list)
    turn: _Turn | None = None
    used_at: int = 0


class TransformersPolicy(EngineThread):
    """Samples from a `transformers` decoder with full or sliding-window attention (Qwen2/3, Llama, Mistral, ...).

    Args:
        model (`PreTrainedModel`): The model. While the policy is open, it is in eval mode and uses our attention.
        tokenizer (`PreTrainedTokenizerBase`): The tokenizer, for stop strings and the EOS.
        max_sequences (`int`, *optional*, defaults to `64`): Conversations that run at once; others queue.

    Attributes:
        on_token (`Callable[[Sequence[int]], None]`, *optional*): Called on the engine's thread after each sampled
            token, with the ids of the turn so far. It does not identify the turn, so use it with one sequence only.

    Raises:
        UserError: if the model's attention or positions cannot be replaced. `open` raises it if a probe shows that
            the engine does not compute the given model.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, max_sequences: int = 64) -> None:
        super().__init__()
        reason = why_not(model)
        if reason:
            raise UserError(f"the transformers policy cannot sample {_name(model)}: {reason}; {_REMEDY}")
        self.model = model
        self.tokenizer = tokenizer
        self.max_sequences = self.slots = max_sequences
        self.positions = probe.positions_of_model(model)
        self.on_token: Callable[[Sequence[int]], None] | None = None
        eos = model.generation_config.eos_token_id if model.generation_config else None
        self.eos_token_ids = {tokenizer.eos_token_id, *(eos if isinstance(eos, list) else [eos])} - {None}
        self._stops = StopStrings(tokenizer)
        self._options = {"output_router_logits": False} if probe.has_router_logits(model) else {}
        # From transformers 5.24 on, the argument is called `cache`.
        names = inspect.signature(type(probe.bare_model(model)).forward).parameters
        self._cache_argument = "cache" if "cache" in names else "past_key_values"

    async def open(self) -> None:
        bare = probe.bare_model(self.model)
        if bare not in _probed:
            await self._probe()
            _probed.add(bare)
        await self._start()

    async def _start(self) -> None:
        self._was_training = self.model.training
        self._attention = self.model.config._attn_implementation
        self.model.eval()
        self.model.set_attn_implementation(SLOT_ATTENTION)
        await super().open()

    async def close(self) -> None:
        if self._thread is None:
            return
        await super().close()
        self.model.train(self._was_training)
        self.model.set_attn_implementation(self._attention)

    async def generate(self, prompt_ids: Sequence[int], **turn: Unpack[Turn]) -> Completion:
        """[`Policy.generate`].

        Raises:
            UserError: for more tokens than the model has positions, where it would write nonsense.
        """
        needed = len(prompt_ids) + turn["max_tokens"]
        if self.positions is not None and needed > self.positions:
            raise UserError(
                f"a conversation of {len(prompt_ids)} tokens and a turn of {turn['max_tokens']} need {needed} "
                f"positions, but {_name(self.model)} has {self.positions}: lower max_completion_length, or leave such "
                "long questions out"
            )
        return await super().generate(prompt_ids, **turn)

    async def _probe(self) -> None:
        """Samples two conversations of different lengths, two turns each, to cover padding, warm slots and window."""
        listener, self.on_token = self.on_token, None
        long = probe.random_ids(self.tokenizer, self.model, probe.probe_length(self.model, self.model.device), seed=0)
        asked, found = [long, probe.random_ids(self.tokenizer, self.model, 3, seed=1)], []
        more = probe.random_ids(self.tokenizer, self.model, 2, seed=2)
        try:
            await self._start()
            for turn in range(2):
                turns = await asyncio.gather(
                    *(self.generate(ids, max_tokens=2, sampling=Sampling(seed=turn)) for ids in asked)
                )
                found += list(zip(asked, turns, strict=True))
                asked = [[*ids, *completion.ids, *more] for ids, completion in zip(asked, turns, strict=True)]
        # An architecture may raise anything when it gets our cache.
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"
            raise UserError(
                f"the transformers policy cannot sample {_name(self.model)} ({reason}); {_REMEDY}"
            ) from error
        finally:
            await self.close()
            self.on_token = listener
        was_training = self.model.training
        self.model.eval()
        expected = torch.cat([probe.plain_logprobs(self.model, ids, completion.ids) for ids, completion in found])
        self.model.train(was_training)
        sampled = torch.tensor([logprob for _, completion in found for logprob in completion.logprobs])
        difference = probe.differ(sampled, expected, float32=probe.computes_in_float32(self.model))
        if difference:
            raise UserError(
                f"the transformers policy does not compute {_name(self.model)} correctly: {difference}; {_REMEDY}"
            )

    # On the engine's thread

    def start_engine(self) -> None:
        use_device(self.model.device)
        self._cache = SlotCache(self.max_sequences)
        self._slots = [_Slot(row) for row in range(self.max_sequences)]
        self._clock = 0
        self._waiting: list[_Turn] = []
        self._finished: list[tuple[Request, Completion]] = []

    def stop_engine(self, unfinished: Sequence[Request]) -> None:
        del self._cache

    def add(self, request: Request) -> None:
        self._waiting.append(_Turn(request))

    def drop(self, request: Request) -> Completion:
        self._waiting = [turn for turn in self._waiting if turn.request is not request]
        sampled = Completion((), (), FinishReason.INTERRUPTED)
        for slot in self._slots:
            if slot.turn and slot.turn.request is request:
                sampled = Completion(tuple(slot.turn.ids), tuple(slot.turn.logprobs), FinishReason.INTERRUPTED)
                slot.turn = None
        return sampled

    @torch.no_grad()
    def step(self) -> list[tuple[Request, Completion]]:
        self._clock += 1
        self._prefill(self._admit())
        self._decode([slot for slot in self._slots if slot.turn])
        finished, self._finished = self._finished, []
        return finished

    def _admit(self) -> list[_Slot]:
        """Gives waiting turns a slot: the one that holds their conversation, or the least recently used one."""
        admitted: list[_Slot] = []
        free = [slot for slot in self._slots if slot.turn is None]
        while self._waiting and free:
            turn = self._waiting.pop(0)
            prompt = turn.prompt_ids
            warm = [slot for slot in free if 0 < len(slot.ids) < len(prompt) and slot.ids == prompt[: len(slot.ids)]]
            slot = max(warm, key=lambda s: len(s.ids)) if warm else min(free, key=lambda s: (bool(s.ids), s.used_at))
            if not warm:
                slot.ids = []
            slot.turn, slot.used_at = turn, self._clock
            free.remove(slot)
            admitted.append(slot)
        return admitted

    def _prefill(self, admitted: list[_Slot]) -> None:
        """Computes each distinct prompt of the new requests once, and samples their first tokens.

        Only prompts of similar length share a forward. A conversation that continues after a weight update is several
        times as long as a new question, which would need much padding.
        """
        groups: dict[tuple[int, ...], list[_Slot]] = {}
        for slot in admitted:
            assert slot.turn is not None
            # A warm slot continues its own history; cold slots with the same prompt share one computation.
            key = (slot.row, -1) if slot.ids else tuple(slot.turn.prompt_ids)
            groups.setdefault(key, []).append(slot)
        batch: list[list[_Slot]] = []
        width = 0
        for group in sorted(groups.values(), key=lambda group: _missing(group[0])):
            padding = len(batch) * (_missing(group[0]) - width)  # groups are sorted by length
            width = _missing(group[0])
            if batch and (padding > _WORTH_A_FORWARD or (len(batch) + 1) * width > _MAX_PREFILL_TOKENS):
                self._prefill_batch(batch)
                batch = []
            batch.append(group)
        if batch:
            self._prefill_batch(batch)

    def _prefill_batch(self, groups: list[list[_Slot]]) -> None:
        leaders = [group[0] for group in groups]
        new = [(slot, slot.turn.prompt_ids[len(slot.ids) :]) for slot in leaders if slot.turn]
        logits_BV = self._forward(new)
        followers: list[tuple[_Slot, int]] = []
        for i, group in enumerate(groups):
            for slot in group:
                assert slot.turn is not None
                slot.ids = list(slot.turn.prompt_ids)
                if slot is not group[0]:
                    self._cache.copy_row(group[0].row, slot.row, len(slot.ids))
                followers.append((slot, i))
        self._sample([slot for slot, _ in followers], logits_BV[[i for _, i in followers]])

    def _decode(self, running: list[_Slot]) -> None:
        """Samples one more token for every running turn."""
        if not running:
            return
        logits_BV = self._forward([(slot, [slot.turn.ids[-1]]) for slot in running if slot.turn])
        for slot in running:
            assert slot.turn is not None
            slot.ids.append(slot.turn.ids[-1])
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
            use_cache=True,
            logits_to_keep=1,
            **{self._cache_argument: self._cache},
            **self._options,
        )
        logits: torch.Tensor = output.logits[:, -1].float()
        return logits

    def _sample(self, slots: list[_Slot], logits_BV: torch.Tensor) -> None:
        """Samples one token per slot, and ends the turns that are complete."""
        by_sampling: dict[tuple[float, float, int, float], list[int]] = {}
        turns = [slot.turn for slot in slots if slot.turn]
        for i, turn in enumerate(turns):
            how = turn.request.sampling
            by_sampling.setdefault((how.temperature, how.top_p, how.top_k, how.min_p), []).append(i)
        for rows in by_sampling.values():
            uniforms = torch.tensor([turns[i].random.random() for i in rows])
            how = turns[rows[0]].request.sampling
            ids_B, logprobs_B = sample(logits_BV if len(rows) == len(slots) else logits_BV[rows], how, uniforms)
            for i, token, logprob in zip(rows, ids_B.tolist(), logprobs_B.tolist(), strict=True):
                self._append(slots[i], turns[i], token, logprob)

    def _append(self, slot: _Slot, turn: _Turn, token: int, logprob: float) -> None:
        turn.ids.append(token)
        turn.logprobs.append(logprob)
        if self.on_token is not None:
            self.on_token(turn.ids)
        if token in self.eos_token_ids or token in turn.request.stop_token_ids:
            reason = FinishReason.EOS
        elif self._stops.is_reached(turn.ids, turn.request.stop):
            reason = FinishReason.STOP
        elif len(turn.ids) >= turn.request.max_tokens:
            reason = FinishReason.LENGTH
        else:
            return
        slot.turn = None
        self._finished.append((turn.request, Completion(tuple(turn.ids), tuple(turn.logprobs), reason)))


def why_not(model: PreTrainedModel) -> str:
    """Why the model's architecture is not supported; empty if no reason is known. `open` probes the rest."""
    bare = probe.bare_model(model)
    kinds = set(getattr(bare.config.get_text_config(), "layer_types", None) or [])
    if others := kinds - {"full_attention", "sliding_attention"}:
        return f"it has layers of type {', '.join(sorted(others))}"
    if not bare._can_set_attn_implementation():
        return f"the attention of {type(bare).__name__} cannot be replaced"
    if "position_ids" not in inspect.signature(type(bare).forward).parameters:
        return f"{type(bare).__name__} takes no position_ids"
    return ""


def _name(model: PreTrainedModel) -> str:
    return model.config._name_or_path or type(probe.bare_model(model)).__name__


def _missing(slot: _Slot) -> int:
    """Tokens of the slot's prompt that its cache does not hold yet."""
    assert slot.turn is not None
    return len(slot.turn.prompt_ids) - len(slot.ids)
