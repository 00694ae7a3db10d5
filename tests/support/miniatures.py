"""Miniature decoders of many families: the real architectures with two small layers of random weights."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

_COMMON: dict[str, Any] = {
    "vocab_size": 400,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.3,  # far from uniform, so that wrong attention changes the log-probs
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
_WINDOW = {"sliding_window": 16}
_MIXED = {**_WINDOW, "layer_types": ["sliding_attention", "full_attention"]}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen2": ("qwen2", {}),
    "qwen2_window": ("qwen2", {**_WINDOW, "use_sliding_window": True, "max_window_layers": 1}),
    "qwen3": ("qwen3", {"head_dim": 8}),
    "qwen3_moe": ("qwen3_moe", {"head_dim": 8, "output_router_logits": True, **_EXPERTS}),
    "llama": ("llama", {}),
    "smollm3": ("smollm3", {}),
    "mistral": ("mistral", _WINDOW),  # its layer_types do not list its windows
    "mixtral": ("mixtral", {**_WINDOW, "num_local_experts": 4, "output_router_logits": True}),
    "starcoder2": ("starcoder2", _WINDOW),
    "phi3": ("phi3", _WINDOW),
    "gemma3": ("gemma3_text", {"head_dim": 8, **_MIXED}),
    "gpt2": ("gpt2", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 512, "n_inner": 64}),
    "opt": ("opt", {"ffn_dim": 64, "word_embed_proj_dim": 32, "init_std": 0.3}),
    "gemma2": ("gemma2", {"head_dim": 8, **_MIXED}),
    "gpt_oss": ("gpt_oss", {"head_dim": 8, "num_local_experts": 4, **_MIXED}),
    "gpt_neo": ("gpt_neo", {"num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]]}),
    "bloom": ("bloom", {"n_layer": 2, "n_head": 4}),
    "mpt": ("mpt", {"d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 512}),
    "mamba": ("mamba", {}),
    "lfm2": ("lfm2", {"layer_types": ["conv", "full_attention"]}),
}


def miniature(family: str, **changes: Any) -> PreTrainedModel:
    """A model of that family, always with the same weights."""
    kind, options = FAMILIES[family]
    config = AutoConfig.for_model(kind, **{**_COMMON, **options, **changes})
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()  # transformers warns about the ratios of miniatures
    try:
        torch.manual_seed(0)
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    finally:
        transformers.logging.set_verbosity(verbosity)
    return model.eval()
