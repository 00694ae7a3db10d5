"""Per-token log-probs of ragged trajectories, without padding, for the tokens in the loss only.

TRL pads a whole generation batch to its longest trajectory, runs every micro-batch at that width, and projects every
completion token onto the vocabulary, including retrieved ones. A search agent's trajectories are ragged, and most of
their tokens are retrieved. Here (`benchmarks/logprobs.py` measures it):

1. only real tokens run, in packs of trajectories of up to `max_packed_tokens` tokens (`packing.py`); each token
   attends to its own trajectory (`attention.py`). If no kernel supports this, rows of similar length run together,
   padded;
2. only hidden states whose next token is in the loss are kept, and TRL's fused LM head turns them into log-probs and
   entropies in tiles. For all other tokens both are 0, and TRL uses neither (test_logprobs.py).

Memory of the backward: all packs of a micro-batch share one backward. With `gradient_checkpointing`, only the layers'
inputs are kept, and layers rerun one by one. Without it, every pack except the last reruns as a whole in the backward,
so that the activations of one pack exist at a time; a micro-batch of one pack never runs twice. `max_packed_tokens`
therefore bounds the peak, and `per_device_train_batch_size` may be large.
"""

from __future__ import annotations

import functools
import inspect
import logging
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from accelerate import Accelerator
from accelerate.utils import is_peft_model
from transformers import PreTrainedModel

from trl_search.policies.probe import has_router_logits
from trl_search.trainer.loss.attention import attention_inputs, choose_attention, set_attention
from trl_search.trainer.loss.memory import RoomForPacks
from trl_search.trainer.loss.packing import Pack, idle_pack, make_packs, needed_tokens, scored_tokens

logger = logging.getLogger(__name__)

# The minimum rows of a padded chunk, and the maximum chunks of a micro-batch (more only if TRL's batch_size requires
# it). The number of chunks depends only on the number of rows, because ranks that shard a model, or broadcast its
# buffers, must run the same number of forwards.
MIN_ROWS, MAX_CHUNKS = 4, 4

# Log-probs and entropies, one per scored token, and the indices of these tokens in the flattened (B, T) batch.
Scores = tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]


def make_logprobs(models: Sequence[Any], args: Any, accelerator: Accelerator) -> LogProbs | None:
    """Chooses how the log-probs of a trainer's models are computed, logs the choice, and prepares the models. `None`
    if only TRL's own forward can compute them."""
    policy = models[0]
    if is_peft_model(policy) and policy.active_peft_config.is_prompt_learning:
        logger.info("log-probs: TRL's own padded forward, since prompt learning puts tokens before every row")
        return None
    unwrapped = [accelerator.unwrap_model(model) for model in models if model is not None]
    bare = [model.get_base_model() if is_peft_model(model) else model for model in unwrapped]
    dtype = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else bare[0].dtype
    attention, why = choose_attention(args.packed_attention, bare[0], device=accelerator.device, dtype=dtype)
    for model in bare:
        enable_scoring(model, attention)
    logger.info("log-probs: %s attention (%s)", attention, why)

    def most_of_all_ranks(packs: int) -> int:
        if accelerator.num_processes == 1:
            return packs
        return int(accelerator.gather(torch.tensor([packs], device=accelerator.device)).max())

    return LogProbs(
        attention,
        args.max_packed_tokens or RoomForPacks(policy, bare[0].config.get_text_config(), dtype.itemsize),
        agree=most_of_all_ranks,
        # Otherwise a model with absolute positions counts padding. Vision-language models compute their own positions.
        takes_positions=takes_positions(bare[0]),
        options={"output_router_logits": False} if has_router_logits(bare[0]) else {},
    )


def takes_positions(model: PreTrainedModel) -> bool:
    """Whether the forward of this model takes the position of each token."""
    text_only = model.config.get_text_config() is model.config
    return text_only and "position_ids" in inspect.signature(type(model).forward).parameters


def enable_scoring(model: PreTrainedModel, attention: str) -> None:
    """Patches `model`, which has TRL's fused LM head, to run packs and to project only chosen hidden states.

    A packed call passes everything as keyword arguments through all wrappers of the model, so that gradient
    checkpointing, DDP and DeepSpeed see it.
    """
    fused_forward = model.forward

    # Keep the original signature: `generate` validates its model kwargs against it
    @functools.wraps(type(model).forward)
    def forward(self: PreTrainedModel, *args: Any, run_again: bool = False, **kwargs: Any) -> Any:
        if run_again:
            return torch.utils.checkpoint.checkpoint(fused_forward, *args, use_reentrant=False, **kwargs)
        return fused_forward(*args, **kwargs)

    model.forward = types.MethodType(forward, model)
    if _keep_scored not in model.base_model._forward_hooks.values():  # an earlier trainer may have added it
        model.base_model.register_forward_hook(_keep_scored, with_kwargs=True)
    set_attention(model, attention)


