"""LoRA adapters in vLLM: engine arguments, a supported rank, and loading from tensors instead of files."""

from __future__ import annotations

import inspect
from types import SimpleNamespace
from typing import Any

import torch
from accelerate.utils import is_peft_model
from peft import PeftConfig

from trl_search.common.errors import UserError

# The values of max_lora_rank that vLLM accepts.
_LORA_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
# The initialisations of PEFT that leave the base weights as they are.
_LEAVE_THE_BASE = (True, False, "gaussian", "eva", "orthogonal", "mica")


def lora_options(rank: int) -> dict[str, Any]:
    """Arguments for a `vllm.LLM` that applies one adapter of that rank."""
    room = next((size for size in _LORA_RANKS if size >= rank), rank)
    return {"enable_lora": True, "max_lora_rank": room, "max_loras": 1}


def adapter_from(tensors: dict[str, torch.Tensor]) -> SimpleNamespace:
    """A replacement for vLLM's `LoRAModel` that loads these tensors from their device instead of a file."""
    from vllm.lora.lora_model import LoRAModel

    def from_local_checkpoint(folder: str, expected_modules: set[str], **options: Any) -> Any:
        # Drop options for adapters in files, which differ between versions of vLLM.
        known = inspect.signature(LoRAModel.from_lora_tensors).parameters
        options = {name: value for name, value in options.items() if name in known}
        device = next(iter(tensors.values())).device
        lora = LoRAModel.from_lora_tensors(**{**options, "tensors": tensors, "device": device})
        # The check that vLLM makes for files: otherwise it silently ignores modules that it does not support.
        last = {name.rsplit(".", 1)[-1] for name in lora.loras if ".experts" not in name}
        if unknown := sorted(last - expected_modules):
            raise UserError(
                f"vLLM cannot apply an adapter to {', '.join(unknown)} of this model: leave it out of target_modules, "
                "or use vllm_lora_sync='merged'"
            )
        return lora

    return SimpleNamespace(from_local_checkpoint=from_local_checkpoint)


def adapter_rank(model: Any) -> int:
    """The rank of a model's adapter, if vLLM can apply it to the base model as saved on disk.

    Raises:
        UserError: if vLLM cannot apply the adapter.
    """
    if not is_peft_model(model):
        raise UserError("vllm_lora_sync='adapter' needs a LoRA adapter: give a peft_config, or use 'merged'")
    return supported_rank(model.peft_config[model.active_adapter], "use vllm_lora_sync='merged'")


def supported_rank(config: PeftConfig, remedy: str) -> int:
    """The rank of an adapter with this configuration. Raises `UserError`, with a remedy, if vLLM cannot apply it."""
    unsupported = {
        "use_dora": bool(getattr(config, "use_dora", False)),
        "modules_to_save": bool(getattr(config, "modules_to_save", None)),
        "bias": getattr(config, "bias", "none") != "none",
        "lora_bias": bool(getattr(config, "lora_bias", False)),
        # vLLM uses one scale for all modules.
        "rank_pattern": bool(getattr(config, "rank_pattern", None)),
        "alpha_pattern": bool(getattr(config, "alpha_pattern", None)),
        # vLLM loads the original base.
        "init_lora_weights": not leaves_the_base(config),
        "peft_type": config.peft_type != "LORA",
    }
    found = [name for name, is_set in unsupported.items() if is_set]
    if found:
        raise UserError(f"vLLM does not support this adapter's {', '.join(found)}: {remedy}")
    return int(config.r)  # type: ignore[attr-defined]


def leaves_the_base(config: PeftConfig) -> bool:
    """Whether a new adapter leaves the base weights as they are. PiSSA, OLoRA, LoftQ and similar methods do not."""
    kept = getattr(config, "init_lora_weights", True) in _LEAVE_THE_BASE
    return kept and getattr(config, "kasa_config", None) is None
