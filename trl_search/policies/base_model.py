"""The model that `trl-search train` and `trl-search sft` start from, by the keys of TRL's `ModelConfig`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from peft import PeftConfig
from transformers import AutoModelForCausalLM, PreTrainedModel
from trl import GRPOConfig, ModelConfig, SFTConfig, get_peft_config

from trl_search.common.errors import UserError
from trl_search.policies.tiny import tiny_policy_path


def base_name(model_config: ModelConfig) -> str:
    """What `from_pretrained` takes: `tiny` is a folder of this package."""
    if not model_config.model_name_or_path:
        raise UserError("model_name_or_path is missing: give a model of the hub, a folder, or 'tiny'")
    return tiny_policy_path() if model_config.model_name_or_path == "tiny" else model_config.model_name_or_path


def load_base(name: str, model_config: ModelConfig, config: GRPOConfig | SFTConfig) -> PreTrainedModel:
    """Loads the model, or another in its place and in its manner: a teacher, a warm start."""
    options: dict[str, Any] = {"dtype": model_config.dtype or "float32"}
    if isinstance(config.model_init_kwargs, dict):
        options |= config.model_init_kwargs
    if name == base_name(model_config):
        options["revision"] = model_config.model_revision
    if model_config.attn_implementation:
        options["attn_implementation"] = model_config.attn_implementation
    if Path(name).is_absolute() and not Path(name).exists():
        raise UserError(f"there is no model at {name}")
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        name, trust_remote_code=config.trust_remote_code, **options
    )
    return model


def adapter_config(model_config: ModelConfig) -> PeftConfig | None:
    """The adapter that is trained, on every linear layer unless it says otherwise; `None` where all weights are."""
    adapter: Any = get_peft_config(model_config)
    if adapter is not None and not adapter.target_modules:
        adapter.target_modules = "all-linear"
    return adapter
