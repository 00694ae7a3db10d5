"""A whole training step on 1, 2 and 4 GPUs: DDP, DeepSpeed ZeRO, FSDP2, LoRA, tensor parallel, and a server beside it.

    python benchmarks/scaling_gpus.py ddp:1+lora:1 ddp:2 fsdp2:2 server:2 --out scaling.jsonl   # prints the table
    CUDA_VISIBLE_DEVICES=2,3 python benchmarks/scaling_gpus.py ddp:2        # on these two GPUs
    python benchmarks/scaling_gpus.py --table scaling.jsonl
    python benchmarks/scaling_gpus.py tiny-tp:2 --engine '{"disable_custom_all_reduce": true}'      # engine options

A case is [SHAPE-][long-]METHOD:GPUS. Shapes: 3b (the default), 7b, and tiny, to try the script. Methods:

    ddp, zero2, zero3, fsdp2    one engine per rank
    lora                        DDP with LoRA; only the adapter is sent to the engines
    merged                      DDP with LoRA; all weights are sent to the engines, with the adapter merged
    tp                          DDP; all ranks share one engine (vllm_tensor_parallel_size)
    server                      the first half of the GPUs trains with DDP, the second half serves (data parallel)

`long` uses trajectories of 30k tokens. Cases joined by + run at the same time, each on its own GPUs. zero2 and zero3
need DeepSpeed.

Every case measures two steps after a warm-up: weak scaling (`--weak` trajectories per GPU) and strong scaling
(`--strong` trajectories in all); of ZeRO and `long` only the first step is measured. Weights are random, and each
trajectory follows a plan (`vllm_shape.py`), so every case samples, reads and trains on the same numbers of tokens. A
step has these parts: weight sync, rollout, log-probs of the old policy, loss and backward, optimizer. Times are those
of the slowest rank.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import psutil

HERE = Path(__file__).parent
ACCELERATE = HERE.parent / "recipes" / "accelerate"
FSDP2 = [
    *("--use_fsdp", "--fsdp_version", "2", "--fsdp_auto_wrap_policy", "TRANSFORMER_BASED_WRAP"),
    *("--fsdp_state_dict_type", "FULL_STATE_DICT", "--fsdp_reshard_after_forward", "true"),
]
LAUNCH: dict[str, list[str]] = {
    "ddp": ["--multi_gpu"],
    "lora": ["--multi_gpu"],
    "merged": ["--multi_gpu"],
    "tp": ["--multi_gpu"],
    "server": ["--multi_gpu"],
    "fsdp2": FSDP2,
    "zero2": ["--config_file", str(ACCELERATE / "zero2.yaml")],
    "zero3": ["--config_file", str(ACCELERATE / "zero3.yaml")],
}
SHARDED = ("fsdp2", "zero2", "zero3")
ROWS = 8  # rows per micro-batch, which are one pack
LONG_SEARCHES = 42


@dataclass(frozen=True)
class Case:
    """The parts of `7b-long-fsdp2:4`."""

    name: str
    shape: str
    is_long: bool
    method: str
    gpus: int

    @property
    def has_adapter(self) -> bool:
        return self.method in ("lora", "merged")

    @property
    def ranks(self) -> int:
        """The number of training processes; the other GPUs serve."""
        return self.gpus // 2 if self.method == "server" else self.gpus


def parse_case(name: str) -> Case:
    what, gpus = name.split(":")
    *before, method = what.split("-")
    shape = next((word for word in before if word != "long"), "3b")
    if method not in LAUNCH:
        raise SystemExit(f"{name}: the method must be one of {', '.join(LAUNCH)}")
    return Case(name, shape, "long" in before, method, int(gpus))


# The driver


def run_together(cases: list[Case], arguments: argparse.Namespace) -> None:
    """Runs cases at the same time, each on its own GPUs, and prints their errors."""
    started, first, running = time.monotonic(), 0, []
    with contextlib.ExitStack() as servers:
        for case in cases:
            running.append((case, start(case, first, arguments, servers)))
            first += case.gpus
        for case, process in running:
            try:
                code: int | str = process.wait(timeout=max(1.0, started + arguments.timeout - time.monotonic()))
            except subprocess.TimeoutExpired:
                code = f"none after {arguments.timeout:.0f} s: killed"
            kill(process)
            tail = "" if code == 0 else f"\n{log_of(case, arguments).read_text(errors='replace')[-3000:]}"
            print(f"{case.name}: exit code {code}{tail}", flush=True)


def start(
    case: Case, first: int, arguments: argparse.Namespace, servers: contextlib.ExitStack
) -> subprocess.Popen[bytes]:
    launch = [sys.executable, "-m", "accelerate.commands.launch"]
    launch += LAUNCH[case.method] if case.ranks > 1 or case.method in SHARDED else []
    launch += ["--num_processes", str(case.ranks), "--num_machines", "1"]
    launch += ["--main_process_port", str(29_600 + int(visible_gpus()[first]))]
    launch += ["--mixed_precision", "bf16"] if case.shape != "tiny" else ["--mixed_precision", "no"]
    command = [*launch, __file__, "--worker", case.name, "--out", str(arguments.out)]
    command += ["--weak", str(arguments.weak), "--strong", str(arguments.strong), "--scale", str(arguments.scale)]
    command += ["--engine", json.dumps(arguments.engine)]
    if case.method == "server":
        command += ["--url", servers.enter_context(serving(case, first + case.ranks, arguments))]
    with log_of(case, arguments).open("ab") as log:
        environment = on_gpus(first, case.ranks)
        return subprocess.Popen(command, env=environment, stdout=log, stderr=log)


@contextlib.contextmanager
def serving(case: Case, first: int, arguments: argparse.Namespace) -> Iterator[str]:
    """Runs `vllm serve` on the second half of the case's GPUs; yields its address. The trainer waits for it."""
    import vllm_shape

    port = 8_100 + int(visible_gpus()[first])
    with tempfile.TemporaryDirectory() as folder:
        model = vllm_shape.write_model_folder(Path(folder), case.shape)
        command = vllm_shape.serve_command(model, port, case.gpus - case.ranks)
        command += ["--logprobs-mode", "processed_logprobs", "--weight-transfer-config", '{"backend": "nccl"}']
        command += ["--worker-extension-cls", "trl_search.policies.weight_checksums.WeightChecksums"]
        command += shlex.split(arguments.serve)
        environment = {**on_gpus(first, case.gpus - case.ranks), "VLLM_SERVER_DEV_MODE": "1"}
        environment.pop("VLLM_ENABLE_V1_MULTIPROCESSING", None)
        log = log_of(case, arguments)
        with log.open("ab") as file:
            process = subprocess.Popen(command, env=environment, stdout=file, stderr=file)
        try:
            yield f"http://127.0.0.1:{port}"
        finally:
            kill(process)


