"""A whole training step with colocated vLLM, stock TRL's and ours: rollout, log-probs, loss, optimizer, weight sync.

    python benchmarks/vllm_step.py                    # one GPU: 512 trajectories, Qwen2.5-3B shape, 20 ms per search
    python benchmarks/vllm_step.py --no_checkpointing # only ours, without gradient checkpointing
    python benchmarks/vllm_step.py --silent_groups .4 # in two of five groups all rewards are equal
    python benchmarks/vllm_step.py --shape tiny --trajectories 32 --scale 0.1      # CPU (without the weight sync)

Both follow the plan of `vllm_rollout.py` and use TRL's defaults, including gradient checkpointing. Stock TRL uses
micro-batches of 8 rows, padded to the longest row of the batch, ours of 64. A step is a call of `train()` for one step
on a warm engine, and the weight sync after it.

Without checkpointing, the engine sleeps between rollouts, so that the activations can use its memory. It gets its
weights when it wakes, so the sync is then part of the rollout. Ours then uses micro-batches of 8 rows, one pack each.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import vllm_rollout
import vllm_shape
from trl import GRPOTrainer


def steps_of(rows: int, trajectories: int) -> dict[str, Any]:
    return {
        "per_device_train_batch_size": rows,
        "gradient_accumulation_steps": trajectories // rows,
        "max_steps": 1,
        "save_strategy": "no",
        "logging_steps": 1,
    }


def run_step(trainer: GRPOTrainer) -> dict[str, float]:
    """Seconds of one optimizer step and of its parts."""
    clock: dict[str, float] = {}

    def timed(name: str) -> Any:
        method = getattr(trainer, name)

        def run(*arguments: Any, **options: Any) -> Any:
            _wait()
            started = time.perf_counter()
            result = method(*arguments, **options)
            _wait()
            clock[name] = clock.get(name, 0.0) + time.perf_counter() - started
            return result

        return mock.patch.object(trainer, name, run)

    synced = torch.cuda.is_available() and not trainer.vllm_generation.enable_sleep_mode
    sync = trainer.vllm_generation.sync_weights if synced else lambda: None
    trainer._last_loaded_step = trainer.state.global_step  # the sync comes at the end of the step here
    trainer.vllm_generation.llm.reset_prefix_cache()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    with vllm_rollout.on_the_plan(trainer), timed("_generate"), timed("_generate_and_score_completions"):
        _wait()
        started = time.perf_counter()
        trainer.train()
        _wait()
        trained = time.perf_counter() - started
        sync()
        _wait()
    whole = time.perf_counter() - started
    scored = clock["_generate_and_score_completions"]
    return {
        "whole step": whole,
        "rollout": clock["_generate"],
        "old log-probs": scored - clock["_generate"],
        "loss, backward, optimizer": trained - scored,
        "weight sync": whole - trained,
        "peak GiB": torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else float("nan"),
    }


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=list(vllm_shape.SHAPES), default="3b")
    parser.add_argument("--trajectories", type=int, default=512)
    parser.add_argument("--scale", type=float, default=1.0, help="factor for all lengths")
    parser.add_argument("--search_ms", type=float, default=20.0)
    parser.add_argument("--rows", type=int, nargs=2, help="rows per micro-batch: stock TRL's (8), ours (64, or 8)")
    parser.add_argument(
        "--silent_groups", type=float, default=0.0, help="share of groups with equal rewards (default: 0)"
    )
    parser.add_argument(
        "--packed_tokens",
        type=int,
        default=16384,
        help="max_packed_tokens of ours; 0: set by the free memory (default: 16384)",
    )
    parser.add_argument(
        "--no_checkpointing",
        action="store_true",
        help="only ours, without gradient checkpointing, the engine asleep during training",
    )
    arguments = parser.parse_args()
    unchecked: dict[str, Any] = {}
    if arguments.no_checkpointing:
        unchecked = {"gradient_checkpointing": False, "vllm_enable_sleep_mode": torch.cuda.is_available()}
    rows_of_stock, rows_of_ours = arguments.rows or (8, 8 if arguments.no_checkpointing else 64)
    plans = vllm_rollout.PLANS
    plans.extend(vllm_shape.make_plans(arguments.trajectories, arguments.scale))
    print(
        f"{vllm_shape.describe(plans)}; {arguments.search_ms:g} ms per search\n{vllm_shape.describe_machine()}",
        flush=True,
    )
    with tempfile.TemporaryDirectory() as folder:
        model_folder = vllm_shape.write_model_folder(Path(folder), arguments.shape)
        # Both trainers share the model, and the one created last decides whether it checkpoints.
        of_stock = {**steps_of(rows_of_stock, arguments.trajectories), **unchecked}
        of_ours = {**steps_of(rows_of_ours, arguments.trajectories), **unchecked}
        of_ours["max_packed_tokens"] = arguments.packed_tokens
        vllm_rollout.SILENT_GROUPS[0] = arguments.silent_groups
        stock, ours = vllm_rollout.make_trainers(model_folder, arguments, of_stock, of_ours)
        questions: Any = ours.train_dataset
        vllm_rollout.run_bound(ours, [row["prompt"] for row in questions for _ in range(vllm_shape.GROUP)])
        trainers: dict[str, GRPOTrainer] = {"trl-search": ours}
        if not arguments.no_checkpointing:
            trainers["stock TRL"] = stock
        measured: dict[str, dict[str, float]] = {}
        for name, trainer in trainers.items():
            measured[name] = run_step(trainer)
            print(name, {part: round(value, 2) for part, value in measured[name].items()}, flush=True)
            # Frees its optimizer states for the other trainer.
            trainer.optimizer = None
            trainer.accelerator.free_memory()
    if len(measured) == 2:
        print("| part, seconds | stock TRL | trl-search | of stock |\n|---|---|---|---|")
        for part, mine in measured["trl-search"].items():
            theirs = measured["stock TRL"][part]
            print(f"| {part} | {theirs:.2f} | {mine:.2f} | {mine / theirs:.2f} |")


if __name__ == "__main__":
    main()
