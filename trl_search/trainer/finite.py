"""Nothing that is not finite is trained on, or saved.

    loss or gradient NaN or infinite ─► the step changes no weight, and is counted (`skipped_steps` in the log)
    three such steps in a row        ─► the run stops, with the step and the text of the batch
    a weight NaN or infinite         ─► nothing is written over the model that lies in the folder

One cause is known: on H100 with torch 2.11 and cuDNN 9.19, the backward pass of cuDNN's attention gives NaN gradients
for some padded batches. So that kernel is switched off; the memory-efficient and the plain one stay.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from accelerate.utils import DistributedType
from transformers import Trainer

from trl_search.common.errors import UserError
from trl_search.trainer.generation.model_weights import gathered

logger = logging.getLogger(__name__)

MAX_IN_A_ROW = 3
METRIC = "skipped_steps"
_SHOWN_CHARS = 300


def avoid_cudnn_attention() -> None:
    """Keeps PyTorch's sdpa away from cuDNN's attention in this process, and says so once."""
    if torch.cuda.is_available() and torch.backends.cuda.cudnn_sdp_enabled():
        torch.backends.cuda.enable_cudnn_sdp(False)
        logger.warning("cuDNN's attention is switched off for training: its gradients can be NaN (docs/monitoring.md)")


def refuse_nonfinite_weights(weights: Iterable[tuple[str, torch.Tensor]], folder: str | None) -> None:
    """Raises `UserError` where a weight is NaN or infinite, before anything is written to `folder`."""
    for name, tensor in weights:
        if tensor.is_floating_point() and not tensor.is_meta and not bool(torch.isfinite(tensor).all()):
            raise UserError(
                f"{name} holds numbers that are not finite, so nothing was written to {folder}: what lies there is as "
                "it was. Go back to a checkpoint, and lower learning_rate or max_grad_norm"
            )


class FiniteSteps(Trainer):
    """A trainer that skips the steps whose loss or gradient is not finite. Stands before TRL's trainer."""

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
        """TRL's parent asks for it after the backward pass and before the optimizer: the place to skip a step."""
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        broken = torch.tensor(float(self._broken), device=self.accelerator.device)
        self._broken = False
        # A gradient scaler (fp16) skips the infinite gradients that it causes itself, and finds its scale by them.
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
            # DeepSpeed has taken its step within the backward pass.
            raise UserError(f"step {step}: the loss or a gradient is not finite; {self._advice()}")
        model.zero_grad(set_to_none=True)  # the optimizer leaves a weight without a gradient as it is
        logger.warning("step %d: the loss or a gradient is not finite; the step is skipped", step)
        if self._in_a_row >= MAX_IN_A_ROW:
            raise UserError(
                f"step {step}: the loss or a gradient was not finite in {self._in_a_row} steps in a row, which were "
                f"skipped; {self._advice()}"
            )

    def _advice(self) -> str:
        return (
            f"the run stops. The last batch begins: {self._shown()!r}. Look at that row; lower learning_rate or "
            "max_grad_norm; train in bf16 instead of fp16"
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
        assert self.model is not None
        weights = state_dict.items() if state_dict else self.model.named_parameters()
        refuse_nonfinite_weights(weights, output_dir or self.args.output_dir)
        super()._save(output_dir, state_dict=state_dict)
