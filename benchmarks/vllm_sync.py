"""Weight sync to a colocated engine after an optimizer step: as in stock TRL, all weights at once, only the adapter.

    python benchmarks/vllm_sync.py                  # one GPU, Qwen2.5-3B shape, LoRA of rank 32 on all linear layers
    python benchmarks/vllm_sync.py --shape tiny     # CPU, adapter only: vLLM's CPU build cannot reload weights

After each sync, the engine samples, and its logprobs are compared with the trainer's for the same tokens, to verify
that the weights arrived.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import vllm_shape
from datasets import Dataset
from peft import LoraConfig
from trl.generation.vllm_generation import VLLMGeneration

from trl_search import SearchGRPOConfig, SearchGRPOTrainer
from trl_search.common.event_loop import run_sync
from trl_search.environment import AnswerOnly
from trl_search.types import Completion, Sampling


def no_reward(completions: list[Any], **columns: Any) -> list[float | None]:
    return [0.0] * len(completions)


def make_trainer(folder: Path, shape: str, kind: str) -> SearchGRPOTrainer:
    cuda = torch.cuda.is_available()
    model, tokenizer = vllm_shape.load(folder, "cuda" if cuda else "cpu")
    # The engine loads the trainer's weights, so that an adapter has the same effect on both.
    model.save_pretrained(folder)
    options = {name: value for name, value in vllm_shape.options(shape).items() if name != "load_format"}
    args = SearchGRPOConfig(
        output_dir=str(folder / "run"),
        per_device_train_batch_size=8,
        num_generations=8,
        max_completion_length=256,
        use_vllm=True,
        vllm_mode="colocate",
        vllm_gpu_memory_utilization=0.2,
        vllm_max_model_length=2048,
        vllm_lora_sync="adapter" if kind == "adapter" else "merged",
        vllm_engine_options={**options, "enforce_eager": True},
        bf16=cuda,
        use_cpu=not cuda,
        report_to="none",
    )
    return SearchGRPOTrainer(
        model=model,
        args=args,
        reward_funcs=[no_reward],
        train_dataset=Dataset.from_list([{"question": "who?"}]),
        processing_class=tokenizer,
        environment=AnswerOnly(),
        peft_config=None if kind == "full" else LoraConfig(r=32, lora_alpha=32, target_modules="all-linear"),
    )


def step_weights(trainer: SearchGRPOTrainer) -> None:
    """Changes all trained weights, like an optimizer step with a large learning rate."""
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.01)


def sample(trainer: SearchGRPOTrainer, prompt: list[int]) -> Completion:
    async def go(policy: Any) -> Completion:
        await policy.open()
        try:
            return await policy.generate(prompt, max_tokens=64, sampling=Sampling(seed=1))
        finally:
            await policy.close()

    with trainer.vllm_generation.policy(512) as policy:  # type: ignore[attr-defined]
        return run_sync(go(policy))


def disagreement(trainer: SearchGRPOTrainer) -> float:
    """Mean absolute difference between the engine's logprobs of what it samples and the trainer's."""
    prompt = list(range(300, 340))
    completion = sample(trainer, prompt)
    with torch.no_grad():
        ids = torch.tensor([[*prompt, *completion.ids]], device=trainer.accelerator.device)
        logits = trainer.model(ids).logits[0, len(prompt) - 1 : -1].float()
    own = logits.log_softmax(-1).gather(1, ids[0, len(prompt) :, None])[:, 0]
    return float((own.cpu() - torch.tensor(completion.logprobs)).abs().mean())


def measure(trainer: SearchGRPOTrainer, sync: Callable[[], None], repeats: int) -> tuple[float, float, float]:
    seconds = []
    before = after = 0.0
    for _ in range(repeats + 1):
        step_weights(trainer)
        before = disagreement(trainer)
        _wait()
        started = time.perf_counter()
        sync()
        _wait()
        seconds.append(time.perf_counter() - started)
        after = disagreement(trainer)
    return statistics.median(seconds[1:]), before, after


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def megabytes(trainer: SearchGRPOTrainer, adapter_only: bool) -> float:
    model: Any = trainer.model
    sizes = (
        parameter.numel() * parameter.element_size()
        for name, parameter in model.named_parameters()
        if not hasattr(model, "prefix") or (model.prefix in name) == adapter_only
    )
    return sum(sizes) / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=list(vllm_shape.SHAPES), default="3b")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--kinds", nargs="+", choices=["full", "merged", "adapter"], help="ways to sync (default: all that run here)"
    )
    arguments = parser.parse_args()
    lines = [
        "| what is trained | sync | MB | seconds (median) | logprob difference before → after |",
        "|---|---|---|---|---|",
    ]
    able = ["full", "merged", "adapter"] if torch.cuda.is_available() else ["adapter"]
    for kind in arguments.kinds or able:
        with tempfile.TemporaryDirectory() as folder:
            trainer = make_trainer(vllm_shape.write_model_folder(Path(folder), arguments.shape), arguments.shape, kind)
            backend: Any = trainer.vllm_generation
            ways: dict[str, Callable[[], None]] = {"ours, one pass": backend.sync_weights}
            if kind != "adapter":
                ways = {"stock TRL": functools.partial(VLLMGeneration.sync_weights, backend), **ways}
            else:
                ways = {"the adapter alone": backend.sync_weights}
            backend.sync_weights()
            for name, way in ways.items():
                seconds, before, after = measure(trainer, way, arguments.repeats)
                size = megabytes(trainer, adapter_only=kind == "adapter")
                trained = "all weights" if kind == "full" else "LoRA, rank 32"
                lines.append(f"| {trained} | {name} | {size:,.0f} | {seconds:.2f} | {before:.4f} → {after:.4f} |")
                print(lines[-1], flush=True)
            del trainer, backend, ways
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
    print("\n".join(lines))
    print(vllm_shape.describe_machine())


if __name__ == "__main__":
    main()
