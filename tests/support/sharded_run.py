"""Each of two ranks runs this for tests/trainer/test_sharded.py: the same steps under DDP and FSDP2, over gloo.

    RANK=0 LOCAL_RANK=0 WORLD_SIZE=2 MASTER_ADDR=127.0.0.1 MASTER_PORT=... python -m tests.support.sharded_run FOLDER

Rollouts are scripted and vLLM is a fake, so that losses, gradients and the weights that reach the engine are all that
may differ. Rank 0 writes them to FOLDER/<name>.pt.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from peft import LoraConfig
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl.generation import vllm_generation

from tests.support.fake_engine import FakeLLM
from tests.support.scripted_trainer import answer, later_is_better, scripted_trainer, search, steps
from trl_search.trainer.generation import vllm_backend
from trl_search.trainer.generation.adapter_sync import adapter_tensors

# What recipes/accelerate/fsdp2.yaml makes `accelerate launch` put into the environment.
FSDP2 = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
}
LORA = LoraConfig(r=4, lora_alpha=32, target_modules="all-linear")


def start(sharded: bool) -> None:
    """Makes the next trainer one of DDP or of FSDP2."""
    AcceleratorState._reset_state(reset_partial_state=True)
    for name, value in FSDP2.items():
        if sharded:
            os.environ[name] = value
        else:
            os.environ.pop(name, None)


def call_the_processes_gpus() -> None:
    """accelerate offers FSDP2 on GPUs alone, although torch's runs over gloo too."""
    theirs = PartialState.__init__

    def init(self: PartialState, *args: Any, **kwargs: Any) -> None:
        theirs(self, *args, **kwargs)
        if "ACCELERATE_USE_FSDP" in os.environ and self.distributed_type is DistributedType.MULTI_CPU:
            self._shared_state["distributed_type"] = DistributedType.MULTI_GPU

    PartialState.__init__ = init  # type: ignore[method-assign]


def script(number: int, prompt: str) -> list[str]:
    """Rank 1 searches more often, so the ranks have other numbers of packs."""
    rank = PartialState().process_index
    return [search(f"{turn} of {number}") for turn in range(rank * 2 + number % 2)] + [answer(f"{number}")]


def make(folder: Path, run: Path, *, sharded: bool, lora: bool, untied: bool = False, **options: Any) -> Any:
    start(sharded)
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    torch.manual_seed(0)  # of the new head and of LoRA
    if untied:
        model.config.tie_word_embeddings = False
        model.lm_head.weight = torch.nn.Parameter(torch.randn_like(model.lm_head.weight) * 0.02)
    return scripted_trainer(
        run, model, tokenizer, script, rewards=later_is_better, use_vllm=True, learning_rate=1.0,
        adam_epsilon=1.0,  # nearly plain gradient descent, so that equal weights are equal gradients
        # About as likely as the model of random weights finds what the script says: importance ratios near 1.
        logprob=-7.3, max_packed_tokens=400, trainer={"peft_config": LORA} if lora else {}, **options,
    )  # fmt: skip


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
        "sharded": sum(isinstance(parameter, DTensor) for parameter in trainer.model.parameters()),
    }


def main(folder: Path) -> None:
    started = time.perf_counter()
    vllm_backend.is_vllm_available = vllm_generation.is_vllm_available = lambda: True
    vllm_backend.vllm_version = lambda: "0.25.1"
    vllm_generation.LLM = FakeLLM
    call_the_processes_gpus()
    kinds: dict[str, dict[str, Any]] = {
        "full": {"lora": False, "beta": 0.1},
        "untied": {"lora": False, "untied": True, "gradient_checkpointing": True},
        "lora": {"lora": True, "beta": 0.1, "gradient_checkpointing": True},
    }
    for kind, options in kinds.items():
        for sharded in (False, True):
            name = f"{kind}-{'fsdp2' if sharded else 'ddp'}"
            run = folder / name
            trainer = make(folder, run, sharded=sharded, save_strategy="steps", save_steps=1, **options)
            trainer.train()
            results = {"trained": seen(trainer)}
            trainer.save_model(run / "saved")
            if sharded and kind != "untied":
                trainer = make(folder, run, sharded=sharded, **options)
                trainer.train(resume_from_checkpoint=str(run / "checkpoint-1"))
                results["resumed"] = seen(trainer)
            if PartialState().is_main_process:
                torch.save(results, folder / f"{name}.pt")
            shown = {key: results["trained"][key] for key in ("loss", "grad_norm", "sharded")}
            print(f"{time.perf_counter() - started:.0f} s", name, shown, flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    os._exit(0)  # gloo's own end hangs now and then
