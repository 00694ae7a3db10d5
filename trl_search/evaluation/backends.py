"""The backends that run the policy of an evaluation.

| backend        | the model runs                                       | with several processes       |
|----------------|------------------------------------------------------|------------------------------|
| `transformers` | in this process, on its GPU or on the CPU            | each has a copy              |
| `vllm`         | in a vLLM engine in this process                     | not possible: use a server   |
| `vllm_server`  | in a `vllm serve` that runs already (`--server`)     | all use the same server      |
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trl_search.common.errors import UserError
from trl_search.common.extras import import_extra
from trl_search.policies.base import Policy

BACKENDS = ("transformers", "vllm", "vllm_server")


@dataclass(frozen=True)
class Backend:
    """The engine of an evaluation and its options."""

    name: str = "transformers"  # one of `BACKENDS`
    # Of the weights. By default, bfloat16 on a GPU if there is one, else float32.
    dtype: str | None = None
    device: str | None = None
    server: str | None = None  # the address of the server
    served_model: str | None = None  # the policy's name on the server. By default the first model it lists.
    engine_options: Mapping[str, Any] = field(default_factory=dict)  # more arguments of `vllm.LLM`
    concurrency: int = 64  # questions in flight at once per process

    def check(self, processes: int) -> None:
        """Rejects options that would be ignored or cannot work, before anything is loaded.

        Raises:
            UserError: for options that exclude each other.
        """
        if self.name == "vllm_server" and self.server is None:
            raise UserError("--backend vllm_server needs an address: --server http://127.0.0.1:8000")
        if self.name != "vllm_server" and (self.server or self.served_model):
            raise UserError(f"--server and --served_model are for --backend vllm_server, not {self.name}")
        if self.name != "vllm" and self.engine_options:
            raise UserError(f"--engine_options are for --backend vllm, not {self.name}")
        if self.name == "vllm" and processes > 1:
            raise UserError(
                f"--backend vllm runs in one process, but there are {processes}: start `vllm serve` and use "
                "--backend vllm_server --server URL, or use --backend transformers"
            )


@contextmanager
def open_policy(backend: Backend, model: str, tokenizer: Any) -> Iterator[tuple[Policy, dict[str, Any]]]:
    """Opens the policy, and returns it with its dtype and its number of parameters, if they are known."""
    if backend.name == "transformers":
        from trl_search.policies.loading import check_vocabulary, load_model
        from trl_search.policies.transformers_policy import TransformersPolicy

        loaded = load_model(model, device=backend.device, dtype=backend.dtype)
        check_vocabulary(loaded, tokenizer)
        facts = {"dtype": str(loaded.dtype).removeprefix("torch."), "parameters": loaded.num_parameters()}
        yield TransformersPolicy(loaded, tokenizer, max_sequences=backend.concurrency), facts
    elif backend.name == "vllm":
        yield _engine(backend, model)
    else:
        from trl_search.policies.server_tokenizer import refuse_other_tokenizer
        from trl_search.policies.vllm_server import VLLMServerPolicy

        assert backend.server is not None
        refuse_other_tokenizer(backend.server, tokenizer, model, backend.served_model)
        yield VLLMServerPolicy(backend.server, model=backend.served_model), {}


def _engine(backend: Backend, model: str) -> tuple[Policy, dict[str, Any]]:
    # The policy steps the engine itself, so the engine must run in this process. vLLM reads the variable on import.
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    vllm = import_extra("vllm", "--backend vllm", "vllm", ", or use --backend transformers")
    from trl_search.policies.adapters import read_adapter
    from trl_search.policies.vllm_colocate import VLLMColocatePolicy
    from trl_search.policies.vllm_versions import version_problem

    if problem := version_problem(str(vllm.__version__)):
        raise UserError(f"{problem}: install a version in that range")
    options: dict[str, Any] = {
        "dtype": backend.dtype or "auto",
        "max_num_seqs": backend.concurrency,
        "logprobs_mode": "processed_logprobs",
        **backend.engine_options,
    }
    folder, request = Path(model).expanduser(), None
    if (adapter := read_adapter(folder)) is not None:
        from peft import PeftConfig
        from vllm.lora.request import LoRARequest

        from trl_search.policies.lora import lora_options, supported_rank

        model = adapter["base_model_name_or_path"]
        remedy = f"merge the adapter in {folder} into its base model, or use --backend transformers"
        options = {**lora_options(supported_rank(PeftConfig.from_pretrained(str(folder)), remedy)), **options}
        request = LoRARequest("policy", 1, str(folder.resolve()))
    engine = vllm.LLM(model=model, **options)
    config = engine.llm_engine.model_config
    policy = VLLMColocatePolicy(engine, lora_request=request)
    policy.positions = config.max_model_len
    return policy, {"dtype": str(config.dtype).removeprefix("torch.")}
