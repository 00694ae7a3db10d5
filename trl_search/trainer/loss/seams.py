"""`SearchLoss`: the seams of TRL's `GRPOTrainer` that compute the loss.

| seam                                 | what we do there                                                            |
|--------------------------------------|-----------------------------------------------------------------------------|
| `_compute_loss`                      | skip trajectories that cannot change the weights (`without_gradient.py`);   |
|                                      | add LLDS (`likelihood.py`)                                                  |
| `_get_per_token_logps_and_entropies` | run only real tokens, and score those in the loss (`logprobs.py`); add the  |
|                                      | importance ratios to vLLM (`importance.py`)                                 |
"""

from __future__ import annotations

import math
from typing import Any

import torch
from transformers import PreTrainedModel
from trl import GRPOTrainer

from trl_search.config.carry_over import carries_over
from trl_search.config.grpo import SearchGRPOConfig
from trl_search.environment import Environment
from trl_search.policies.adapters import refuse_tokens_of_the_head
from trl_search.trainer.batch import MicroBatch, Rollout
from trl_search.trainer.loss.importance import correct_towards_engine
from trl_search.trainer.loss.likelihood import llds_penalty
from trl_search.trainer.loss.logprobs import LogProbs, make_logprobs
from trl_search.trainer.loss.probe import probed
from trl_search.trainer.loss.without_gradient import log_what_ran, micro_batch_of, must_all_run
from trl_search.trainer.replaced import replaced


class SearchLoss(GRPOTrainer):
    """A `GRPOTrainer` whose loss runs only the tokens that it needs. Without an `environment`, the loss is TRL's."""

    args: SearchGRPOConfig
    model: PreTrainedModel
    environment: Environment | None
    last_rollout: Rollout
    # A class attribute, so that a partly constructed trainer acts as a plain GRPOTrainer.
    logprobs: LogProbs | None = None
    _micro_batch: MicroBatch | None = None  # set while its loss is computed
    all_run = True  # whether to run trajectories that cannot change the weights
    _probed = False

    @property
    def corrects_sampling(self) -> bool:
        """Whether the loss corrects for tokens that were sampled by vLLM or from older weights."""
        other = self.use_vllm or (self.environment is not None and carries_over(self.args))
        return bool(other and self.vllm_importance_sampling_correction)

    def prepare_loss(self) -> None:
        """Chooses how log-probs are computed and which trajectories run, and logs both."""
        refuse_tokens_of_the_head(self.model)
        self.logprobs = make_logprobs([self.model, self.ref_model], self.args, self.accelerator)
        self.all_run = must_all_run(self)

    def probe_logprobs(self) -> None:
        """Checks the loss's log-probs once, before the first rollout, when the model is on its device."""
        if self.logprobs is None or self._probed:
            return
        self._probed = True
        model = self.accelerator.unwrap_model(self.model_wrapped)
        with self.accelerator.autocast():
            self.logprobs = probed(self.logprobs, self.model_wrapped, model, self._tokenizer, self.args)

    def _get_per_token_logps_and_entropies(
        self,
        model: Any,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        logits_to_keep: int,
        batch_size: int | None = None,
        compute_entropy: bool = False,
        compute_aux_loss: bool = False,
        **multimodal: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        if self.logprobs is None or compute_aux_loss or any(value is not None for value in multimodal.values()):
            # The load-balancing loss of a mixture of experts is a mean over all tokens, so TRL's forward computes it.
            options = {"compute_entropy": compute_entropy, "compute_aux_loss": compute_aux_loss}
            scores: tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]
            scores = super()._get_per_token_logps_and_entropies(
                model, input_ids, attention_mask, logits_to_keep, batch_size, **options, **multimodal
            )
            self._see_logps(scores[0])
            return scores
        with self.accelerator.autocast():
            plugin = getattr(self.accelerator.state, "fsdp_plugin", None)
            again = self.args.gradient_checkpointing or bool(plugin and plugin.activation_checkpointing)
            # Outside the loss, the old and the reference policy score the whole generation batch.
            mask_BC = self.last_rollout.loss_mask_BC if self._micro_batch is None else self._micro_batch.runs_BC
            logps, entropies = self.logprobs(
                model,
                input_ids,
                attention_mask,
                logits_to_keep,
                mask_BC,
                batch_size=batch_size,
                gradient_checkpointing=again,
            )
        if self._micro_batch is not None:
            logps = self._micro_batch.with_old_logps(logps)
        self._see_logps(logps)
        return logps, entropies if compute_entropy else None, None

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> torch.Tensor:
        all_run = self.all_run or not self.model.training
        micro_batch = self._micro_batch = micro_batch_of(inputs, all_run=all_run)
        try:
            # TRL reads the ratios only if `use_vllm` is set.
            with replaced(self, "use_vllm", self.use_vllm or self.corrects_sampling):
                loss: torch.Tensor = super()._compute_loss(model, micro_batch.inputs)
        finally:
            self._micro_batch = None
        if not all_run:
            log_what_ran(self._metrics["train"], micro_batch, self.accelerator)
        if self.environment is None or not self.args.llds_coef or not self.model.training:
            return loss
        logps_BC, old_BC, mask_BC = micro_batch.logps_BC, micro_batch.old_logps_BC, micro_batch.loss_mask_BC
        assert logps_BC is not None, "the training forward has not run"
        penalty = llds_penalty(logps_BC, old_BC, mask_BC, micro_batch.inputs["advantages"])
        self._metrics["train"]["llds"].append(self.accelerator.gather(penalty.detach()).mean().item())
        return loss + self.args.llds_coef * penalty / self.current_gradient_accumulation_steps

    def _see_logps(self, logps_BC: torch.Tensor) -> None:
        """Stores the log-probs in the micro-batch, before TRL computes the loss from them."""
        if self._micro_batch is None or self.environment is None:
            return
        self._micro_batch.logps_BC = logps_BC
        if self.corrects_sampling:
            bounds = self.vllm_importance_sampling_clip_min, self.vllm_importance_sampling_clip_max
            found = correct_towards_engine(
                self._micro_batch, self.vllm_importance_sampling_mode, bounds, self.accelerator
            )
            # NaN is not logged if nothing ran, because reports read it as a broken run.
            for name, value in found.items():
                if not math.isnan(value):
                    self._metrics["train" if self.model.training else "eval"][name].append(value)
