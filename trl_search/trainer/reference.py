"""The reference of the KL term as an adapter, `ref`, which TRL adds to a `PeftModel` that it gets.

adapter_model.safetensors         of a checkpoint: the policy's adapter
ref/adapter_model.safetensors     the reference's
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedModel, Trainer

logger = logging.getLogger(__name__)

_REFERENCE = "ref"  # TRL's name


def complete_reference(model: Any) -> None:
    """Copies to TRL's reference adapter, `ref`, the weights that TRL leaves out: those whose name ends with `default`.

    TRL copies `...lora_A.default.weight`, but not `...ia3_l.default`, which are initialised anew.
    """
    if not isinstance(model, PeftModel) or _REFERENCE not in model.peft_config:
        return
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(".default"):
                model.get_parameter(f"{name.removesuffix('default')}{_REFERENCE}").copy_(parameter)


class KeepsReference(Trainer):
    """A mixin that loads both adapters of a checkpoint. List it before TRL's trainer."""

    args: Any
    model: PreTrainedModel

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        loaded = self.model if model is None else model
        both = isinstance(loaded, PeftModel) and (Path(resume_from_checkpoint) / _REFERENCE).is_dir()
        if both and not self.is_fsdp_enabled:
            # transformers loads only the adapters in folders, so the policy would begin anew.
            loaded.load_adapter(resume_from_checkpoint, "default", is_trainable=True)
        if getattr(self.args, "sync_ref_model", False):
            logger.warning(
                "sync_ref_model: no checkpoint contains the reference model, so it begins anew as the model at the "
                "start of the run, until the next sync"
            )