def kill(process: subprocess.Popen[bytes]) -> None:
    """Ends a process and its descendants, so that the GPUs are free for the next case."""
    with contextlib.suppress(psutil.NoSuchProcess):
        for child in psutil.Process(process.pid).children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                child.kill()
    process.kill()
    process.wait()


def visible_gpus() -> list[str]:
    """The numbers of the GPUs that this process may use: all, or those in `CUDA_VISIBLE_DEVICES`."""
    return os.environ.get("CUDA_VISIBLE_DEVICES", "0,1,2,3,4,5,6,7").split(",")


def on_gpus(first: int, count: int) -> dict[str, str]:
    """The environment of a process that sees `count` of the visible GPUs, starting at `first`."""
    cache = Path(os.environ.get("VLLM_CACHE_ROOT", Path.home() / ".cache" / "vllm"))
    gpus = visible_gpus()[first : first + count]
    return {
        **os.environ,
        "CUDA_VISIBLE_DEVICES": ",".join(gpus),
        # Engines that start at the same time must not write the same compiled files.
        "VLLM_CACHE_ROOT": f"{cache}-{gpus[0]}",
        "PYTHONPATH": os.pathsep.join([str(HERE), str(HERE.parent), *filter(None, [os.environ.get("PYTHONPATH")])]),
    }


