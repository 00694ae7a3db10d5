"""Programs that tests/trainer/generation/test_vllm_gpu.py runs in separate processes, with a real engine on GPUs.

    python -m tests.support.vllm_gpu_run colocate FOLDER full|merged|adapter    # two steps, a checkpoint, two more
    accelerate launch ... -m tests.support.vllm_gpu_run server FOLDER URL,full|merged|adapter  # two steps, two ranks
    accelerate launch ... -m tests.support.vllm_gpu_run sharded FOLDER full|merged|adapter  # as colocate, on two ranks
    accelerate launch ... -m tests.support.vllm_gpu_run tensor_parallel FOLDER full|adapter  # one engine for two ranks
    python -m tests.support.vllm_gpu_run servers FOLDER URL,URL,PID    # four steps; the second is killed after one

Each writes its results to FOLDER/<name>.json. "disagreement" is the mean absolute difference between the engine's
logprobs of the tokens that it sampled and the trainer's logprobs of the same tokens.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, TrainerCallback
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from tests.support.ports import free_port
from trl_search import SearchGRPOConfig, SearchGRPOTrainer
from trl_search.common.event_loop import run_sync
from trl_search.data.world import generate_world
from trl_search.policies.tiny import tiny_policy_path
from trl_search.retrieval import load_retriever
from trl_search.types import Sampling

# A fixed cache size: vLLM would measure the free memory, which changes while other tests run on the same GPU.
ENGINE = {"enforce_eager": True, "kv_cache_memory_bytes": 2**30}
COLOCATE: dict[str, Any] = {
    "vllm_mode": "colocate",
    "vllm_gpu_memory_utilization": 0.1,
    "vllm_max_model_length": 2048,
    "vllm_enable_sleep_mode": True,
    "vllm_engine_options": ENGINE,
}


def any_reward(completions: list[Any], **columns: Any) -> list[float | None]:
    """All rewards differ, so that every step changes the weights."""
    return [random.random() for _ in completions]


def untrained() -> Any:
    return AutoModelForCausalLM.from_pretrained(tiny_policy_path(), dtype=torch.bfloat16)


def make_trainer(folder: Path, max_steps: int, lora: bool, **vllm: Any) -> SearchGRPOTrainer:
    world = generate_world(passages=300, seed=0)
    rows = [question.row() for question in world.questions("train", limit=16)]
    args = SearchGRPOConfig(
        output_dir=str(folder),
        max_steps=max_steps,
        logging_steps=1,
        save_steps=2,
        # An adapter starts at zero; after two steps, its effect must exceed the noise of bf16.
        learning_rate=1e-2 if lora else 1e-3,
        per_device_train_batch_size=16,
        num_generations=4,
        max_completion_length=512,
        instruction="",
        bf16=True,
        gradient_checkpointing=False,
        use_vllm=True,
        report_to="none",
        **vllm,
    )
    return SearchGRPOTrainer(
        model=untrained(),
        args=args,
        reward_funcs=[any_reward],
        train_dataset=Dataset.from_list(rows),
        retriever=load_retriever("bm25", passages=world.passages),
        peft_config=LoraConfig(r=8, lora_alpha=32, target_modules="all-linear") if lora else None,
    )


def disagreement(trainer: SearchGRPOTrainer) -> dict[str, float]:
    """The difference of the engine's logprobs from the trainer's, and from the untrained model's."""
    prompt = list(trainer.protocol.prompt_ids(trainer.protocol.messages("where was Mira Talvane born?")))

    async def sample(policy: Any) -> list[Any]:
        await policy.open()
        try:
            return [await policy.generate(prompt, max_tokens=32, sampling=Sampling(seed=i)) for i in range(8)]
        finally:
            await policy.close()

    with trainer.vllm_generation.policy(512) as policy:
        completions = run_sync(sample(policy))
    device = trainer.accelerator.device
    unset_hf_deepspeed_config()  # otherwise ZeRO-3 would shard the untrained model too
    models = {"trainer": trainer.accelerator.unwrap_model(trainer.model), "untrained": untrained().to(device)}
    found = {}
    for name, model in models.items():
        differences = []
        for completion in completions:
            ids = torch.tensor([[*prompt, *completion.ids]], device=device)
            with torch.no_grad():
                logits = model(ids).logits[0, len(prompt) - 1 : -1].float()
            own = logits.log_softmax(-1).gather(1, ids[0, len(prompt) :, None])[:, 0].cpu()
            differences.append((own - torch.tensor(completion.logprobs)).abs())
        found[name] = float(torch.cat(differences).mean())
    return found


