"""Sends a LoRA adapter to vLLM without the base weights: `vllm_lora_sync="adapter"`.

Each version has its own name, because vLLM's prefix cache distinguishes adapters by name. A colocated engine takes the
tensors from memory; a server reads them from a folder that both sides see under the same path.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx
import torch
from peft import get_peft_model_state_dict
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import save_file
from trl.distributed import DistributedBackend

from trl_search.common.errors import UserError
from trl_search.common.retrying import attempts
from trl_search.policies.lora import adapter_from
from trl_search.policies.vllm_address import client_options
from trl_search.policies.vllm_server import ServerLost
from trl_search.trainer.generation.model_weights import gathered
from trl_search.trainer.replaced import replaced

# How long a server may read an adapter, perhaps from a slow disk. One that dies closes the connection at once.
READ_S = 120.0


def adapter_tensors(model: Any, backend: DistributedBackend, device: torch.device) -> dict[str, torch.Tensor]:
    """The full tensors of the active adapter, as PEFT saves them. Every rank must call it, to gather sharded ones."""
    # "auto" would ask the hub whether the embeddings were resized.
    options: dict[str, Any] = {"adapter_name": model.active_adapter, "save_embedding_layers": False}
    with backend.gather_params([p for name, p in model.named_parameters() if model.prefix in name]):
        tensors = get_peft_model_state_dict(model, **options)
        # Copies, because vLLM multiplies the tensors by the adapter's scale in place.
        return {name: gathered(tensor, device).clone() for name, tensor in tensors.items()}


def give_to_engine(engine: Any, request: Any, tensors: dict[str, torch.Tensor], model: Any, folder: Path) -> None:
    """Replaces the previous version of the adapter in a colocated engine."""
    model.peft_config[model.active_adapter].save_pretrained(folder)
    manager = engine.model_executor.driver_worker.model_runner.lora_manager
    with replaced(manager, "_lora_model_cls", adapter_from(tensors)):
        engine.add_lora(request)
    if request.lora_int_id > 1:
        engine.remove_lora(request.lora_int_id - 1)


def save_adapter(tensors: dict[str, torch.Tensor], model: Any, folder: Path) -> None:
    """Writes the adapter's tensors and configuration for a server."""
    folder.mkdir(parents=True, exist_ok=True)
    cpu = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
    save_file(cpu, folder / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})
    model.peft_config[model.active_adapter].save_pretrained(folder)


def give_to_server(url: str, name: str, old: str | None, folder: Path, rank: int, patience_s: float) -> None:
    """Loads the adapter in `folder` into a server as `name`, and unloads the previous version.

    Raises:
        ServerLost: if the server does not answer within `patience_s`.
        UserError: if the server rejects it.
    """
    post(url, "/v1/load_lora_adapter", {"lora_name": name, "lora_path": str(folder)}, rank, patience_s)
    if old is not None:
        post(url, "/v1/unload_lora_adapter", {"lora_name": old}, rank, patience_s)


def post(url: str, path: str, body: dict[str, Any], rank: int, patience_s: float) -> None:
    """Posts a request to load or unload an adapter, with retries. `rank` is the adapter's, for the error message.

    Raises:
        UserError: if the server rejects the request.
        ServerLost: if the server does not answer.
    """
    try:
        for attempt in attempts(httpx.HTTPError, patience_s=patience_s):
            with attempt:
                timeout = httpx.Timeout(patience_s, read=max(patience_s, READ_S))
                with httpx.Client(timeout=timeout, **client_options(url)) as client:
                    response = client.post(path, json=body)
                if response.status_code >= 500:
                    response.raise_for_status()
    except httpx.HTTPError as error:
        raise ServerLost(
            f"the vLLM server at {url} did not load the adapter ({path}: {error})",
            "restart it, then resume from the last checkpoint",
        ) from error
    # On a retry, the adapter may already be loaded; after a restart, the old one cannot be unloaded. Both are fine.
    if response.is_success or "already been loaded" in response.text or "unload" in path:
        return
    if response.status_code == 404 and "lora" not in response.text.lower():
        raise UserError(
            f"the vLLM server at {url} does not accept adapters: start it with --enable-lora --max-lora-rank {rank} "
            "and VLLM_ALLOW_RUNTIME_LORA_UPDATING=True in its environment"
        )
    raise UserError(
        f"the vLLM server at {url} refused {path} ({response.status_code}: {response.text}): `trl-search doctor "
        "--server` checks its settings"
    )