def _keep_scored(module: torch.nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
    """A forward hook on the backbone that passes only the scored hidden states to the LM head."""
    scored_N = kwargs.get("scored_positions")
    if scored_N is not None:
        output.last_hidden_state = output.last_hidden_state.flatten(0, 1)[scored_N].unsqueeze(0)  # (1, N, hidden)
    return output


@dataclass(frozen=True)
class LogProbs:
    """TRL's `_get_per_token_logps_and_entropies` over real tokens only."""

    attention: str  # the kernel that `choose_attention` chose and `enable_scoring` installed
    max_packed_tokens: int | RoomForPacks  # maximum tokens per pack; a longer trajectory gets its own pack
    agree: Callable[[int], int] = lambda packs: packs  # maps this rank's number of packs to the maximum over all ranks
    takes_positions: bool = False  # whether a padded forward gets `position_ids`
    options: Mapping[str, Any] = field(default_factory=dict)  # further keyword arguments of every forward

    def __call__(
        self,
        model: Any,
        input_ids_BT: torch.Tensor,
        attention_mask_BT: torch.Tensor,
        logits_to_keep: int,
        loss_mask_BC: torch.Tensor | None,
        *,
        batch_size: int | None = None,
        gradient_checkpointing: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Runs `model`, which `enable_scoring` prepared, on a batch of prompts padded on the left and completions
        padded on the right, of `logits_to_keep` columns (C; more than the mask's if TRL pads to a multiple).
        `batch_size` limits the rows of a padded forward; packs are limited by tokens. Returns log-probs and entropies
        (B, C), 0 outside the mask; `None` for entropies that the head lacks."""
        completion_BC = attention_mask_BT[:, -logits_to_keep:]
        if loss_mask_BC is not None:
            missing = logits_to_keep - loss_mask_BC.shape[1]
            completion_BC = completion_BC * F.pad(loss_mask_BC.to(completion_BC), (0, missing))
        scored_BT = scored_tokens(attention_mask_BT, completion_BC)
        if self.attention == "padded":
            scores = self._padded_scores(model, input_ids_BT, attention_mask_BT, scored_BT, batch_size)
        else:
            most = self.max_packed_tokens
            if isinstance(most, RoomForPacks):
                tokens = int(needed_tokens(attention_mask_BT, scored_BT).sum())
                most = most(tokens, checkpointing=gradient_checkpointing)
            packs = make_packs(attention_mask_BT, scored_BT, most)
            # A rank with nothing to score still runs a forward, which the backward of a wrapper such as DDP needs.
            packs += [idle_pack()] * (max(1, self.agree(len(packs))) - len(packs))
            again = torch.is_grad_enabled() and not gradient_checkpointing
            scores = [
                self._pack_scores(model, pack, input_ids_BT, run_again=again and i < len(packs) - 1)
                for i, pack in enumerate(packs)
            ]
        logps, entropies, where = zip(*scores, strict=True)
        where_N, shape = torch.cat(where), input_ids_BT.shape

        def spread(parts: Sequence[torch.Tensor]) -> torch.Tensor:
            values_N = torch.cat(list(parts))
            values_BT = values_N.new_zeros(shape.numel()).index_put((where_N,), values_N).view(shape)
            return values_BT[:, -logits_to_keep:]

        return spread(logps), None if entropies[0] is None else spread(entropies)

    def _pack_scores(self, model: Any, pack: Pack, input_ids_BT: torch.Tensor, *, run_again: bool) -> Scores:
        device = input_ids_BT.device
        ids = input_ids_BT.flatten()
        targets_N = pack.targets_N.to(device)
        outputs = model(
            input_ids=ids[pack.tokens_T.to(device)].unsqueeze(0),
            position_ids=pack.positions_T.to(device).unsqueeze(0),
            shift_labels=ids[targets_N].unsqueeze(0),
            scored_positions=pack.scored_N.to(device),
            fused_lm_head=True,
            run_again=run_again,
            **attention_inputs(self.attention, pack.lengths, device),
            **self.options,
        )
        return outputs.log_probs[0], None if outputs.entropy is None else outputs.entropy[0], targets_N

    def _padded_scores(
        self,
        model: Any,
        input_ids_BT: torch.Tensor,
        attention_mask_BT: torch.Tensor,
        scored_BT: torch.Tensor,
        batch_size: int | None,
    ) -> list[Scores]:
        """Runs rows sorted by length in a few chunks, each cut to the columns that its scored tokens depend on."""
        rows, width = input_ids_BT.shape
        needed_BT = needed_tokens(attention_mask_BT, scored_BT)
        count = max(1, min(MAX_CHUNKS, rows // MIN_ROWS), -(-rows // (batch_size or rows)))
        order_B = (
            needed_BT.sum(dim=1).argsort(stable=True) if count > 1 else torch.arange(rows, device=needed_BT.device)
        )
        where_BT = torch.arange(rows * width, device=input_ids_BT.device).view(rows, width)
        positions_BT = (attention_mask_BT.cumsum(dim=1) - 1).clamp(min=0)
        ids = input_ids_BT.flatten()
        scores = []
        for chunk in order_B.tensor_split(count):
            used = needed_BT[chunk].any(dim=0).nonzero().flatten()
            # Keep at least one column, because a chunk may have nothing to score.
            start, end = (int(used[0]), int(used[-1]) + 1) if len(used) else (0, 1)
            scored_N = scored_BT[chunk, start + 1 : end + 1].flatten().nonzero().squeeze(1)
            targets_N = where_BT[chunk, start + 1 : end + 1].flatten()[scored_N]
            outputs = model(
                input_ids=input_ids_BT[chunk, start:end],
                attention_mask=attention_mask_BT[chunk, start:end],
                shift_labels=ids[targets_N].unsqueeze(0),
                scored_positions=scored_N,
                fused_lm_head=True,
                **({"position_ids": positions_BT[chunk, start:end]} if self.takes_positions else {}),
                **self.options,
            )
            scores.append((outputs.log_probs[0], None if outputs.entropy is None else outputs.entropy[0], targets_N))
        return scores
