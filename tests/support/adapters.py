"""Adapters that were trained, as tests need them."""

from __future__ import annotations

from typing import Any

import torch
from peft import PeftConfig, get_peft_model
from transformers import PreTrainedModel


def trained(model: PreTrainedModel, adapter: PeftConfig) -> Any:
    """The model with an adapter whose weights differ from those at its initialisation."""
    wrapped = get_peft_model(model, adapter)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))
    return wrapped
