"""Whether the base of an adapter is the model by whose name the adapter will be loaded.

adapter_config.json     {"base_model_name_or_path": "Qwen/Qwen2.5-3B-Instruct"}
base in memory          fine-tuned in the same script, or merged with an earlier adapter
"""

from __future__ import annotations

from pathlib import Path

import torch
from huggingface_hub import try_to_load_from_cache
from safetensors import safe_open
from transformers import PreTrainedModel


def changed_weight(base: PreTrainedModel) -> str | None:
    """The name of a weight whose first row differs from that in the files of the model's name. `None` also if there
    are no such files on this machine."""
    weights = {
        name.replace(".base_layer", "").replace(".original_module", ""): w for name, w in base.named_parameters()
    }
    for file in _files(base.config._name_or_path):
        with safe_open(file, "pt") as stored:
            for name in weights.keys() & stored.keys():
                part = stored.get_slice(name)
                if part.get_shape() == list(weights[name].shape) and differ(weights[name][:1], part[:1]):
                    return name
    return None


def differ(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors differ by more than the rounding of the coarser type."""
    if not (one.is_floating_point() and other.is_floating_point()):  # quantized
        return False
    dtype = min(one.dtype, other.dtype, key=lambda dtype: dtype.itemsize)
    return not torch.equal(one.detach().cpu().to(dtype), other.detach().cpu().to(dtype))


def _files(name: str) -> list[Path]:
    if not name:
        return []
    folder = Path(name)
    if not folder.is_dir():
        cached = try_to_load_from_cache(name, "config.json") if name.count("/") < 2 else None
        if not isinstance(cached, str):
            return []
        folder = Path(cached).parent
    return sorted(folder.glob("model*.safetensors"))