def log_of(case: Case, arguments: argparse.Namespace) -> Path:
    return Path(f"{arguments.out}.{case.name.replace(':', '-')}.log")


def print_table(path: Path) -> None:
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    parts = ["sync", "rollout", "old log-probs", "loss and optimizer"]
    print(f"| case | scaling | trajectories | seconds | {' | '.join(parts)} | peak GiB | trained tokens/s | × |")
    print("|---" * (len(parts) + 7) + "|")
    single = {alike(row): row for row in rows if row["gpus"] == 1}
    for row in rows:
        alone = single.get(alike(row))
        gain = f"{row['tokens'] / row['seconds'] / (alone['tokens'] / alone['seconds']):.2f}" if alone else ""
        shown = " | ".join(f"{row[part]:.1f}" for part in ["seconds", *parts, "peak GiB"])
        speed = row["tokens"] / row["seconds"]
        print(f"| {row['case']} | {row['scaling']} | {row['trajectories']} | {shown} | {speed:,.0f} | {gain} |")
    for machine in dict.fromkeys(row["machine"] for row in rows):
        print(f"\n{machine}")
    print(f"\nrandom weights, micro-batches of {ROWS} rows")


def alike(row: dict[str, Any]) -> tuple[str, ...]:
    """What a row shares with the row of one GPU that it is compared with."""
    gpu = row["machine"].split(";")[0].split("× ")[-1]
    return row["shape"], row["method"], row["scaling"], gpu


# A rank


@contextlib.contextmanager
def on_the_plan() -> Iterator[None]:
    """Within the context, rollouts follow `vllm_rollout.PLANS`."""
    import vllm_rollout

    from trl_search.policies.vllm_colocate import VLLMColocatePolicy
    from trl_search.policies.vllm_server import VLLMServerPolicy
    from trl_search.protocols import QwenTools

    with contextlib.ExitStack() as patches:
        for policy in (VLLMColocatePolicy, VLLMServerPolicy):
            generate = vllm_rollout.planned_generate(policy.generate)
            patches.enter_context(mock.patch.object(policy, "generate", generate))
        parse = vllm_rollout.planned_parse(QwenTools.parse)
        patches.enter_context(mock.patch.object(QwenTools, "parse", parse))
        yield


