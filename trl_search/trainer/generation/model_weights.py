"""The policy's weights, one whole tensor after the other, under the names that vLLM gives them.

    base_model.model.model.layers.0.self_attn.q_proj.base_layer.weight   the trainer's name under PEFT
                     model.layers.0.self_attn.q_proj.weight              vLLM's name

Parameters that FSDP2 or DeepSpeed ZeRO-3 shards are gathered one by one, and an adapter is merged into one layer at a
time, so that a device never holds the whole model. The base weights are put back bit by bit afterwards: subtracting in
bfloat16 what was added would move them a little at every sync.
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
    """Yields every weight once, with the adapter merged; tied weights once too, as vLLM wants them.

    Gathering is a collective operation: every rank must walk to the end, also where it sends nothing anywhere.

    Args:
        model: The policy, under PEFT or not, sharded or not.
        backend ([`~trl.distributed.DistributedBackend`]): How it is sharded.
        device: Where gathered tensors go; parameters may be offloaded to the CPU.

    Yields:
        The name and the tensor, which is valid until the next one is asked for.
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
            for name, parameter in named:
                full_name = f"{prefix}.{name}" if prefix else name
                if "original_module" in full_name:  # PEFT trains a copy of it, which has a name of its own
                    continue
                with contextlib.nullcontext() if is_adapted else backend.gather_params([parameter]):
                    yield vllm_name(full_name), gathered(parameter, device)


@contextlib.contextmanager
def merged(layer: Any, backend: DistributedBackend, parameters: list[torch.nn.Parameter]) -> Iterator[None]:
    """A layer with its adapter merged into its weights, as long as the context lasts."""
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
    """The whole tensor of a parameter that may be sharded by FSDP2."""
    tensor = parameter.detach()
    if not isinstance(tensor, DTensor):
        return tensor
    moved = cast(DTensor, tensor.to(device))
    return moved.full_tensor()


def vllm_name(name: str) -> str:
    """vLLM's name of a parameter, which neither PEFT nor activation checkpointing has wrapped."""
    name = name.removeprefix("base_model.model.").replace(".base_layer", "")
    return name.replace("_checkpoint_wrapped_module.", "").replace("modules_to_save.default.", "")
