"""The effect of training on groups that began one or two batches ago: held-out EM at `max_staleness` 0, 1 and 2.

    nice -n 5 python benchmarks/staleness.py --output runs/staleness         # one CPU core: 1 minute per run, 9 runs
    nice -n 5 python benchmarks/staleness.py --output runs/with_vllm --engine vllm          # two cores: 10 times that

Runs the quickstart. With `max_staleness: s`, s + 1 batches are in flight, the oldest groups form the batch, and each
token gets an importance weight for the policy that sampled it. All runs of a seed start from the same warmed-up
policy. EM is on held-out questions, with greedy decoding. Runs that are in OUTPUT already are not repeated.

| engine | the engine that generates while the trainer computes                                                     |
|--------|----------------------------------------------------------------------------------------------------------|
| copy   | our own engine on a thread, with a second copy of the model that gets the weights where a server would   |
| vllm   | a `vllm serve` process, the real server mode; vLLM's build for CPUs takes no whole weights, so an adapter |
|        | is trained, with ten times the learning rate                                                             |
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import statistics
import subprocess
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from kills import SERVING, vllm_environment, wait_for
from shared_start import make_parser, options_of, start, train, write_table

from tests.support.ports import free_port  # `kills` puts the checkout on the path
from trl_search.policies.base import Policy
from trl_search.policies.transformers_policy import TransformersPolicy
from trl_search.trainer.grpo import SearchGRPOTrainer
from trl_search.trainer.pipeline import WARM_START

RANK = 32
TRAINING = [
    "--use_vllm", "true", "--vllm_mode", "server", "--vllm_lora_sync", "adapter", "--use_peft", "true",
    "--lora_r", str(RANK), "--lora_alpha", str(2 * RANK), "--lora_target_modules", "all-linear",
    "--learning_rate", "1e-3",
]  # fmt: skip
LOGGED = ("carry_over/batches_waited", "sampling/effective_sample_size", "loss/without_gradient", "reward")


@contextlib.contextmanager
def served(model: Path, log: Path, environment: dict[str, str]) -> Iterator[str]:
    """Runs `vllm serve MODEL` on loopback; yields its address when it is ready."""
    port = free_port()
    command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", str(model)]
    command += ["--port", str(port), "--max-lora-rank", str(RANK), *SERVING]
    with log.open("ab") as file:
        process = subprocess.Popen(command, env=environment, stdout=file, stderr=file)
    try:
        wait_for(f"http://127.0.0.1:{port}/health")
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait()


def generate_with_a_copy(trainer: SearchGRPOTrainer, staleness: int) -> None:
    """Replaces the server by a copy of the model; without a server, the configuration refuses `max_staleness`."""
    trainer.args.max_staleness = staleness
    model = copy.deepcopy(trainer.model).eval()

    @contextlib.contextmanager
    def generation_policy(prompt_ids: Sequence[Sequence[int]]) -> Iterator[Policy]:
        trainer.release_engine()  # before the weights change
        model.load_state_dict(trainer.model.state_dict())
        yield TransformersPolicy(model, trainer.protocol.tokenizer, max_sequences=trainer.args.rollout_batch_size)

    trainer.generation_policy = generation_policy  # type: ignore[method-assign]


def one(staleness: int, seed: int, url: str | None, arguments: argparse.Namespace) -> dict[str, Any]:
    """Trains and measures one run; without an address, it uses the copy."""
    server = [*TRAINING, "--vllm_server_base_url", url, "--max_staleness", str(staleness)] if url else []
    options = [
        *server, "--rollout_batch_size", "192", *options_of(arguments), "--on_collapse", "warn",
    ]  # fmt: skip
    run = start(f"staleness_{staleness}", seed, arguments.output, options)
    run.arguments.evaluate = False  # before training, the policy is the same in all runs
    course, after = train(run) if url else train(run, partial(generate_with_a_copy, staleness=staleness))
    means = {
        name: statistics.mean(values)
        for name in LOGGED
        if (values := [entry[name] for entry in course.steps if name in entry])
    }
    return {
        "staleness": staleness, "seed": seed, "course": course.em, "after": after.as_json(),
        "means": means, "history": course.steps,
    }  # fmt: skip


def train_with_vllm(wanted: Sequence[int], seed: int, arguments: argparse.Namespace) -> None:
    """Trains each run in a separate process that can import vLLM, with one server for all runs."""
    start("warm", seed, arguments.output, [])
    environment = {**vllm_environment(arguments.output), "VLLM_SERVER_DEV_MODE": "1"}
    environment["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] = "True"
    model = arguments.output / f"seed_{seed}" / WARM_START
    with served(model, arguments.output / "vllm.log", environment) as url:
        for staleness in wanted:
            command = [sys.executable, __file__, *sys.argv[1:], "--server", url]
            command += ["--seeds", str(seed), "--staleness", str(staleness)]
            with (arguments.output / f"staleness_{staleness}_{seed}.log").open("wb") as log:
                subprocess.run(command, env=environment, stdout=log, stderr=log, check=True)


def line(row: dict[str, Any]) -> str:
    waited = row["means"].get("carry_over/batches_waited", 0.0)
    size = row["means"].get("sampling/effective_sample_size", float("nan"))
    course = " ".join(f"{em:.2f}" for em in row["course"])
    return (
        f"| {row['staleness']} | {row['seed']} | {course} "
        f"| {row['after']['em']:.3f} ± {row['after']['em_ci95']:.3f} | {waited:.2f} | {size:.3f} |"
    )


def main() -> None:
    parser = make_parser(__doc__, steps=8, every=4)
    parser.add_argument("--staleness", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--engine", choices=["copy", "vllm"], default="copy")
    parser.add_argument("--server", help=argparse.SUPPRESS)  # for the process that trains one run
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    arguments.output = arguments.output.absolute()

    def result(staleness: int, seed: int) -> Path:
        return Path(arguments.output / f"staleness_{staleness}_{seed}.json")

    def keep(row: dict[str, Any]) -> None:
        result(row["staleness"], row["seed"]).write_text(json.dumps(row, indent=1) + "\n")

    if arguments.server:
        (seed,), (staleness,) = arguments.seeds, arguments.staleness
        keep(one(staleness, seed, arguments.server, arguments))
        return
    rows = []
    for seed in arguments.seeds:
        wanted = [staleness for staleness in arguments.staleness if not result(staleness, seed).is_file()]
        if arguments.engine == "vllm" and wanted:
            train_with_vllm(wanted, seed, arguments)
        for staleness in wanted if arguments.engine == "copy" else []:
            keep(one(staleness, seed, None, arguments))
            print(line(json.loads(result(staleness, seed).read_text())), flush=True)
        rows += [json.loads(result(staleness, seed).read_text()) for staleness in arguments.staleness]
    columns = ["max_staleness", "seed", "EM on the way", "EM at the end", "batches waited", "effective samples"]
    write_table(arguments.output, columns, map(line, rows))


if __name__ == "__main__":
    main()
