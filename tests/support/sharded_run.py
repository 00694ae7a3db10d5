"""Each of two ranks runs this for tests/trainer/test_sharded.py: the same steps under DDP, FSDP2 and ZeRO, over gloo.

    RANK=0 LOCAL_RANK=0 WORLD_SIZE=2 MASTER_ADDR=127.0.0.1 MASTER_PORT=... python -m tests.support.sharded_run FOLDER

Rollouts are scripted and vLLM is a fake, so only losses, gradients and the weights sent to the engine may differ.
Rank 0 writes them to FOLDER/<kind>-<method>.pt.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterator
from logging.handlers import BufferingHandler
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DeepSpeedPlugin, DistributedType
from peft import LoraConfig
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback, TrainerState
from transformers.integrations.deepspeed import unset_hf_deepspeed_config
from trl.generation import vllm_generation

from tests.support.fake_engine import FakeLLM
from tests.support.scripted_trainer import answer, config, later_is_better, scripted_trainer, search, steps
from trl_search.trainer import resumed_optimizer
from trl_search.trainer.generation import vllm_backend
from trl_search.trainer.generation.adapter_sync import adapter_tensors

# The environment that `accelerate launch` sets for recipes/accelerate/fsdp2.yaml.
FSDP2 = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
}
# And for zero2.yaml and zero3.yaml.
ZERO = {
    "ACCELERATE_USE_DEEPSPEED": "true",
    "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "none",
    "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": "none",
}
METHODS: dict[str, dict[str, str]] = {
    "ddp": {},
    "fsdp2": FSDP2,
    "zero2": {**ZERO, "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"},
    "zero3": {
        **ZERO,
        "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3",
        "ACCELERATE_DEEPSPEED_ZERO3_INIT": "true",
        "ACCELERATE_DEEPSPEED_ZERO3_SAVE_16BIT_MODEL": "true",
    },
}
# Otherwise ZeRO-3 would gather such small weights once and keep them.
KEEP_NOTHING = {
    "stage3_param_persistence_threshold": 0,
    "stage3_max_live_parameters": 30_000,
    "stage3_max_reuse_distance": 0,
    "stage3_prefetch_bucket_size": 20_000,
}
LORA = LoraConfig(r=4, lora_alpha=32, target_modules="all-linear")
KINDS: dict[str, dict[str, Any]] = {
    "full": {"beta": 0.1},
    "untied": {"gradient_checkpointing": True},
    "lora": {"beta": 0.1, "gradient_checkpointing": True},
}


def start(method: str) -> None:
    """Makes the next trainer use this method."""
    AcceleratorState._reset_state(reset_partial_state=True)
    unset_hf_deepspeed_config()
    for name in {name for environment in METHODS.values() for name in environment}:
        os.environ.pop(name, None)
    os.environ.update(METHODS[method])
    if method.startswith("zero"):
        import deepspeed.ops

        # DeepSpeed would compile its own operator that sums tensors in shared memory; gloo can sum them too.
        deepspeed.ops.__compatible_ops__ = {}


def let_the_methods_run_on_cpus() -> None:
    """accelerate allows FSDP2 and DeepSpeed only on GPUs, although both also run over gloo."""
    theirs, their_backend = PartialState.__init__, PartialState._prepare_backend
    their_plugin = DeepSpeedPlugin.__post_init__

    def init(self: PartialState, *args: Any, **kwargs: Any) -> None:
        theirs(self, *args, **kwargs)
        if "ACCELERATE_USE_FSDP" in os.environ and self.distributed_type is DistributedType.MULTI_CPU:
            self._shared_state["distributed_type"] = DistributedType.MULTI_GPU

    def prepare_backend(self: PartialState, *args: Any, **kwargs: Any) -> tuple[str, DistributedType]:
        if "ACCELERATE_USE_DEEPSPEED" in os.environ:  # with `use_cpu` false, because otherwise DeepSpeed is refused
            return "gloo", DistributedType.MULTI_CPU
        return their_backend(self, *args, **kwargs)

    def post_init(self: DeepSpeedPlugin) -> None:
        their_plugin(self)
        if self.zero_stage == 3:
            self.deepspeed_config["zero_optimization"].update(KEEP_NOTHING)

    DeepSpeedPlugin.__post_init__ = post_init  # type: ignore[method-assign]
    PartialState.__init__, PartialState._prepare_backend = init, prepare_backend  # type: ignore[method-assign]


def script(number: int, prompt: str) -> list[str]:
    """Rank 1 searches more often, so the ranks have different numbers of packs."""
    rank = PartialState().process_index
    return [search(f"{turn} of {number}") for turn in range(rank * 2 + number % 2)] + [answer(f"{number}")]


def make(folder: Path, run: Path, kind: str, method: str, **options: Any) -> Any:
    start(method)
    options |= {**KINDS[kind], "use_vllm": True, "max_packed_tokens": 400, "use_cpu": not method.startswith("zero")}
    # Nearly plain gradient descent, so that equal weights mean equal gradients.
    options |= {"learning_rate": 1.0, "adam_epsilon": 1.0}
    arguments = config(run, **options)  # as in a run: while these arguments exist, ZeRO-3 loads every model in shards
    model_folder = folder / ("untied" if kind == "untied" else "model")
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    model = AutoModelForCausalLM.from_pretrained(model_folder)
    del arguments
    torch.manual_seed(0)  # for the weights of LoRA
    return scripted_trainer(
        run, model, tokenizer, script, rewards=later_is_better,
        # About the log-prob of the scripted tokens under random weights, so importance ratios are near 1.
        logprob=-7.3, trainer={"peft_config": LORA} if kind == "lora" else {}, **options,
    )  # fmt: skip


def is_shard(parameter: torch.Tensor) -> bool:
    """Whether this process has only a part of it."""
    mine = getattr(parameter, "ds_tensor", parameter)  # ZeRO-3
    return isinstance(parameter, DTensor) or mine.numel() < getattr(parameter, "ds_numel", 0)


def seen(trainer: Any) -> dict[str, Any]:
    trainer.vllm_generation.sync_weights()
    adapter = {}
    if hasattr(trainer.model, "peft_config"):
        adapter = adapter_tensors(trainer.model, trainer._dist, torch.device("cpu"))
    return {
        "loss": [row["loss"] for row in steps(trainer)],
        "grad_norm": [float(row["grad_norm"]) for row in steps(trainer)],
        "kl": [row.get("kl", 0.0) for row in steps(trainer)],
        "engine": trainer.vllm_generation.llm.loaded,
        "adapter": adapter,
        "sharded": sum(map(is_shard, trainer.model.parameters())),
    }


class CollapsesOnce(TrainerCallback):
    """In place of the alarm: the first training collapses, and checkpoint 1 is the best."""

    def __init__(self, run: Path, at_the_end: Callable[[], None]) -> None:
        self.best, self.at_the_end, self.trainings, self.counts_after = str(run / "checkpoint-1"), at_the_end, 0, 0
        self.watch = SimpleNamespace(is_halved_since_start=lambda em: False)

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **of: Any) -> None:
        self.trainings += 1

    def on_save(self, args: Any, state: TrainerState, control: Any, **of: Any) -> None:
        state.best_model_checkpoint, state.best_global_step = self.best, 1

    def on_train_end(self, args: Any, state: TrainerState, control: Any, **of: Any) -> None:
        if self.collapsed:
            self.at_the_end()

    @property
    def collapsed(self) -> bool:
        return self.trainings == 1


def train(folder: Path, run: Path, kind: str, method: str) -> dict[str, Any]:
    """What was seen after two steps (`trained`), and after a rollback to the first one (`rolled back`)."""
    trainer = make(folder, run, kind, method, save_strategy="steps", save_steps=1, on_collapse="rollback")
    results: dict[str, Any] = {}

    def look() -> None:
        results["trained"] = seen(trainer)
        trainer.save_model(run / "saved")

    trainer.collapse_alarm = CollapsesOnce(run, look)
    trainer.add_callback(trainer.collapse_alarm)
    trainer.train()
    results["rolled back"] = {**seen(trainer), "learning_rate": [row["learning_rate"] for row in steps(trainer)]}
    return results


@contextlib.contextmanager
def told_of(module: Any) -> Iterator[list[str]]:
    """The messages that the module logs meanwhile."""
    handler = BufferingHandler(1000)
    told: list[str] = []
    module.logger.addHandler(handler)
    try:
        yield told
    finally:
        module.logger.removeHandler(handler)
        told += [record.getMessage() for record in handler.buffer]


def main(folder: Path, methods: list[str]) -> None:
    started = time.perf_counter()
    vllm_backend.is_vllm_available = vllm_generation.is_vllm_available = lambda: True
    vllm_backend.vllm_version = lambda: "0.25.1"
    vllm_generation.LLM = FakeLLM
    let_the_methods_run_on_cpus()
    for name in methods:
        kind, method = name.split("-")
        run = folder / name
        results = train(folder, run, kind, method)
        if method in ("fsdp2", "zero3") and kind != "untied":
            trainer = make(folder, run, kind, method, weight_decay=0.5)  # without effect
            with told_of(resumed_optimizer) as told:
                trainer.train(resume_from_checkpoint=str(run / "checkpoint-1"))
            results["resumed"] = {**seen(trainer), "told": told}
        if PartialState().is_main_process:
            torch.save(results, folder / f"{name}.pt")
        shown = {key: results["trained"][key] for key in ("loss", "grad_norm", "sharded")}
        print(f"{time.perf_counter() - started:.0f} s", name, shown, flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
    os._exit(0)  # gloo's shutdown sometimes hangs
