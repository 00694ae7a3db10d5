"""A whole training step on 1, 2 and 4 GPUs: DDP, DeepSpeed ZeRO, FSDP2 and LoRA, with an engine in every rank.

    python benchmarks/scaling_gpus.py ddp:1+lora:1 ddp:2 ddp:4 fsdp2:4 --out scaling.jsonl     # and prints the table
    python benchmarks/scaling_gpus.py --table scaling.jsonl

A case is METHOD:GPUS. Methods: ddp, zero2, zero3, fsdp2 (shape 3b), lora (3b, DDP), 7b-fsdp2, 7b-zero3, 7b-lora, and
long-7b-fsdp2 (trajectories of 30k tokens). Cases joined by + run at the same time, each on GPUs of its own. DeepSpeed
must be installed for zero2 and zero3.

Every case measures two steps after a warm-up: weak scaling (`--weak` trajectories per GPU) and strong scaling
(`--strong` trajectories in all). Weights are random, and each trajectory follows a plan (`vllm_shape.py`), so every
case samples, reads and trains on the same kind of tokens. A step is: weights to the engine, rollout, log-probs of the
old policy, loss and backward, optimizer. Times are those of the slowest rank.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any
from unittest import mock

HERE = Path(__file__).parent
FSDP2 = [
    *("--use_fsdp", "--fsdp_version", "2", "--fsdp_auto_wrap_policy", "TRANSFORMER_BASED_WRAP"),
    *("--fsdp_state_dict_type", "FULL_STATE_DICT", "--fsdp_reshard_after_forward", "true"),
]
LAUNCH: dict[str, list[str]] = {
    "ddp": ["--multi_gpu"],
    "lora": ["--multi_gpu"],
    "fsdp2": FSDP2,
    "zero2": ["--config_file", str(HERE.parent / "recipes" / "accelerate" / "zero2.yaml")],
    "zero3": ["--config_file", str(HERE.parent / "recipes" / "accelerate" / "zero3.yaml")],
}
ROWS = 8  # of a micro-batch: one pack
LONG_SEARCHES = 42


def parse_case(case: str) -> tuple[str, str, int, bool]:
    """`7b-fsdp2:4` as shape, method, GPUs and whether its trajectories are long."""
    name, gpus = case.split(":")
    *before, method = name.split("-")
    return ("7b" if "7b" in before else "3b", method, int(gpus), "long" in before)


# The driver


def run_together(cases: list[str], arguments: argparse.Namespace) -> None:
    """Runs cases at the same time, each on GPUs of its own, and prints what went wrong with any."""
    first, running = 0, []
    for number, case in enumerate(cases):
        _, method, gpus, _ = parse_case(case)
        launch = [sys.executable, "-m", "accelerate.commands.launch"]
        launch += LAUNCH[method] if gpus > 1 or method not in ("ddp", "lora") else []
        launch += ["--num_processes", str(gpus), "--num_machines", "1", "--mixed_precision", "bf16"]
        launch += ["--main_process_port", str(29_600 + number)]
        command = [*launch, __file__, "--worker", case, "--out", str(arguments.out)]
        command += ["--weak", str(arguments.weak), "--strong", str(arguments.strong), "--scale", str(arguments.scale)]
        visible = ",".join(map(str, range(first, first + gpus)))
        environment = {**os.environ, "CUDA_VISIBLE_DEVICES": visible, "PYTHONPATH": _python_path()}
        log = Path(f"{arguments.out}.{case.replace(':', '-')}.log")
        with log.open("w") as file:
            running.append((case, log, subprocess.Popen(command, env=environment, stdout=file, stderr=file)))
        first += gpus
    for case, log, process in running:
        try:
            code = process.wait(timeout=arguments.timeout)
        except subprocess.TimeoutExpired:
            process.terminate()
            code = process.wait()
        print(f"{case}: exit code {code}" + ("" if code == 0 else f"\n{log.read_text()[-3000:]}"), flush=True)


def _python_path() -> str:
    return os.pathsep.join([str(HERE), str(HERE.parent), *filter(None, [os.environ.get("PYTHONPATH")])])


def print_table(path: Path) -> None:
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    parts = ["sync", "rollout", "old log-probs", "loss and optimizer"]
    print(f"| case | scaling | trajectories | seconds | {' | '.join(parts)} | peak GiB | trained tokens/s | × |")
    print("|---" * (len(parts) + 7) + "|")
    single = {(row["shape"], row["method"], row["scaling"]): row for row in rows if row["gpus"] == 1}
    for row in rows:
        alone = single.get((row["shape"], row["method"], row["scaling"]))
        gain = f"{row['tokens'] / row['seconds'] / (alone['tokens'] / alone['seconds']):.2f}" if alone else ""
        shown = " | ".join(f"{row[part]:.1f}" for part in ["seconds", *parts, "peak GiB"])
        speed = row["tokens"] / row["seconds"]
        print(f"| {row['case']} | {row['scaling']} | {row['trajectories']} | {shown} | {speed:,.0f} | {gain} |")
    if rows:
        print(f"\n{rows[0]['machine']}; random weights, micro-batches of {ROWS} rows")


# A rank


def make_trainer(folder: Path, case: str, per_rank: int) -> Any:
    import torch
    import vllm_rollout
    import vllm_shape
    from datasets import Dataset
    from peft import LoraConfig

    from trl_search import SearchGRPOConfig, SearchGRPOTrainer

    shape, method, _, is_long = parse_case(case)
    tokens = 32_000 if is_long else vllm_rollout.MAX_TOKENS
    sharded = method in ("fsdp2", "zero3")
    model, tokenizer = vllm_shape.load(folder, "cuda")
    if sharded:  # each rank then puts its shard on the GPU, and vLLM finds room there
        model.cpu()
        torch.cuda.empty_cache()
    retriever = vllm_rollout.PlannedRetriever(vllm_rollout.PLANS, tokenizer, 0.02)
    args = SearchGRPOConfig(
        output_dir=str(folder / "run"),
        num_generations=vllm_shape.GROUP,
        max_completion_length=tokens,
        max_observation_length=tokens,
        max_packed_tokens=32_768 if is_long else 16_384,
        per_device_train_batch_size=1 if is_long else ROWS,
        # TRL gives the engine room for so many sequences.
        gradient_accumulation_steps=per_rank if is_long else per_rank // ROWS,
        max_steps=1,
        save_strategy="no",
        logging_steps=1,
        learning_rate=1e-6,
        use_vllm=True,
        vllm_mode="colocate",
        vllm_enable_sleep_mode=True,
        vllm_gpu_memory_utilization=0.4,
        vllm_max_model_length=tokens + 700,
        vllm_engine_options=vllm_shape.options(shape),
        vllm_lora_sync="adapter" if method == "lora" else "merged",
        bf16=True,
        report_to="none",
        disable_tqdm=True,
        log_trajectories=0,
    )
    return SearchGRPOTrainer(
        model=model,
        args=args,
        reward_funcs=[vllm_rollout.random_reward],
        train_dataset=Dataset.from_list([{"question": f"question {i}"} for i in range(4096)]),
        processing_class=tokenizer,
        environment=vllm_rollout.PlannedEnvironment(retriever, max_searches=LONG_SEARCHES),
        peft_config=LoraConfig(r=32, lora_alpha=64, target_modules="all-linear") if method == "lora" else None,
    )


def set_batch(trainer: Any, per_rank: int) -> None:
    """The next `train()` rolls out so many trajectories on every rank and takes one optimizer step on them."""
    args = trainer.args
    args.gradient_accumulation_steps = args.steps_per_generation = per_rank // args.per_device_train_batch_size
    args.generation_batch_size = per_rank * trainer.accelerator.num_processes
    trainer._step, trainer._buffered_inputs = 0, None


def run_step(trainer: Any, plans: list[Any]) -> dict[str, float]:
    """Seconds of one step on this rank, and of its parts."""
    import torch
    import vllm_rollout

    vllm_rollout.PLANS[:] = plans
    planned = vllm_rollout.PlannedRetriever(plans, trainer.processing_class, 0.0)
    trainer.environment.retriever.texts = planned.texts
    clock: dict[str, float] = {}

    def timed(owner: Any, name: str) -> Any:
        method = getattr(owner, name)

        def run(*arguments: Any, **options: Any) -> Any:
            torch.cuda.synchronize()
            started = time.perf_counter()
            result = method(*arguments, **options)
            torch.cuda.synchronize()
            clock[name] = clock.get(name, 0.0) + time.perf_counter() - started
            return result

        return mock.patch.object(owner, name, run)

    torch.cuda.reset_peak_memory_stats()
    trainer._last_loaded_step = -1  # weights go to the engine before the rollout
    trainer.accelerator.wait_for_everyone()
    started = time.perf_counter()
    with (
        vllm_rollout.on_the_plan(trainer),
        timed(trainer.vllm_generation, "sync_weights"),
        timed(trainer, "_generate"),
        timed(trainer, "_generate_and_score_completions"),
    ):
        trainer.train()
    torch.cuda.synchronize()
    trainer.accelerator.wait_for_everyone()
    whole = time.perf_counter() - started
    return {
        "seconds": whole,
        "sync": clock["sync_weights"],
        "rollout": clock["_generate"] - clock["sync_weights"],
        "old log-probs": clock["_generate_and_score_completions"] - clock["_generate"],
        "loss and optimizer": whole - clock["_generate_and_score_completions"],
        "peak GiB": torch.cuda.max_memory_allocated() / 2**30,
        "tokens": float(sum(sum(plan.turns) + sum(plan.observations) for plan in plans)),
    }


def work(case: str, arguments: argparse.Namespace) -> None:
    import vllm_shape
    from accelerate.utils import gather_object

    shape, method, gpus, is_long = parse_case(case)
    rank = int(os.environ.get("RANK", "0"))
    sizes = {"weak": arguments.weak, "strong": arguments.strong // gpus}
    if is_long:
        sizes = {"weak": 8}
    elif method.startswith("zero") or sizes["weak"] == sizes["strong"]:
        # DeepSpeed learns the gradient accumulation once; and with as many GPUs both scalings are the same step.
        sizes = {"weak": arguments.weak}

    def plans(count: int, seed: int) -> list[Any]:
        made = vllm_shape.make_plans(count, arguments.scale, seed=seed * 1000 + rank)
        return [vllm_shape.make_long_plan(plan.index, LONG_SEARCHES) for plan in made] if is_long else made

    everything = [plans(size, number) for number, size in enumerate([sizes["weak"], *sizes.values()])]
    with tempfile.TemporaryDirectory() as folder:
        model_folder = vllm_shape.write_model_folder(Path(folder), shape)
        trainer = make_trainer(model_folder, case, max(sizes.values()))
        set_batch(trainer, sizes["weak"])
        random.seed(rank)
        run_step(trainer, everything[0])  # NCCL's channels, the optimizer's state, kernels
        for (scaling, size), made in zip(sizes.items(), everything[1:], strict=True):
            set_batch(trainer, size)
            mine = run_step(trainer, made)
            ranks = gather_object([mine])
            if rank == 0:
                row: dict[str, Any] = {name: max(one[name] for one in ranks) for name in mine}
                row |= {"tokens": sum(one["tokens"] for one in ranks), "trajectories": size * gpus}
                row |= {"case": case, "shape": shape, "method": method, "gpus": gpus, "scaling": scaling}
                row["machine"] = vllm_shape.describe_machine()
                with arguments.out.open("a") as file:
                    file.write(json.dumps(row) + "\n")
                    if arguments.weak * gpus == arguments.strong and not is_long:
                        file.write(json.dumps({**row, "scaling": "strong"}) + "\n")
                print(row, flush=True)
        trainer.accelerator.wait_for_everyone()
    os._exit(0)  # the engine's threads need not end in order


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", metavar="METHOD:GPUS[+METHOD:GPUS...]")
    parser.add_argument("--out", type=Path, default=Path("scaling.jsonl"), help="results are added, a line per step")
    parser.add_argument("--weak", type=int, default=128, help="trajectories per GPU")
    parser.add_argument("--strong", type=int, default=512, help="trajectories in all")
    parser.add_argument("--scale", type=float, default=1.0, help="of all lengths")
    parser.add_argument("--timeout", type=float, default=300.0, help="seconds that a case may take")
    parser.add_argument("--table", type=Path, help="print the table of a file, and measure nothing")
    parser.add_argument("--worker", metavar="METHOD:GPUS", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        work(arguments.worker, arguments)
    for cases in arguments.cases:
        run_together(cases.split("+"), arguments)
    if arguments.table or arguments.out.exists():
        print_table(arguments.table or arguments.out)


if __name__ == "__main__":
    main()
