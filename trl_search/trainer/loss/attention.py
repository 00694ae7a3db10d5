"""Chooses and installs the kernel that computes attention within each trajectory of a pack, but not across them.

| name                | what it is                                                  | where                        |
|---------------------|-------------------------------------------------------------|------------------------------|
| `varlen`            | PyTorch's `torch.nn.attention.varlen.varlen_attn`           | CUDA from 8.0 on, bf16, fp16 |
| `flash_attention_2` | the flash-attn package                                      | CUDA, bf16, fp16             |
| `flex_attention`    | PyTorch's compiled block mask                               | CUDA                         |
| `sdpa`              | one dense (T, T) mask: the reference in tests               | everywhere                   |
| `padded`            | no packs: rows of similar length together (`logprobs.py`)   | everywhere                   |

`auto` takes the first of `varlen`, `flash_attention_2`, `flex_attention` that works here, else `padded`.

A model keeps its kernel after the forward, because gradient checkpointing reruns layers in the backward. Calls without
packs (generation, padded forwards) use the model's previous implementation, or `sdpa` if that was eager or flash
attention. A call counts as packed if it has `cu_seq_lens_q` or a block mask.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch.nn.attention import varlen
from torch.nn.attention.flex_attention import BlockMask, create_block_mask
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.flex_attention import flex_attention_forward
from transformers.utils import is_flash_attn_2_available

from trl_search.common.errors import UserError
from trl_search.policies.probe import window_of

_PREFERRED = ("varlen", "flash_attention_2", "flex_attention")
_MAX_HEAD_DIM = 256
_VARLEN_OPTIONS = frozenset(inspect.signature(varlen.varlen_attn).parameters)


def choose_attention(
    requested: str, model: PreTrainedModel, *, device: torch.device, dtype: torch.dtype
) -> tuple[str, str]:
    """Chooses the kernel for packs of this model on this device, where attention computes in `dtype` (with autocast:
    autocast's). Returns its name, and the reason for the log.

    Raises:
        UserError: if the requested kernel does not work here.
    """
    if requested == "auto":
        refused = {name: _why_not(name, model, device, dtype) for name in _PREFERRED}
        for name, reason in refused.items():
            if reason is None:
                return name, "the first that works here"
        return "padded", "; ".join(f"no {name}: {reason}" for name, reason in refused.items())
    reason = _why_not(requested, model, device, dtype)
    if reason is not None:
        raise UserError(f"packed_attention={requested!r} does not work here: {reason}. Set it to 'auto'")
    return requested, "set by packed_attention"


def set_attention(model: PreTrainedModel, name: str) -> None:
    """Makes `model` run packs on the kernel `name`, and all other calls as before."""
    if name in ("sdpa", "flash_attention_2"):
        model.set_attn_implementation(name)
    elif name in ("varlen", "flex_attention"):
        own = model.config._attn_implementation
        model.set_attn_implementation(_register(name, "sdpa" if _only_under_its_own_name(own) else own))


def _only_under_its_own_name(implementation: str) -> bool:
    """Whether the implementation cannot be wrapped under another name; sdpa, which computes the same, replaces it.

    Eager attention is not in the registry, and transformers loads flash attention by the name in the configuration.
    """
    return implementation == "eager" or "flash" in implementation


def attention_inputs(name: str, lengths: list[int], device: torch.device) -> dict[str, Any]:
    """The further arguments of a forward over one pack, besides tokens and positions."""
    if name in ("sdpa", "flex_attention"):
        document_T = torch.arange(len(lengths), device=device).repeat_interleave(torch.tensor(lengths, device=device))
        return {"attention_mask": _block_mask(document_T) if name == "flex_attention" else _full_mask(document_T)}
    ends = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32).to(device)
    return {
        # transformers passes a mask of four dimensions through unchanged; without one, it would build a (T, T) mask.
        "attention_mask": torch.ones(1, 1, 1, 1, dtype=torch.bool, device=device) if name == "varlen" else None,
        "cu_seq_lens_q": ends,
        "cu_seq_lens_k": ends,
        "max_length_q": max(lengths),
        "max_length_k": max(lengths),
    }


def varlen_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Any,
    *,
    cu_seq_lens_q: torch.Tensor,
    max_length_q: int,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """`varlen_attn` with the signature of a transformers attention function.

    Args:
        query: (1, heads, T, head_dim).
        key, value: (1, key-value heads, T, head_dim).
        cu_seq_lens_q: (trajectories + 1,) int32, the start of each trajectory and the end of the last one.
        max_length_q: Tokens of the longest trajectory.

    Raises:
        UserError: for soft-capping or attention sinks.
    """
    if kwargs.get("softcap") is not None or kwargs.get("s_aux") is not None:
        raise UserError("varlen_attn supports neither soft-capping nor attention sinks: set packed_attention='padded'")
    # With float32 weights and autocast, rotary embeddings promote queries and keys to float32.
    device = query.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else value.dtype
    query_THD, key_THD, value_THD = (x[0].transpose(0, 1).to(dtype) for x in (query, key, value))
    options: dict[str, Any] = {}
    groups = query_THD.shape[1] // key_THD.shape[1]
    if groups > 1:
        if "enable_gqa" in _VARLEN_OPTIONS:
            options["enable_gqa"] = True
        else:
            key_THD, value_THD = key_THD.repeat_interleave(groups, 1), value_THD.repeat_interleave(groups, 1)
    attended_THD: Any = varlen.varlen_attn(
        query_THD,
        key_THD,
        value_THD,
        cu_seq_lens_q,
        cu_seq_lens_q,
        max_length_q,
        max_length_q,
        scale=scaling,
        # Causal. A window of W contains the token itself and the W - 1 tokens before it.
        window_size=(-1 if sliding_window is None else sliding_window - 1, 0),
        **options,
    )
    return attended_THD.unsqueeze(0), None


_KERNELS: dict[str, tuple[Callable[..., bool], Callable[..., Any]]] = {
    "varlen": (lambda attention_mask, kwargs: kwargs.get("cu_seq_lens_q") is not None, varlen_attention),
    "flex_attention": (lambda attention_mask, kwargs: isinstance(attention_mask, BlockMask), flex_attention_forward),
}


@functools.cache
def _register(name: str, otherwise: str) -> str:
    """Registers with transformers a function that runs `name` for packs and `otherwise` for all other calls."""
    is_packed, packed = _KERNELS[name]
    plain = AttentionInterface()[otherwise]

    def attention(
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: Any,
        **kwargs: Any,
    ) -> Any:
        function = packed if is_packed(attention_mask, kwargs) else plain
        return function(module, query, key, value, attention_mask, **kwargs)

    registered = f"trl_search_{name}_or_{otherwise}"
    AttentionInterface.register(registered, attention)
    AttentionMaskInterface.register(registered, AttentionMaskInterface()[otherwise])
    return registered


def _full_mask(document_T: torch.Tensor) -> torch.Tensor:
    """(1, 1, T, T), True where the query attends to the key: the same trajectory, causally."""
    same_TT = document_T.unsqueeze(0) == document_T.unsqueeze(1)
    return same_TT.tril().unsqueeze(0).unsqueeze(0)


def _block_mask(document_T: torch.Tensor) -> BlockMask:
    def seen(batch: Any, head: Any, query: Any, key: Any) -> Any:
        return (query >= key) & (document_T[query] == document_T[key])

    # Compiled, so that no (T, T) tensor is materialised.
    compiled = document_T.device.type == "cuda"
    tokens = len(document_T)
    return create_block_mask(seen, None, None, tokens, tokens, device=document_T.device, _compile=compiled)


def why_not_packed(model: PreTrainedModel) -> str | None:
    """Why no kernel can separate the trajectories of a pack of this model; None if one may."""
    config = model.config.get_text_config()
    others = set(getattr(config, "layer_types", None) or []) - {"full_attention", "sliding_attention"}
    if others:
        return f"layers of the kind {', '.join(sorted(others))} would mix the trajectories of a pack"
    if config is not model.config:
        return "a vision-language model computes its own positions"
    if not model._can_set_attn_implementation():
        return f"the attention of {type(model).__name__} cannot be replaced"
    return None


def why_not_padding_free(model: PreTrainedModel) -> str | None:
    """Why TRL's `padding_free` would mix the trajectories of a batch of this model; None if it separates them.

    It passes the model only positions, which restart with each trajectory. From them, transformers builds a mask for
    full attention only.
    """
    if window_of(model) is not None:
        return "the mask that is built from positions does not fit its sliding-window layers"
    return why_not_packed(model)


def _why_not(name: str, model: PreTrainedModel, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why packs of this model cannot run on `name` here; None if they can."""
    if name == "padded":
        return None
    if reason := why_not_packed(model):
        return reason
    if name in ("sdpa", "flex_attention"):
        if window_of(model) is not None:
            return "it has only one mask, which does not fit sliding-window layers"
        if name == "sdpa":
            return None
        if device.type != "cuda":
            return f"it has no backward on {device.type}"
        if _caps_or_sinks(model) and _only_under_its_own_name(model.config._attn_implementation):
            return "calls without packs would use sdpa, which supports neither soft-capping nor attention sinks"
        return None
    if device.type != "cuda":
        return f"it needs CUDA, but the model is on {device.type}"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"it needs bf16 or fp16, but training runs in {dtype}"
    if name == "flash_attention_2":
        return None if is_flash_attn_2_available() else "the package flash-attn is not installed"
    return _why_not_varlen(model, device)


def _why_not_varlen(model: PreTrainedModel, device: torch.device) -> str | None:
    if not {"window_size", "scale"} <= _VARLEN_OPTIONS:
        return f"torch {torch.__version__} has no varlen_attn with a window and a scale"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return f"it needs compute capability 8.0, but {torch.cuda.get_device_name(device)} has less"
    config = model.config.get_text_config()
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if head_dim % 8 or head_dim > _MAX_HEAD_DIM or hasattr(config, "v_head_dim"):
        return f"it needs heads of one size, a multiple of 8 up to {_MAX_HEAD_DIM}, but these are {head_dim} wide"
    return "it supports neither soft-capping nor attention sinks" if _caps_or_sinks(model) else None


def _caps_or_sinks(model: PreTrainedModel) -> bool:
    capping = getattr(model.config.get_text_config(), "attn_logit_softcapping", None)
    return bool(capping) or any(hasattr(part, "sinks") for part in model.modules())