def make_trainer(folder: Path, case: Case, per_rank: int, arguments: argparse.Namespace) -> Any:
    import torch
    import vllm_rollout
    import vllm_shape
    from datasets import Dataset
    from peft import LoraConfig

    from trl_search import SearchGRPOConfig, SearchGRPOTrainer

    tokens = 32_000 if case.is_long else vllm_rollout.MAX_TOKENS
    cuda = torch.cuda.is_available()
    model, tokenizer = vllm_shape.load(folder, "cuda" if cuda else "cpu")
    if case.method in ("fsdp2", "zero3"):  # so that each rank puts only its shard on the GPU, and vLLM has room
        model.cpu()
        if cuda:
            torch.cuda.empty_cache()
    retriever = vllm_rollout.PlannedRetriever(vllm_rollout.PLANS, tokenizer, 0.02)
    engine: dict[str, Any] = {
        "vllm_mode": "colocate",
        "vllm_enable_sleep_mode": cuda,
        "vllm_gpu_memory_utilization": 0.4,
        "vllm_max_model_length": tokens + 700,
        "vllm_engine_options": {**vllm_shape.options(case.shape), **arguments.engine},
        "vllm_lora_sync": "adapter" if case.method == "lora" else "merged",
        "vllm_tensor_parallel_size": case.gpus if case.method == "tp" else 1,
    }
    if arguments.url is not None:
        engine = {"vllm_mode": "server", "vllm_server_base_url": [arguments.url], "vllm_server_timeout": 240.0}
    args = SearchGRPOConfig(
        output_dir=str(folder / "run"),
        num_generations=vllm_shape.GROUP,
        max_completion_length=tokens,
        max_observation_length=tokens,
        max_packed_tokens=32_768 if case.is_long else 16_384,
        per_device_train_batch_size=1 if case.is_long else ROWS,
        # TRL derives the engine's maximum number of sequences from this.
        gradient_accumulation_steps=per_rank if case.is_long else per_rank // ROWS,
        max_steps=1,
        save_strategy="no",
        logging_steps=1,
        learning_rate=1e-6,
        use_vllm=True,
        bf16=cuda,
        use_cpu=not cuda,
        report_to="none",
        disable_tqdm=True,
        log_trajectories=0,
        **engine,
    )
    return SearchGRPOTrainer(
        model=model,
        args=args,
        reward_funcs=[vllm_rollout.random_reward],
        train_dataset=Dataset.from_list([{"question": f"question {i}"} for i in range(4096)]),
        processing_class=tokenizer,
        environment=vllm_rollout.PlannedEnvironment(retriever, max_searches=LONG_SEARCHES),
        peft_config=LoraConfig(r=32, lora_alpha=64, target_modules="all-linear") if case.has_adapter else None,
    )


def set_batch(trainer: Any, per_rank: int) -> None:
    """Makes the next `train()` roll out this many trajectories per rank and take one optimizer step on them."""
    args = trainer.args
    args.gradient_accumulation_steps = args.steps_per_generation = per_rank // args.per_device_train_batch_size
    args.generation_batch_size = per_rank * trainer.accelerator.num_processes
    trainer._step, trainer._buffered_inputs = 0, None


def run_step(trainer: Any, plans: list[Any]) -> dict[str, float]:
    """Seconds of one step on this rank and of its parts."""
    import torch
    import vllm_rollout

    vllm_rollout.PLANS[:] = plans
    planned = vllm_rollout.PlannedRetriever(plans, trainer.processing_class, 0.0)
    trainer.environment.retriever.texts = planned.texts
    clock: dict[str, float] = {}
    cuda = torch.cuda.is_available()
    synchronize = torch.cuda.synchronize if cuda else lambda: None

    def timed(owner: Any, name: str) -> Any:
        method = getattr(owner, name)

        def run(*arguments: Any, **options: Any) -> Any:
            synchronize()
            started = time.perf_counter()
            result = method(*arguments, **options)
            synchronize()
            clock[name] = clock.get(name, 0.0) + time.perf_counter() - started
            return result

        return mock.patch.object(owner, name, run)

    if cuda:
        torch.cuda.reset_peak_memory_stats()
    trainer._last_loaded_step = -1  # the weight sync comes before the rollout
    trainer.accelerator.wait_for_everyone()
    started = time.perf_counter()
    with (
        on_the_plan(),
        timed(trainer.vllm_generation, "sync_weights"),
        timed(trainer, "_generate"),
        timed(trainer, "_generate_and_score_completions"),
    ):
        trainer.train()
    synchronize()
    trainer.accelerator.wait_for_everyone()
    whole = time.perf_counter() - started
    return {
        "seconds": whole,
        "sync": clock["sync_weights"],
        "rollout": clock["_generate"] - clock["sync_weights"],
        "old log-probs": clock["_generate_and_score_completions"] - clock["_generate"],
        "loss and optimizer": whole - clock["_generate_and_score_completions"],
        "peak GiB": torch.cuda.max_memory_allocated() / 2**30 if cuda else 0.0,
        "tokens": float(sum(sum(plan.turns) + sum(plan.observations) for plan in plans)),
    }