def seen(trainer: SearchGRPOTrainer) -> dict[str, Any]:
    """The results after the sync with which the next rollout would begin."""
    trainer.vllm_generation.sync_weights()
    logged = [row for row in trainer.state.log_history if "search/searches" in row]
    return {
        "step": trainer.state.global_step,
        "disagreement": disagreement(trainer),
        "searches": [row["search/searches"] for row in logged],
    }


def colocate(folder: Path, kind: str) -> None:
    lora = kind != "full"
    options = {**COLOCATE, "vllm_lora_sync": "adapter" if kind == "adapter" else "merged"}
    if kind == "adapter":
        # vLLM loads the base model from its folder, in the dtype of the file.
        options["vllm_engine_options"] = {**ENGINE, "dtype": "bfloat16"}
    run = folder / f"run-{kind}"
    if not (run / "checkpoint-2").exists():
        trainer = make_trainer(run, 2, lora, **options)
        trainer.train()
        (folder / f"{kind}.json").write_text(json.dumps(seen(trainer)))
    else:
        trainer = make_trainer(run, 4, lora, **options)
        trainer.train(resume_from_checkpoint=True)
        (folder / f"{kind}-resumed.json").write_text(json.dumps(seen(trainer)))


def sharded(folder: Path, kind: str) -> None:
    """Every rank writes FOLDER/<kind>-<steps>-<rank>.json after two steps, and after two more when it is run again."""
    options = colocate_in_bfloat16(kind)
    run = folder / f"run-{kind}"
    checkpoint = run / "checkpoint-2"
    steps = 4 if checkpoint.exists() else 2
    trainer = make_trainer(run, steps, kind != "full", **options)
    trainer.train(resume_from_checkpoint=str(checkpoint) if steps == 4 else None)
    result = seen(trainer)
    trainer.save_model(str(run / "saved"))
    (folder / f"{kind}-{steps}-{trainer.accelerator.process_index}.json").write_text(json.dumps(result))


def colocate_in_bfloat16(kind: str) -> dict[str, Any]:
    return {
        **COLOCATE,
        "vllm_lora_sync": "adapter" if kind == "adapter" else "merged",
        "vllm_engine_options": {**ENGINE, "dtype": "bfloat16"},
    }


def tensor_parallel(folder: Path, kind: str) -> None:
    options = {**colocate_in_bfloat16(kind), "vllm_tensor_parallel_size": 2}
    trainer = make_trainer(folder / f"run-{kind}", 2, kind != "full", **options)
    trainer.train()
    (folder / f"{kind}-2-{trainer.accelerator.process_index}.json").write_text(json.dumps(seen(trainer)))


class KillAfterOneStep(TrainerCallback):
    """Kills a server and its processes between the first and the second step."""

    def __init__(self, pid: int) -> None:
        self.pid = pid

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 1:
            os.killpg(self.pid, signal.SIGKILL)


def servers(folder: Path, where: str) -> None:
    *urls, pid = where.split(",")
    options = {"vllm_mode": "server", "vllm_server_base_url": urls, "vllm_group_port": free_port()}
    trainer = make_trainer(folder / "run-servers", 4, False, **options)
    trainer.add_callback(KillAfterOneStep(int(pid)))
    trainer.train()
    result = {**seen(trainer), "serving": list(trainer.vllm_generation._serving)}
    (folder / "servers.json").write_text(json.dumps(result))


def server(folder: Path, where: str) -> None:
    url, kind = where.split(",")
    options = {"vllm_mode": "server", "vllm_server_base_url": url, "vllm_group_port": free_port()}
    options["vllm_lora_sync"] = "adapter" if kind == "adapter" else "merged"
    trainer = make_trainer(folder / "run-server", 2, kind != "full", **options)
    trainer.train()
    result = {**seen(trainer), "processes": trainer.accelerator.num_processes}
    (folder / f"server-{trainer.accelerator.process_index}.json").write_text(json.dumps(result))


if __name__ == "__main__":
    mode, where, what = sys.argv[1:]
    modes = [colocate, server, servers, sharded, tensor_parallel]
    {function.__name__: function for function in modes}[mode](Path(where), what)
