"""Iterates over the policy's weights, one full tensor at a time, under vLLM's names.

    base_model.model.model.layers.0.self_attn.q_proj.base_layer.weight   the trainer's name under PEFT
                     model.layers.0.self_attn.q_proj.weight              vLLM's name

Parameters that are sharded by FSDP2 or DeepSpeed ZeRO-3 are gathered one by one, and an adapter is merged into one
layer at a time, so that a device never holds the whole model. The base weights are then restored from a copy, because
subtracting the adapter in bfloat16 would change them a little at every sync.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, cast

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch.distributed.tensor import DTensor
from trl.distributed import DistributedBackend


def whole_weights(
    model: torch.nn.Module, backend: DistributedBackend, device: torch.device
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yields every weight once, with the adapter merged. Tied weights are also yielded once, as vLLM expects.

    Gathering is a collective operation, so every rank must iterate to the end, even if it sends nothing.

    Yields:
        The name and the tensor, which is valid until the next iteration.
    """
    seen: set[int] = set()
    for prefix, module in model.named_modules():
        is_adapted = isinstance(module, BaseTunerLayer)
        if is_adapted:
            parameters = [p for p in module.parameters() if id(p) not in seen]
            named = list(module.get_base_layer().named_parameters())
        else:
            parameters = []
            named = list(module.named_parameters(recurse=False))
        named = [(name, parameter) for name, parameter in named if id(parameter) not in seen]
        seen.update(id(parameter) for parameter in [*parameters, *(parameter for _, parameter in named)])
        with merged(module, backend, parameters) if is_adapted else contextlib.nullcontext():
            if is_adapted:  # LN tuning merges by putting its own layer in place of the base layer
                names = {name for name, _ in named}
                named = [(name, p) for name, p in module.get_base_layer().named_parameters() if name in names]
            for name, parameter in named:
                full_name = f"{prefix}.{name}" if prefix else name
                if "original_module" in full_name:  # PEFT trains a copy, under another name
                    continue
                with contextlib.nullcontext() if is_adapted else backend.gather_params([parameter]):
                    yield vllm_name(full_name), gathered(parameter, device)


@contextlib.contextmanager
def merged(layer: Any, backend: DistributedBackend, parameters: list[torch.nn.Parameter]) -> Iterator[None]:
    """Merges the adapter into the weights of a layer within the context."""
    with backend.gather_params(parameters):
        with torch.no_grad():
            before = [(p, p.data.clone()) for p in layer.get_base_layer().parameters()]
            layer.merge()
        try:
            yield
        finally:
            with torch.no_grad():
                layer.unmerge()
                for parameter, data in before:
                    parameter.data.copy_(data)


def gathered(parameter: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The full tensor of a parameter that may be sharded by FSDP2."""
    tensor = parameter.detach()
    if not isinstance(tensor, DTensor):
        return tensor
    moved = cast(DTensor, tensor.to(device))
    return moved.full_tensor()


def vllm_name(name: str) -> str:
    """vLLM's name of a parameter, without the parts that PEFT and activation checkpointing add."""
    name = name.removeprefix("base_model.model.").replace(".token_adapter", "").replace(".base_layer", "")
    return name.replace("_checkpoint_wrapped_module.", "").replace("modules_to_save.default.", "")