def sizes_per_rank(case: Case, arguments: argparse.Namespace) -> dict[str, int]:
    """Trajectories per rank by kind of scaling; a warm-up is not recorded."""
    weak, strong = arguments.weak * case.gpus // case.ranks, arguments.strong // case.ranks
    if case.is_long:
        return {"first step": ROWS}
    if case.method.startswith("zero"):  # DeepSpeed's engine is gone after one training
        return {"first step": weak}
    warm_up = max(ROWS, weak // 4 // ROWS * ROWS)
    return {"warm-up": warm_up, "weak": weak, **({"strong": strong} if strong != weak else {})}


def work(case: Case, arguments: argparse.Namespace) -> None:
    import torch
    import vllm_shape
    from accelerate.utils import gather_object

    rank = int(os.environ.get("RANK", "0"))
    if torch.cuda.is_available():  # must be set before the model is created
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    sizes = sizes_per_rank(case, arguments)
    with tempfile.TemporaryDirectory() as folder:
        model_folder = vllm_shape.write_model_folder(Path(folder), case.shape)
        trainer = make_trainer(model_folder, case, max(sizes.values()), arguments)
        random.seed(rank)
        for number, (scaling, size) in enumerate(sizes.items()):
            plans = vllm_shape.make_plans(size, arguments.scale, seed=number * 1000 + rank)
            if case.is_long:
                plans = [vllm_shape.make_long_plan(plan.index, LONG_SEARCHES) for plan in plans]
            set_batch(trainer, size)
            mine = run_step(trainer, plans)
            ranks = gather_object([mine])
            row: dict[str, Any] = {name: max(one[name] for one in ranks) for name in mine}
            row |= {"tokens": sum(one["tokens"] for one in ranks), "trajectories": size * case.ranks}
            row |= {"case": case.name, "shape": case.shape, "method": case.method, "gpus": case.gpus}
            beside = f"; {case.gpus - case.ranks} more serve" if case.method == "server" else ""
            row |= {"scaling": scaling, "machine": vllm_shape.describe_machine() + beside}
            if rank == 0:
                print(row, flush=True)
                write_rows(arguments, row)
        trainer.accelerator.wait_for_everyone()
    os._exit(0)  # the engine's threads may not end cleanly


def write_rows(arguments: argparse.Namespace, row: dict[str, Any]) -> None:
    """Appends the measurements; a step of the same size under both kinds of scaling counts for both."""
    if row["scaling"] == "warm-up":
        return
    kinds = {row["scaling"], *(["strong"] if row["trajectories"] == arguments.strong else [])}
    with arguments.out.open("a") as file:
        file.writelines(json.dumps({**row, "scaling": kind}) + "\n" for kind in sorted(kinds))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", metavar="METHOD:GPUS[+METHOD:GPUS...]")
    parser.add_argument(
        "--out", type=Path, default=Path("scaling.jsonl"), help="file to append results to, one line per step"
    )
    parser.add_argument("--weak", type=int, default=128, help="trajectories per GPU")
    parser.add_argument("--strong", type=int, default=512, help="total number of trajectories")
    parser.add_argument("--scale", type=float, default=1.0, help="factor for all lengths")
    parser.add_argument("--engine", type=json.loads, default={}, help="more options of a colocated engine, as JSON")
    parser.add_argument("--serve", default="", help="more options of `vllm serve`, such as '--api-server-count 4'")
    parser.add_argument("--timeout", type=float, default=300.0, help="timeout in seconds for cases that run together")
    parser.add_argument("--table", type=Path, help="print the table of this file and measure nothing")
    parser.add_argument("--worker", metavar="METHOD:GPUS", help=argparse.SUPPRESS)
    parser.add_argument("--url", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        work(parse_case(arguments.worker), arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated"))  # so that contexts end their servers
    for cases in [[parse_case(name) for name in together.split("+")] for together in arguments.cases]:
        run_together(cases, arguments)
    if arguments.table or arguments.out.exists():
        print_table(arguments.table or arguments.out)


if __name__ == "__main__":
    main()
