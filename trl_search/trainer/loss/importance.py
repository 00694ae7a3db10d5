"""Importance-sampling correction between the sampling engine (vLLM) and the trainer, from the training forward.

TRL corrects with the ratio p_trainer / p_vLLM at sampling time, and runs an extra forward pass for p_trainer. With one
optimizer step per batch, the weights do not change between that pass and the training forward, so the training
log-probs are used instead. With several steps, the old log-probs come from TRL's pass. Loss and gradients are the same
either way (`tests/trainer/loss/test_importance.py`).

| mode                | weight of a token                                         | source               |
|---------------------|-----------------------------------------------------------|----------------------|
| `token_truncate`    | its ratio, clamped                                        | TRL                  |
| `token_mask`        | its ratio, 0 outside the bounds                           | TRL                  |
| `sequence_truncate` | the product of its sequence's ratios, clamped             | TRL                  |
| `sequence_mask`     | that product, 0 outside the bounds                        | TRL                  |
| `geometric_mask`    | 1, or 0 where their geometric mean is outside the bounds  | huggingface/trl#4891 |

Suffixes: B trajectories, C completion tokens, R ranks.
"""

from __future__ import annotations

import math

import torch
from accelerate import Accelerator

from trl_search.trainer.batch import MicroBatch


def correct_towards_engine(
    micro_batch: MicroBatch, mode: str, bounds: tuple[float | None, float | None], accelerator: Accelerator
) -> dict[str, float]:
    """Adds `importance_sampling_ratio` to the micro-batch for TRL's loss. Returns metrics under TRL's names, over the
    tokens that ran on all ranks; NaN if none did."""
    mask_BC = micro_batch.runs_BC
    log_ratios_BC = log_ratios(micro_batch.old_logps_BC, micro_batch.inputs["sampling_per_token_logps"], mask_BC)
    ratio = importance_ratio(log_ratios_BC, mask_BC, mode, *bounds)
    micro_batch.inputs["importance_sampling_ratio"] = ratio
    seen_BC = mask_BC.bool()
    _, mean, high = _spread(log_ratios_BC.abs()[seen_BC], accelerator)
    seen = seen_BC if ratio.shape == seen_BC.shape else seen_BC.any(dim=1, keepdim=True)
    low, average, most = _spread(ratio[seen], accelerator)
    return {
        "sampling/effective_sample_size": effective_sample_size(ratio[seen], accelerator),
        "sampling/sampling_logp_difference/mean": mean,
        "sampling/sampling_logp_difference/max": high,
        "sampling/importance_sampling_ratio/min": low,
        "sampling/importance_sampling_ratio/mean": average,
        "sampling/importance_sampling_ratio/max": most,
    }


def effective_sample_size(weights: torch.Tensor, accelerator: Accelerator) -> float:
    """Kish's (Σw)² / Σw² over all ranks, divided by the number of weights: 1 if all are equal; NaN if there are
    none."""
    weights = weights.detach().float()
    sums = torch.stack([weights.sum(), weights.square().sum(), torch.ones_like(weights).sum()])
    total, squares, count = accelerator.reduce(sums, "sum").tolist()
    return total**2 / (squares * count) if squares else math.nan


def _spread(values: torch.Tensor, accelerator: Accelerator) -> tuple[float, float, float]:
    """Minimum, mean and maximum over all ranks; NaN if there are no values."""
    values = values.detach() if values.numel() else values.new_full((1,), math.nan)
    lows_R, means_R, highs_R = (
        accelerator.gather(torch.stack([values.min(), values.mean(), values.max()])).view(-1, 3).T
    )
    known_R = ~means_R.isnan()
    if not known_R.any():
        return math.nan, math.nan, math.nan
    return lows_R[known_R].min().item(), means_R[known_R].mean().item(), highs_R[known_R].max().item()


def log_ratios(old_logps_BC: torch.Tensor, sampling_logps_BC: torch.Tensor, mask_BC: torch.Tensor) -> torch.Tensor:
    """log(p_trainer / p_vLLM) (B, C); 0 (no correction) outside the loss and where vLLM's log-prob is NaN."""
    return torch.nan_to_num((old_logps_BC - sampling_logps_BC) * mask_BC, nan=0.0)


def importance_ratio(
    log_ratios_BC: torch.Tensor, mask_BC: torch.Tensor, mode: str, low: float | None, high: float | None
) -> torch.Tensor:
    """The weights of the policy loss: (B, C) for the token modes, (B, 1) for the others."""
    if mode == "geometric_mask":
        return geometric_mask(log_ratios_BC, mask_BC, low, high)
    ratio = (log_ratios_BC.sum(dim=-1, keepdim=True) if mode.startswith("sequence") else log_ratios_BC).exp()
    if mode.endswith("truncate"):
        return ratio.clamp(min=low, max=high)
    return ratio.masked_fill(_outside(ratio, low, high), 0.0)


def geometric_mask(
    log_ratios_BC: torch.Tensor, mask_BC: torch.Tensor, low: float | None, high: float | None
) -> torch.Tensor:
    """(B, 1): 1 for sequences whose mean log-ratio is within the bounds, 0 for the others.

    The mean does not grow with the length, so a trajectory is not dropped because it is long. With bounds near 1, such
    as 0.999 and 1.001, the mask drops the sequences on which engine and trainer disagree most (huggingface/trl#4891).
    """
    mean_B1 = log_ratios_BC.sum(dim=-1, keepdim=True) / mask_BC.sum(dim=-1, keepdim=True).clamp(min=1)
    return 1.0 - _outside(mean_B1.exp(), low, high).to(log_ratios_BC.dtype)


def _outside(ratio: torch.Tensor, low: float | None, high: float | None) -> torch.Tensor:
    return (ratio < (-math.inf if low is None else low)) | (ratio > (math.inf if high is None else high))
