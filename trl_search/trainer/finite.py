"""Skips steps with a NaN or infinite loss or gradient, and never saves such weights.

    loss or gradient NaN or infinite ─► the step changes no weight, and is counted (`skipped_steps` in the log)
    three such steps in a row        ─► the run stops, with the step and the text of the batch
    a weight NaN or infinite         ─► the model in the folder is not overwritten

One known cause: on H100 with torch 2.11 and cuDNN 9.19, the backward pass of cuDNN's attention gives NaN gradients for
some padded batches. That kernel is therefore disabled; the memory-efficient and the math kernels remain.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from accelerate.utils import DistributedType
from transformers import Trainer

from trl_search.common.errors import UserError
from trl_search.policies.loading import nonfinite
from trl_search.trainer.generation.model_weights import gathered

logger = logging.getLogger(__name__)

MAX_IN_A_ROW = 3
METRIC = "skipped_steps"
_SHOWN_CHARS = 300


def avoid_cudnn_attention() -> None:
    """Disables cuDNN's attention for PyTorch's sdpa in this process, and logs that once."""
    if torch.cuda.is_available() and torch.backends.cuda.cudnn_sdp_enabled():
        torch.backends.cuda.enable_cudnn_sdp(False)
        logger.warning("cuDNN's attention is disabled for training: its gradients can be NaN (docs/monitoring.md)")


def refuse_nonfinite_weights(weights: Iterable[tuple[str, torch.Tensor]], folder: str | None) -> None:
    """Raises `UserError` if a weight is NaN or infinite, before anything is written to `folder`."""
    if name := nonfinite(weights):
        raise UserError(
            f"{name} contains NaN or infinite values, so nothing was written to {folder}. Resume from a checkpoint, "
            "with a lower learning_rate or max_grad_norm"
        )


class FiniteSteps(Trainer):
    """A mixin that skips steps with a loss or gradient that is not finite. List it before TRL's trainer."""

    _batch: Mapping[str, Any] | None = None
    _broken: bool = False  # a loss of the current step was not finite
    _in_a_row: int = 0
    skipped: int = 0

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        self._batch = inputs
        return super().compute_loss(model, inputs, *args, **kwargs)

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss: torch.Tensor = super().training_step(*args, **kwargs)
        if not bool(torch.isfinite(loss)):
            self._broken = True
        return loss

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        """transformers calls this after the backward pass and before the optimizer, so a step is skipped here."""
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        broken = torch.tensor(float(self._broken), device=self.accelerator.device)
        self._broken = False
        # With fp16, the gradient scaler causes infinite gradients, skips those steps itself, and lowers its scale.
        scaled = self.accelerator.scaler is not None
        if norm is not None and not scaled:
            norm_here = gathered(torch.as_tensor(norm, device=broken.device, dtype=torch.float32), broken.device)
            broken = torch.maximum(broken, (~torch.isfinite(norm_here)).float())
        if self.accelerator.num_processes > 1:
            broken = self.accelerator.reduce(broken, "sum")  # every rank skips, or none does
        if not bool(broken):
            self._in_a_row = 0
            return norm
        self._skip(model)
        return norm

    def _skip(self, model: Any) -> None:
        self.skipped += 1
        self._in_a_row += 1
        step = self.state.global_step + 1
        if self.accelerator.distributed_type == DistributedType.DEEPSPEED:
            # DeepSpeed has already stepped in the backward pass, so the step cannot be skipped.
            raise UserError(f"step {step}: the loss or a gradient is not finite; {self._advice()}")
        model.zero_grad(set_to_none=True)  # the optimizer ignores weights without a gradient
        logger.warning("step %d: the loss or a gradient is not finite; the step is skipped", step)
        if self._in_a_row >= MAX_IN_A_ROW:
            raise UserError(
                f"step {step}: the loss or a gradient was not finite in {self._in_a_row} steps in a row, which were "
                f"skipped; {self._advice()}"
            )

    def _advice(self) -> str:
        return (
            f"the run stops. The last batch begins with {self._shown()!r}. Check that row, lower learning_rate or "
            "max_grad_norm, or train in bf16 instead of fp16"
        )

    def _shown(self) -> str:
        """The beginning of the last batch, as text."""
        batch = self._batch if isinstance(self._batch, Mapping) else {}
        ids = next((batch[key] for key in ("input_ids", "prompt_ids") if key in batch), None)
        tokenizer: Any = self.processing_class
        if ids is None or not hasattr(tokenizer, "decode"):
            return ""
        pad = getattr(tokenizer, "pad_token_id", None)
        first = [token for token in ids[0].tolist() if token != pad][:_SHOWN_CHARS]
        return str(tokenizer.decode(first))[:_SHOWN_CHARS]

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if self.skipped:
            logs[METRIC] = float(self.skipped)
        super().log(logs, *args, **kwargs)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        # From 5.24 on, transformers calls this on every rank. With FSDP only one has the weights, and to look at the
        # others' would be a collective operation.
        if self.args.should_save:
            assert self.model is not None
            weights = state_dict.items() if state_dict else self.model.named_parameters()
            refuse_nonfinite_weights(weights, output_dir or self.args.output_dir)
        super()._save(output_dir, state_dict=state_dict)
